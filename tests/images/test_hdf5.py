import sys

import numpy as np
import pytest
from examples import RNG, stack

from images.readers import files_of, list_frames, read_geometry
from images.selection import Choice
from run_make_database import main
from utils import UserError

h5py = pytest.importorskip("h5py")


def write(path, **sets):
    with h5py.File(path, "w") as file:
        for name, pixels in sets.items():
            file.create_dataset(name, data=pixels, chunks=True if pixels.ndim > 1 else None)


def test_data_set_is_named_or_the_only_image_of_the_file(tmp_path):
    raw, label = stack(5), stack(5)
    write(tmp_path / "a.h5", raw=raw, label=label, times=np.arange(5))
    for name, pixels in (("raw", raw), ("label", label)):
        for frames in (
            list_frames(f"{tmp_path}/a.h5:/{name}"),
            list_frames(tmp_path / "a.h5", Choice(series=f"/{name}")),
        ):
            assert np.array_equal(np.stack([frame.read()[..., 0] for frame in frames]), pixels)
            assert files_of(frames) == [tmp_path / "a.h5"] and {frame.series for frame in frames} == {f"/{name}"}
    both = list_frames([f"{tmp_path}/a.h5:/raw", f"{tmp_path}/a.h5:/label"])
    assert len(both) == 10
    with pytest.raises(UserError, match=r"holds 2 data sets: name one of them \(.*a\.h5:/label, .*a\.h5:/raw\)"):
        list_frames(tmp_path / "a.h5")
    with pytest.raises(UserError, match=r"a\.h5:/none: no such data set: name one of them \(.*:/label"):
        list_frames(f"{tmp_path}/a.h5:/none")
    write(tmp_path / "b.dat", raw=raw)  # known by its first bytes
    assert len(list_frames(tmp_path / "b.dat")) == 5


def test_patterns_of_files_take_a_data_set_of_each(tmp_path):
    for number in (2, 10):
        write(tmp_path / f"{number}.h5", raw=stack(1)[0], label=stack(1)[0])
    frames = list_frames(f"{tmp_path}/*.h5:/raw")
    assert [(frame.path.name, frame.series) for frame in frames] == [("2.h5", "/raw"), ("10.h5", "/raw")]


@pytest.mark.parametrize("kind", ["labels", "ilastik"])
def test_axes_and_pixel_size_are_read_from_the_attributes(tmp_path, kind):
    pixels = RNG.integers(0, 255, (2, 3, 8, 9)).astype(np.uint16)  # C, Z, Y, X
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("volume/data", data=pixels)
        data.attrs["element_size_um"] = [0.05, 0.004, 0.005]
        if kind == "labels":
            for number, axis in enumerate("czyx"):
                data.dims[number].label = axis
        else:
            data.attrs["axistags"] = '{"axes": [{"key": "c"}, {"key": "z"}, {"key": "y"}, {"key": "x"}]}'
    frames = list_frames(tmp_path / "a.h5")
    assert np.array_equal(frames[2].read(), pixels[:, 2].transpose(1, 2, 0))
    g = read_geometry(frames)
    assert (g.axes, g.lengths, g.unknown) == ("Z", (3,), "")
    assert g.pixel == pytest.approx({"Z": 0.05, "Y": 0.004, "X": 0.005})


def test_chunks_of_a_section_are_read_and_no_others(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("raw", (6, 64, 32), np.uint8, chunks=(2, 32, 32), compression="gzip")
        data[:] = 7
        offset = data.id.get_chunk_info(4).byte_offset  # of sections 4 and 5
    with (tmp_path / "a.h5").open("r+b") as file:
        file.seek(offset)
        file.write(bytes(8))
    frames = list_frames(tmp_path / "a.h5")
    assert (frames[0].read() == 7).all() and (frames[3].read() == 7).all()
    with pytest.raises(UserError, match=r"a\.h5:/raw, Z 4: damaged chunk"):
        frames[4].read()


def test_hdf5_without_images_is_refused(tmp_path):
    write(tmp_path / "a.h5", times=np.arange(5))
    with pytest.raises(UserError, match=r"a\.h5: holds no image \(/times: shape \(5,\)"):
        list_frames(tmp_path / "a.h5")
    write(tmp_path / "b.h5", complex=stack(2).astype(np.complex64), raw=stack(2))
    assert len(list_frames(tmp_path / "b.h5")) == 2
    with pytest.raises(UserError, match="complex64: an image has numbers"):
        list_frames(f"{tmp_path}/b.h5:/complex")
    whole = (tmp_path / "b.h5").read_bytes()
    (tmp_path / "c.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"c\.h5: can't be read"):
        list_frames(tmp_path / "c.h5")


def test_messages_name_the_data_set(tmp_path, work, fails):
    write(tmp_path / "a.h5", raw=stack(3), label=stack(3) > 99, wide=stack(3).astype(np.uint16), times=np.arange(5))
    write(tmp_path / "b.h5", raw=stack(1)[0])
    with pytest.raises(UserError, match=r"a\.h5:/times: shape \(5,\) of int64"):
        list_frames(tmp_path / "a.h5", Choice(series="2"))
    with pytest.raises(UserError, match=r"a\.h5:/raw: no section 3"):
        list_frames(f"{tmp_path}/a.h5:/raw", Choice(section="3"))
    with pytest.raises(UserError, match=r"b\.h5:/raw: no channel 1"):
        list_frames(f"{tmp_path}/b.h5:/raw", Choice(channel="1"))
    with pytest.raises(UserError, match=r"a\.h5:/raw --series 0: each chooses a data set: leave one out"):
        list_frames(f"{tmp_path}/a.h5:/raw", Choice(series="0"))
    assert str(list_frames(f"{tmp_path}/a.h5:/raw")[2]) == f"{tmp_path}/a.h5:/raw, image 3"
    line = fails(main, ["--input", "a.h5:/raw", "a.h5:/wide", "--label", "none"])
    assert "a.h5:/wide, image 1 is uint16, a.h5:/raw, image 1 uint8" in line


def test_data_sets_are_named_and_of_many_the_first(tmp_path):
    write(tmp_path / "a.h5", **{f"s{number:02d}": stack(1, 8)[0] for number in range(30)})
    with pytest.raises(UserError, match=r"holds 30 data sets: name one of them \(.*a\.h5:/s19, \.\.\.\)"):
        list_frames(tmp_path / "a.h5")


def test_data_sets_are_in_hdf5_only(tmp_path):
    np.save(tmp_path / "a.npy", stack(2))
    with pytest.raises(UserError, match=r"a\.npy is no HDF5 file: leave out :/raw"):
        list_frames(f"{tmp_path}/a.npy:/raw")


def test_missing_h5py_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.h5", raw=stack(2))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"a\.h5 needs the package h5py"):
        list_frames(tmp_path / "a.h5")


def virtual(path, name, source, dataset="raw", shape=(5, 32, 32)):
    """Add a virtual data set of another file."""
    layout = h5py.VirtualLayout(shape, np.uint8)
    layout[:] = h5py.VirtualSource(source, dataset, shape)
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset(name, layout)


@pytest.fixture
def folders(tmp_path):
    """A folder, and a secret file outside it."""
    (tmp_path / "in" / "below").mkdir(parents=True)
    write(tmp_path / "secret.h5", raw=stack(5))
    (tmp_path / "secret.txt").write_bytes(bytes(range(100)) * 11)
    return tmp_path / "in"


def test_external_storage_and_links_are_refused(folders, work, fails):
    with h5py.File(folders / "a.h5", "w") as file:
        file.create_dataset("raw", (32, 32), "u1", external=[(str(folders.parent / "secret.txt"), 0, 1024)])
        file["linked"] = h5py.ExternalLink(str(folders.parent / "secret.h5"), "raw")
        file["group"] = h5py.ExternalLink("../secret.h5", "/")
        file["own"] = stack(1)
    assert len(list_frames(folders / "a.h5")) == 1
    for name, reason in (("raw", "external storage"), ("linked", "a link to raw of"), ("group", "a link to / of")):
        with pytest.raises(UserError, match=f"a.h5:/{name}: .*{reason}"):
            list_frames(f"{folders}/a.h5:/{name}")
    assert "a.h5:/raw: its pixels lie in" in fails(main, ["--input", f"{folders}/a.h5:/raw", "--label", "none"])
    with pytest.raises(UserError, match="no such data set"):
        list_frames(f"{folders}/a.h5:/group/raw")


@pytest.mark.parametrize("how", ["absolute", "relative", "by a link", "missing", "through a file", "through a link"])
def test_virtual_data_sets_of_files_elsewhere_are_refused(folders, how, monkeypatch):
    secret, source, dataset = folders.parent / "secret.h5", "b.h5", "raw"
    if how == "absolute":
        source = str(secret)
    elif how == "relative":
        source = "../secret.h5"
    elif how == "by a link":
        (folders / "b.h5").symlink_to(secret)
    elif how == "through a file":
        virtual(folders / "b.h5", "raw", "../secret.h5")
    elif how == "through a link":
        with h5py.File(folders / "b.h5", "w") as file:
            file["group"] = h5py.ExternalLink("../secret.h5", "/")
            file["soft"] = h5py.SoftLink("/group/raw")
        dataset = "soft"
    else:
        write(folders.parent / "b.h5", raw=stack(5))
        monkeypatch.chdir(folders.parent)  # where HDF5 looks, too
    virtual(folders / "a.h5", "data", source, dataset)
    with pytest.raises(
        UserError, match=r"a\.h5: holds no image \(/data: .*(put it there|copy the pixels into one file)"
    ):
        list_frames(folders / "a.h5")


def test_virtual_data_sets_and_links_within_the_folder_are_read(folders):
    pixels = stack(5)
    for path in (folders / "b.h5", folders / "below" / "b.h5"):
        with h5py.File(path, "w") as file:
            file["group/raw"] = pixels
            file["soft"] = h5py.SoftLink("/group/raw")
    (folders.parent / "link.h5").symlink_to("in/a.h5")
    for name, source in (("same", "b.h5"), ("below", "below/b.h5"), ("absolute", str(folders / "b.h5"))):
        virtual(folders / "a.h5", name, source, "soft")
    virtual(folders / "a.h5", "own", ".", "same")
    for file in (folders / "a.h5", folders.parent / "link.h5"):
        for name in ("same", "below", "absolute", "own"):
            frames = list_frames(f"{file}:/{name}")
            assert np.array_equal(np.stack([frame.read()[..., 0] for frame in frames]), pixels)


def test_compression_that_needs_a_plug_in_is_named(tmp_path):
    if h5py.h5z.filter_avail(32001):
        pytest.skip("hdf5plugin is loaded")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((8, 8))
        plist.set_filter(32001, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((8, 8))
        data = h5py.Dataset(h5py.h5d.create(file.id, b"raw", h5py.h5t.STD_U8LE, space, plist))
        data.id.write_direct_chunk((0, 0), bytes(20), 0)
    with pytest.raises(UserError, match=r"/raw: compressed by .*32001\): pip install hdf5plugin") as refused:
        list_frames(tmp_path / "a.h5")
    assert "damaged" not in str(refused.value)


def test_imaris_file_is_recognised_whatever_its_name(tmp_path):
    write(tmp_path / "a.h5", **{"DataSet": stack(5)})
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["ImarisDataSet"] = np.frombuffer(b"ImarisDataSet", "S1")
    with pytest.raises(UserError, match=r"a\.h5: an Imaris file.*: export it as OME-TIFF"):
        list_frames(tmp_path / "a.h5")
