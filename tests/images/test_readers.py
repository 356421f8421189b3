import os

import numpy as np
import pytest
import tifffile
from examples import RNG, read_frames, stack
from PIL import Image
from zarrs import write_zarr

from images.readers import Frame, list_frames, with_neighbours
from utils import UserError


def test_list_frames_reads_a_folder_in_natural_order(tmp_path):
    for name in ("im10.png", "im9.png", "im1.tif", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"")
    for name in ("im10.png", "im9.png"):
        Image.fromarray(stack(1, 8)[0]).save(tmp_path / name)
    tifffile.imwrite(tmp_path / "im1.tif", stack(2, 8), photometric="minisblack")
    assert [(f.path.name, f.index) for f in list_frames(tmp_path)] == [
        ("im1.tif", 0),
        ("im1.tif", 1),
        ("im9.png", 0),
        ("im10.png", 0),
    ]


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
@pytest.mark.parametrize("content", [b"", b"no image at all", bytes(200), b"II*\0" + bytes(4)])
def test_read_file_refuses_what_is_no_image(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_frames(tmp_path / name)


def test_list_frames_refuses_a_missing_source_and_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list_frames(tmp_path / "none.tif")
    with pytest.raises(UserError, match="no image"):
        list_frames(tmp_path)


def test_with_neighbours_stays_within_a_stack(tmp_path):
    for name in ("a.tif", "b.tif"):
        tifffile.imwrite(tmp_path / name, stack(3, 8), photometric="minisblack")
    frames = list_frames(tmp_path)
    assert [(f.path.name, f.index) for f in with_neighbours(frames, 2)[3]] == [
        ("b.tif", 0),
        ("b.tif", 0),
        ("b.tif", 0),
        ("b.tif", 1),
        ("b.tif", 2),
    ]
    singles = [Frame(tmp_path / f"{number}.png", 0) for number in range(3)]
    assert [frame.path.stem for frame in with_neighbours(singles, 1)[0]] == ["0", "0", "1"]


@pytest.mark.parametrize("kind", ["imagej", "ome"])
def test_with_neighbours_stays_within_one_time(tmp_path, kind):
    times = stack(6, 8).reshape(2, 3, 8, 8)
    tifffile.imwrite(tmp_path / "a.tif", times, **{kind: True}, metadata={"axes": "TZYX"})
    around = with_neighbours(list_frames(tmp_path / "a.tif"), 1)
    numbers = [[frame.index for frame in frames] for frames in around]
    assert numbers == [[0, 0, 1], [0, 1, 2], [1, 2, 2], [3, 3, 4], [3, 4, 5], [4, 5, 5]]


def test_read_file_refuses_complex_pixels(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", stack(2).astype(np.complex64))
    with pytest.raises(UserError, match="pixels of complex64"):
        list_frames(tmp_path / "a.tif")


def numbers(path):
    """Numbers of the sections that each section sees as neighbours."""
    return [[frame.index for frame in frames] for frames in with_neighbours(list_frames(path), 1)]


ALONE = [[number] * 3 for number in range(6)]


BY_TIME = [[0, 0, 1], [0, 1, 2], [1, 2, 2], [3, 3, 4], [3, 4, 5], [4, 5, 5]]


BY_SECTION = [[0, 0, 2], [1, 1, 3], [0, 2, 4], [1, 3, 5], [2, 4, 4], [3, 5, 5]]


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [("TYX", (6,), ALONE), ("TZYX", (2, 3), BY_TIME), ("ZTYX", (3, 2), BY_SECTION), ("ZTCYX", (3, 2, 2), BY_SECTION)],
)
@pytest.mark.parametrize("kind", ["ome", "zarr"])
def test_with_neighbours_goes_along_z_alone(tmp_path, axes, shape, expected, kind):
    pixels = RNG.integers(0, 255, (*shape, 8, 9)).astype(np.uint8)
    if kind == "zarr":
        named = [{"name": axis} for axis in axes.lower()]
        write_zarr(tmp_path / "a.zarr", pixels, [{"axes": named, "datasets": [{"path": "0"}]}])
    else:
        tifffile.imwrite(tmp_path / "a.ome.tif", pixels, metadata={"axes": axes})
    assert numbers(next(tmp_path.iterdir())) == expected


def test_with_neighbours_stays_in_one_position_and_pages_written_alone_are_a_stack(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tif:
        for _ in range(2):
            tif.write(stack(3, 8), metadata={"axes": "ZYX"}, photometric="minisblack")
    assert numbers(tmp_path / "a.ome.tif") == BY_TIME
    for name, metadata in (("b.tif", None), ("c.tif", {})):
        with tifffile.TiffWriter(tmp_path / name) as tif:
            for page in stack(3, 8):
                tif.write(page, photometric="minisblack", metadata=metadata)
        assert numbers(tmp_path / name) == BY_TIME[:3]


def test_read_file_recognises_arrays_and_pictures_by_their_first_bytes(tmp_path):
    with (tmp_path / "a.tif").open("wb") as file:
        np.save(file, stack(2, 8))
    Image.fromarray(stack(1, 8)[0]).save(tmp_path / "b.tif", format="png")
    assert [frame.path.name for frame in list_frames(tmp_path)] == ["a.tif", "a.tif", "b.tif"]


def test_list_files_refuses_pipes_devices_and_folders_unopened(tmp_path):
    os.mkfifo(tmp_path / "pipe.tif")
    (tmp_path / "folder.tif").mkdir()
    (tmp_path / "link.tif").symlink_to("nowhere")
    for path, kind in (("pipe.tif", "a pipe"), ("/dev/null", "a device")):
        with pytest.raises(UserError, match=f"{path}: is {kind}"):
            list_frames(tmp_path / path)
    for name, reason in (("folder", "is a folder"), ("link", "can't be read"), ("pipe", "is a pipe")):
        with pytest.raises(UserError, match=f"{name}.tif: {reason}"):
            list_frames(tmp_path / f"{name}*.tif")
    with pytest.raises(UserError, match=r"\.tif: "):
        list_frames(tmp_path)


def test_npy_whose_header_is_too_long_is_one_line_without_numpys_advice(tmp_path):
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_2_0(file, {"descr": "|u1", "fortran_order": False, "shape": (1,) * 5000})
    with pytest.raises(UserError) as refused:
        list_frames(tmp_path / "a.npy")
    assert "\n" not in str(refused.value) and "pickle" not in str(refused.value)


def test_npy_of_wrong_axes_has_its_type_named_in_words(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 2, 2, 2, 2), ">u2"))
    with pytest.raises(UserError, match="of uint16"):
        list_frames(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.arange(12, dtype=">u2").reshape(3, 4))
    (frame,) = list_frames(tmp_path / "b.npy")
    assert frame.read().dtype == np.uint16 and frame.read()[2, 3, 0] == 11


def test_patterns_name_folders_and_existing_folders_are_no_patterns(tmp_path):
    for folder in ("a", "b", "b/c", "d[1]*"):
        (tmp_path / folder).mkdir()
        Image.fromarray(stack(1, 8)[0]).save(tmp_path / folder / "im.png")

    def names(pattern):
        return [str(frame.path.relative_to(tmp_path).parent) for frame in list_frames(f"{tmp_path}/{pattern}")]

    assert names("d[1]*") == names("d[1]*/im.png") == names("d[1]*/*.png") == ["d[1]*"]
    assert names("*/im.png") == ["a", "b", "d[1]*"]
    assert names("**/*.png") == ["a", "b/c", "b", "d[1]*"]
    with pytest.raises(UserError, match="matches nothing"):
        names("[xyz]/*.png")


def test_links_to_one_file_are_two_images(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", stack(1, 8)[0])
    (tmp_path / "b.tif").symlink_to("a.tif")
    assert len(list_frames(tmp_path)) == 2


def test_list_frames_reads_several_sources_in_natural_order_and_no_urls(tmp_path):
    for number in (1, 2, 10):
        np.save(tmp_path / f"{number}.npy", np.full((2, 8, 8), number))
    paths = [str(tmp_path / f"{number}.npy") for number in (1, 10, 2)]
    frames = list_frames(paths)
    assert [frame.read()[0, 0, 0] for frame in frames] == [1, 1, 2, 2, 10, 10]
    assert list_frames(tmp_path) == frames  # a folder of arrays
    Image.fromarray(stack(1, 8)[0]).save(tmp_path / "a.png")
    assert [frame.path.name for frame in list_frames(tmp_path)] == ["a.png"]
    for url in ("https://example.org/a.tif", "s3://bucket/a.zarr"):
        with pytest.raises(UserError, match="URLs are not read"):
            list_frames(url)


def mutants(data, rng):
    """Damaged copies of a file: cut off, or with other bytes."""
    for _ in range(6):
        yield data[: rng.integers(len(data))]
        flipped = bytearray(data)
        for offset in rng.integers(0, min(len(data), 400), 3):
            flipped[offset] = rng.integers(256)
        yield bytes(flipped)


@pytest.mark.parametrize("kind", ["plain.tif", "tiles.tif", "a.png", "a.npy", "zarr.json", "chunk"])
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, kind):
    path, damaged = tmp_path / kind, tmp_path / kind
    if kind.endswith(".tif"):
        options = {"tile": (16, 16), "compression": "zlib"} if kind == "tiles.tif" else {}
        tifffile.imwrite(path, stack(2), photometric="minisblack", **options)
    elif kind == "a.png":
        Image.fromarray(stack(1)[0]).save(path)
    elif kind == "a.npy":
        np.save(path, stack(2))
    else:
        path = tmp_path / "a.zarr"
        pytest.importorskip("zarr").create_array(path, data=stack(2), chunks=(2, 16, 16))
        damaged = path / ("zarr.json" if kind == "zarr.json" else "c/0/0/1")
    for number, data in enumerate(mutants(damaged.read_bytes(), np.random.default_rng(1))):
        damaged.write_bytes(data)
        os.utime(path, ns=(0, number))
        try:
            for frame in list_frames(path):
                frame.read()
        except UserError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)


CONTENTS = {
    "a.tif": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
    "a.jpg": (b"\0\0\0\x18ftypheic" + bytes(99), "an HEIF picture"),
    "a.png": (b"<html><body>not found</body></html>", "text, such as a web page"),
    "a.bmp": (b"PK\3\4" + bytes(99), "a zip archive"),
    "a.gif": (b"", "an empty file"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_content_under_the_name_of_an_image_is_named_and_not_called_damaged(tmp_path, name):
    content, words = CONTENTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {words}") as refused:
        list_frames(tmp_path / name)
    assert "damaged" not in str(refused.value)


def test_cellpose_masks_are_named(tmp_path):
    np.save(tmp_path / "a_seg.npy", {"masks": stack(1)[0]}, allow_pickle=True)
    with pytest.raises(UserError, match=r"a_seg\.npy: Python objects, as Cellpose's .*: save the masks as PNG or TIFF"):
        list_frames(tmp_path / "a_seg.npy")


COLOURS = RNG.integers(0, 255, (20, 30, 3)).astype(np.uint8)
COLOURS[..., 0] //= 4  # three different channels
COLOURS[..., 2] = 100 + np.arange(30) * 5
LOSSLESS = ["png", "bmp", "webp", "tif", "planar.tif", "tiles.tif", "planar.tiles.tif", "lzw.tif", "npy", "zarr", "h5"]


def write_colours(path, name):
    """A file of colours in a format."""
    if name == "zarr":
        axes = [{"name": axis} for axis in "cyx"]
        write_zarr(path, COLOURS.transpose(2, 0, 1), [{"axes": axes, "datasets": [{"path": "0"}]}])
    elif name == "h5":
        with pytest.importorskip("h5py").File(path, "w") as file:
            file["raw"] = COLOURS
    elif name == "npy":
        np.save(path, COLOURS[None])
    elif name.endswith("tif"):
        options = {"planarconfig": "separate"} if "planar" in name else {}
        options |= {"tile": (16, 16), "compression": "zlib"} if "tiles" in name else {}
        options |= {"compression": "lzw"} if "lzw" in name else {}
        tifffile.imwrite(
            path, COLOURS.transpose(2, 0, 1) if "planar" in name else COLOURS, photometric="rgb", **options
        )
    else:
        Image.fromarray(COLOURS).save(path, quality=95, subsampling=0, lossless=True)


@pytest.mark.parametrize("name", LOSSLESS)
def test_colours_are_red_green_and_blue_in_every_format(tmp_path, name):
    if name == "lzw.tif":
        pytest.importorskip("imagecodecs")
    path = tmp_path / f"a.{name}"
    write_colours(path, name)
    (frame,) = list_frames(path)
    assert np.array_equal(frame.read(), COLOURS) and np.array_equal(frame.open()[3:9], COLOURS[3:9])


@pytest.mark.parametrize("name", ["jpg", "jp2", "gif"])
def test_colours_of_lossy_formats_are_nearly_so(tmp_path, name):
    smooth = np.stack(np.broadcast_arrays(np.arange(0, 160, 8)[:, None], 200, np.arange(0, 240, 8)), -1).astype(
        np.uint8
    )
    Image.fromarray(smooth).save(tmp_path / f"a.{name}", **({"quality": 95} if name == "jpg" else {}))
    assert np.abs(list_frames(tmp_path / f"a.{name}")[0].read().astype(int) - smooth).mean() < 5
