import re
import shutil

import numpy as np
import pytest
from examples import RNG, read_frames, stack
from zarrs import write_plate, write_zarr

from images.readers import forget_files, list_frames, read_geometry, with_neighbours
from images.selection import Choice
from utils import UserError

AXES_YX = [{"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
SCALE = [{"type": "scale", "scale": [1, 0.5, 0.5]}]


@pytest.mark.parametrize(
    ("axes", "transforms", "version", "shape"),
    [
        ([{"name": axis, "unit": "micrometer"} for axis in "zyx"], SCALE, 3, (3, 32, 32)),
        ([{"name": axis, "unit": 5} for axis in "zyx"], [{"type": "scale", "scale": [1]}], 3, (3, 32, 32)),
        ([{"name": axis} for axis in "tczyx"], [{"type": "scale", "path": "x"}], 2, (1, 1, 3, 32, 32)),
        (["z", "y", "x"], [], 2, (3, 32, 32)),
        (None, [], 2, (1, 1, 3, 32, 32)),
    ],
)
def test_ome_zarr_of_any_version_is_read(tmp_path, axes, transforms, version, shape):
    image = {"datasets": [{"path": "0", "coordinateTransformations": transforms}]} | ({"axes": axes} if axes else {})
    write_zarr(tmp_path / "a.zarr", stack(3).reshape(shape), [image], version)
    frames = list_frames(tmp_path / "a.zarr")
    g = read_geometry(frames)
    assert [frame.read().shape for frame in frames] == [(32, 32, 1)] * 3
    if transforms is SCALE:
        assert (g.pixel, g.unknown) == ({"Z": 1, "Y": 0.5, "X": 0.5}, "")


def test_zarr_group_of_one_image_is_read_and_members_are_named_if_several(tmp_path):
    zarr = pytest.importorskip("zarr")
    image = {"axes": [{"name": "y"}, {"name": "x"}], "datasets": [{"path": "0"}]}
    zarr.open_group(tmp_path / "a.zarr", mode="w").attrs["ome"] = {"bioformats2raw.layout": 3}
    write_zarr(tmp_path / "a.zarr" / "0", stack(1)[0], [image])
    assert read_frames(tmp_path / "a.zarr")[0].shape == (32, 32, 1)
    write_zarr(tmp_path / "a.zarr" / "1", stack(1)[0], [image])
    with pytest.raises(UserError, match=r"not one OME-Zarr image: name one .*a\.zarr/0, .*a\.zarr/1"):
        list_frames(tmp_path / "a.zarr")
    assert [frame.name for frame in list_frames(tmp_path / "a.zarr", Choice(series="1"))] == ["a-1"]


FIELDS = ("B/2/0", "A/10/1", "A/2/0", "A/2/1")
IN_ORDER = ["A/2/0", "A/2/1", "A/10/1", "B/2/0"]


@pytest.mark.parametrize("version", [2, 3])
def test_plate_is_read_well_by_well(tmp_path, version):
    fields = {name: stack(2) for name in FIELDS}
    write_plate(tmp_path / "p.zarr", fields, version)
    frames = list_frames(tmp_path / "p.zarr")
    assert [frame.series for frame in frames] == [name for name in IN_ORDER for _ in range(2)]
    assert [frame.name for frame in frames[::2]] == ["p-A-2-0", "p-A-2-1", "p-A-10-1", "p-B-2-0"]
    assert str(frames[5]) == f"{tmp_path / 'p.zarr'}, A/10/1, image 2"
    for number, frame in enumerate(frames):
        assert np.array_equal(frame.read()[..., 0], fields[frame.series][number % 2])
    assert [[f.index for f in around] for around in with_neighbours(frames, 1)[1:3]] == [[0, 1, 1], [2, 2, 3]]
    g = read_geometry(frames)
    assert (g.axes, g.lengths, g.labels[::2], g.pixel["X"]) == ("PZ", (4, 2), tuple(IN_ORDER), 0.5)
    chosen = list_frames(tmp_path / "p.zarr", Choice(series="A/10/1, 3"))
    assert [frame.index for frame in chosen] == [4, 5, 6, 7]
    assert read_geometry(chosen[:2]).lengths == (2,)


def test_wells_may_be_read_alone_and_missing_ones_are_named(tmp_path):
    write_plate(tmp_path / "p.zarr", {name: stack(1)[0] for name in FIELDS})
    assert [frame.name for frame in list_frames(tmp_path / "p.zarr" / "A" / "2")] == ["2-0", "2-1"]
    assert len(list_frames(tmp_path / "p.zarr" / "A" / "2" / "1")) == 1
    shutil.rmtree(tmp_path / "p.zarr" / "B")
    with pytest.raises(UserError, match=r"p\.zarr: the well B/2 of the plate is missing"):
        list_frames(tmp_path / "p.zarr")


def test_damaged_chunk_of_a_zarr_is_named(tmp_path):
    zarr = pytest.importorskip("zarr")
    zarr.create_array(tmp_path / "a.zarr", data=stack(2), chunks=(1, 32, 32))
    chunk = tmp_path / "a.zarr" / "c" / "1" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    first, second = list_frames(tmp_path / "a.zarr")
    assert first.read().shape == (32, 32, 1)
    with pytest.raises(UserError, match="Z 1: damaged chunk"):
        second.read()


@pytest.mark.parametrize(
    ("pixels", "axes"),
    [(stack(1, 8)[0, 0], None), (stack(2, 8).astype(complex), None), (stack(2, 8), "yx"), (stack(2, 8), "zab")],
)
def test_zarr_that_is_no_image_is_refused(tmp_path, pixels, axes):
    zarr = pytest.importorskip("zarr")
    if axes:
        named = [{"name": axis} for axis in axes]
        write_zarr(tmp_path / "a.zarr", pixels, [{"axes": named, "datasets": [{"path": "0"}]}])
    else:
        zarr.create_array(tmp_path / "a.zarr", data=pixels)
    with pytest.raises(UserError, match="must be numbers with axes Y and X"):
        list_frames(tmp_path / "a.zarr")


def test_chunk_that_sections_share_is_decoded_once(tmp_path):
    zarr = pytest.importorskip("zarr")
    pixels = RNG.integers(0, 255, (10, 20, 30)).astype(np.uint16)
    array = zarr.create_array(tmp_path / "a.zarr", shape=pixels.shape, chunks=(4, 8, 16), dtype="uint16")
    array[:] = pixels
    frames = list_frames(tmp_path / "a.zarr")
    assert np.array_equal(np.stack([frame.read()[..., 0] for frame in frames]), pixels)
    frames = list_frames(tmp_path / "a.zarr")
    assert np.array_equal(frames[0].open()[3:13][..., 0], pixels[0, 3:13])
    shutil.rmtree(tmp_path / "a.zarr" / "c" / "0")
    assert np.array_equal(frames[2].open()[5:16][..., 0], pixels[2, 5:16])


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"shape":[3,', '"shape":[1000000000,', "claims 1000000000 images"),
        ('"chunk_shape":[3,32,32]', '"chunk_shape":[3,100000,100000]', "a chunk: 60 GB of memory are needed"),
    ],
)
def test_zarr_that_claims_too_much_is_refused(tmp_path, monkeypatch, old, new, reason):
    zarr = pytest.importorskip("zarr")
    monkeypatch.setattr("images.memory.available", lambda: 10**10)
    zarr.create_array(tmp_path / "a.zarr", data=stack(3), chunks=(3, 32, 32))
    text = "".join((tmp_path / "a.zarr" / "zarr.json").read_text().split())
    assert old in text
    (tmp_path / "a.zarr" / "zarr.json").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=reason):
        list_frames(tmp_path / "a.zarr")


def test_chunk_that_unpacks_to_more_than_its_size_is_damaged(tmp_path):
    zarr = pytest.importorskip("zarr")
    codecs = pytest.importorskip("numcodecs")
    array = zarr.create_array(tmp_path / "a.zarr", data=stack(1)[0], compressors=zarr.codecs.ZstdCodec())
    assert array.chunks == (32, 32)
    larger = codecs.Zstd(1).encode(bytes(10**6))
    next(path for path in (tmp_path / "a.zarr" / "c").rglob("*") if path.is_file()).write_bytes(larger)
    with pytest.raises(UserError, match="damaged chunk") as refused:
        list_frames(tmp_path / "a.zarr")[0].read()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("member", ["chunk", "folder", "metadata"])
def test_links_in_a_zarr_folder_are_not_followed(tmp_path, member, version):
    path, scales = tmp_path / "a.zarr", [{"axes": AXES_YX, "datasets": [{"path": "0"}]}]
    pixels = stack(1)[0]
    write_zarr(path, pixels, scales, version)
    assert np.array_equal(list_frames(path)[0].read()[..., 0], pixels)
    chunks = sorted(file for file in (path / "0").rglob("*") if file.is_file())
    metadata = [file for file in chunks if file.name in ("zarr.json", ".zarray")]
    chosen = {"chunk": next(file for file in chunks if file not in metadata), "folder": path / "0"}
    moved = chosen.get(member, metadata[0])
    moved.rename(tmp_path / "moved")
    moved.symlink_to(tmp_path / "moved")
    forget_files()
    with pytest.raises(UserError, match="is a link, which is not followed inside a Zarr folder: copy what it leads to"):
        list_frames(path)[0].read()


@pytest.mark.parametrize("way", ["link", ".."])
def test_plate_does_not_lead_to_other_folders(tmp_path, way):
    fields = {name: stack(1)[0] for name in ("A/1/0", "A/1/1")}
    write_plate(tmp_path / "p.zarr", fields)
    write_zarr(tmp_path / "other.zarr", stack(1)[0], [{"axes": AXES_YX, "datasets": [{"path": "0"}]}])
    if way == "link":
        (tmp_path / "p.zarr/A/1/1").rename(tmp_path / "moved")
        (tmp_path / "p.zarr/A/1/1").symlink_to(tmp_path / "moved")
    else:
        for file in (tmp_path / "p.zarr/A/1").iterdir():
            if file.is_file():
                file.write_text(re.sub(r'"path": *"1"', '"path": "../../../other.zarr"', file.read_text()))
    with pytest.raises(UserError, match=r"is a link|lies outside"):
        list_frames(tmp_path / "p.zarr")


def test_zarr_that_is_a_link_itself_is_read(tmp_path):
    write_zarr(tmp_path / "a.zarr", stack(1)[0], [{"axes": AXES_YX, "datasets": [{"path": "0"}]}])
    (tmp_path / "b.zarr").symlink_to("a.zarr")
    assert list_frames(tmp_path / "b.zarr")[0].read().shape == (32, 32, 1)


@pytest.mark.parametrize("axes", [True, False])
def test_ome_zarr_of_a_later_version_is_named(tmp_path, axes):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=3)
    group.create_array("0", data=stack(1)[0])
    scale = {"datasets": [{"path": "0"}], "coordinateSystems": [{"name": "physical", "axes": AXES_YX}]}
    scale |= {"axes": AXES_YX} if axes else {}
    group.attrs["ome"] = {"version": "0.6.dev2", "multiscales": [scale]}
    with pytest.raises(UserError, match=r"a\.zarr: OME-Zarr 0\.6.*: up to 0\.5 is read: write it as OME-Zarr 0\.5"):
        list_frames(tmp_path / "a.zarr")
