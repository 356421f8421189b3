import importlib.util
import os
import shutil
import struct
import threading
import tracemalloc
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFile

from images.frames import Frame, files_of, list_frames, read_frames, read_geometry, with_neighbours
from utils import UserError

RNG = np.random.default_rng(0)


OME = """<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image><Pixels DimensionOrder="XYZCT"
Type="uint8" SizeX="8" SizeY="8" SizeZ="2" SizeC="1" SizeT="1" PhysicalSizeZ="{}"><TiffData/></Pixels></Image></OME>"""


def stack(num=5, size=32, dtype=np.uint8):
    return RNG.integers(0, 255, (num, size, size)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.float32, np.float64, ">u2"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_tiff_stack_keeps_its_type_and_pixels(tmp_path, dtype, compression):
    pixels = stack(dtype=dtype)
    order = ">" if dtype == ">u2" else "<"
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="minisblack", compression=compression, byteorder=order)
    frames = list_frames(path)
    assert len(frames) == 5
    assert np.array_equal(np.stack([frame.read() for frame in frames])[..., 0], pixels)
    assert frames[3].read().dtype.type is np.dtype(dtype).type
    assert str(frames[3]) == f"{path}, page 4"


@pytest.mark.parametrize(("num", "size"), [(3, 32), (4, 32), (1, 32)])
def test_three_or_four_pages_are_no_colours(tmp_path, num, size):
    tifffile.imwrite(tmp_path / "a.tif", stack(num, size), photometric="minisblack")
    assert [frame.read().shape for frame in list_frames(tmp_path / "a.tif")] == [(size, size, 1)] * num


@pytest.mark.parametrize(("channels", "kept"), [(3, 3), (4, 3)])
def test_rgb_keeps_its_channels_and_drops_alpha(tmp_path, channels, kept):
    pixels = RNG.integers(0, 255, (2, 8, 9, channels)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    assert np.array_equal(np.stack(read_frames(tmp_path / "a.tif")), pixels[..., :kept])
    assert np.array_equal(read_frames(tmp_path / "a.png")[0], pixels[0, ..., :kept])


def test_an_imagej_hyperstack_has_its_channels_last(tmp_path):
    pixels = RNG.integers(0, 255, (4, 2, 8, 9)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, imagej=True, metadata={"axes": "ZCYX"})
    assert np.array_equal(np.stack(read_frames(tmp_path / "a.tif")), pixels.transpose(0, 2, 3, 1))


def test_pages_of_different_size_are_frames_in_order(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        for size in (8, 12, 8):
            tif.write(np.full((size, size), size, np.uint8), photometric="minisblack")
    assert [frame.shape[0] for frame in read_frames(tmp_path / "a.tif")] == [8, 12, 8]


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "P", "LA", "RGBA"])
def test_every_mode_of_png_is_read(tmp_path, mode):
    image = (
        Image.fromarray(stack(1, 8, np.uint16)[0]) if mode == "I;16" else Image.fromarray(stack(1, 8)[0]).convert(mode)
    )
    image.save(tmp_path / "a.png")
    channels = 3 if mode in ("P", "RGBA") else 1
    assert read_frames(tmp_path / "a.png")[0].shape == (8, 8, channels)


def test_a_folder_is_read_in_natural_order(tmp_path):
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


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.9, 0.97])
def test_a_truncated_tiff_is_refused_wherever_it_ends(tmp_path, compression, fraction):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stack(10), photometric="minisblack", compression=compression)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(UserError, match=r"a\.tif"):
        read_frames(path)


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
@pytest.mark.parametrize("content", [b"", b"no image at all", bytes(200), b"II*\0" + bytes(4)])
def test_what_is_no_image_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_frames(tmp_path / name)


def test_a_jpeg_with_a_preview_is_read_as_its_first_image(tmp_path):
    large, small = (Image.fromarray(np.full((size, size), size, np.uint8)) for size in (64, 16))
    large.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[small])
    assert read_frames(tmp_path / "a.jpg")[0].shape == (64, 64, 1)


def test_a_truncated_png_is_refused(tmp_path):
    Image.fromarray(stack(1, 64)[0]).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"a\.png"):
        list_frames(tmp_path / "a.png")[0].read()


def test_a_compression_that_needs_a_package_names_it(tmp_path):
    if importlib.util.find_spec("imagecodecs"):
        pytest.skip("imagecodecs is installed")
    Image.fromarray(stack(1, 64)[0]).save(tmp_path / "a.tif", compression="tiff_lzw")
    with pytest.raises(UserError, match="pip install imagecodecs"):
        read_frames(tmp_path / "a.tif")


def test_a_missing_source_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list_frames(tmp_path / "none.tif")
    with pytest.raises(UserError, match="no image"):
        list_frames(tmp_path)


TIFFS = {
    "tiles": {"tile": (16, 32)},
    "compressed tiles": {"tile": (32, 16), "compression": "zlib"},
    "strips": {"rowsperstrip": 5, "compression": "zlib"},
    "one strip": {"compression": "zlib", "predictor": 2},
}


@pytest.mark.parametrize("options", TIFFS.values(), ids=TIFFS)
@pytest.mark.parametrize("planes", ["grey", "rgb", "separate", "pages"])
def test_rows_of_a_tiff_are_read_by_its_strips_and_tiles(tmp_path, options, planes):
    if "predictor" in options:
        pytest.importorskip("imagecodecs")
    kinds = {"grey": "minisblack", "pages": "minisblack", "rgb": "rgb", "separate": "rgb"}
    pixels = RNG.integers(0, 999, (3, 45, 70, 1 if planes == "grey" else 3)).astype(np.uint16)
    stored = pixels[..., 0] if planes == "grey" else pixels
    more = {"planarconfig": "separate"} if planes == "separate" else {}
    if planes in ("separate", "pages"):
        stored = pixels.transpose(0, 3, 1, 2)
    if planes == "pages":
        more = {"metadata": {"axes": "ZCYX"}, "ome": True}
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric=kinds[planes], **options, **more)
    frames = read_frames(tmp_path / "a.tif")
    assert [frame.shape for frame in frames] == [(45, 70, pixels.shape[3])] * 3
    for frame, expected in zip(frames, pixels, strict=True):
        for rows in (slice(0, 5), slice(3, 20), slice(18, 45), slice(44, 99), slice(0, 45, 4)):
            assert np.array_equal(frame[rows], expected[rows])


def test_neighbours_stay_within_their_stack(tmp_path):
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
def test_neighbours_are_of_one_time(tmp_path, kind):
    times = stack(6, 8).reshape(2, 3, 8, 8)
    tifffile.imwrite(tmp_path / "a.tif", times, **{kind: True}, metadata={"axes": "TZYX"})
    around = with_neighbours(list_frames(tmp_path / "a.tif"), 1)
    numbers = [[frame.index for frame in frames] for frames in around]
    assert numbers == [[0, 0, 1], [0, 1, 2], [1, 2, 2], [3, 3, 4], [3, 4, 5], [4, 5, 5]]


@pytest.mark.parametrize("kind", ["imagej", "imagej, µm", "ome", "ome, nm", "baseline", "none"])
def test_the_size_of_a_pixel_is_read(tmp_path, kind):
    options = {
        "imagej": {"imagej": True, "resolution": (4, 2), "metadata": {"axes": "ZYX", "unit": "micron", "spacing": 3}},
        "imagej, µm": {"imagej": True, "resolution": (4, 2), "metadata": {"axes": "ZYX", "unit": "\\u00B5m"}},
        "ome": {"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}},
        "ome, nm": {
            "ome": True,
            "metadata": {"axes": "ZYX", "PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5},
        },
        "baseline": {"resolution": (40_000, 20_000), "resolutionunit": "CENTIMETER"},
        "none": {},
    }[kind]
    tifffile.imwrite(tmp_path / "a.tif", stack(2, 8), photometric="minisblack", **options)
    g = read_geometry(list_frames(tmp_path / "a.tif"))
    assert (g.axes, g.lengths) == ("Z", (2,))
    expected = {} if kind == "none" else {"X": 0.25, "Y": 0.5} | ({"Z": 3} if kind == "imagej" else {})
    assert g.pixel == expected and g.unit == ("" if kind == "none" else "micron")


def test_the_time_between_frames_and_their_names_are_read(tmp_path):
    pixels = stack(6, 8).reshape(3, 2, 8, 8)
    names = [f"{time} {channel}" for time in range(3) for channel in "ab"]
    imagej = {"axes": "TCYX", "finterval": 2.5, "Labels": names}
    tifffile.imwrite(tmp_path / "a.tif", pixels, imagej=True, metadata=imagej)
    geometry = read_geometry(list_frames(tmp_path / "a.tif"))
    assert (geometry.axes, geometry.interval, geometry.labels) == ("T", 2.5, ("0 a", "1 a", "2 a"))
    ome = {"axes": "TCYX", "TimeIncrement": 250, "TimeIncrementUnit": "ms"}
    tifffile.imwrite(tmp_path / "b.ome.tif", pixels, metadata=ome)
    assert read_geometry(list_frames(tmp_path / "b.ome.tif")).interval == 0.25
    axes = [{"name": "t", "unit": "minute"}, {"name": "c"}, {"name": "y"}, {"name": "x"}]
    write_zarr(tmp_path / "c.zarr", pixels, [{"axes": axes, "datasets": [{"path": "0"} | scale(0.5, 1, 2, 2)]}])
    geometry = read_geometry(list_frames(tmp_path / "c.zarr", (".zarr",)))
    assert (geometry.interval, geometry.pixel, geometry.labels) == (30, {"Y": 2, "X": 2}, ())


@pytest.mark.parametrize("size", ["abc", "0", "-1", "nan", "inf", "1</OME>"])
@pytest.mark.parametrize("text", ["ImageJ=1.53t\nimages=2\nslices=2\nunit=1\nspacing={}\n", OME])
def test_a_size_that_is_none_is_left_out(tmp_path, text, size):
    tifffile.imwrite(
        tmp_path / "a.tif", stack(2, 8), photometric="minisblack", description=text.format(size), metadata=None
    )
    g = read_geometry(list_frames(tmp_path / "a.tif"))
    assert "Z" not in g.pixel and g.unit in ("", "1")


def test_complex_pixels_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", stack(2).astype(np.complex64))
    with pytest.raises(UserError, match="pixels of complex64"):
        list_frames(tmp_path / "a.tif")


@pytest.mark.parametrize(("tag", "place", "value"), [(277, 8, 3), (323, 8, 0), (296, 2, 2), (296, 2, 7), (282, 8, 0)])
def test_a_damaged_tag_is_one_line_or_does_no_harm(tmp_path, tag, place, value):
    tifffile.imwrite(tmp_path / "a.tif", stack(2), tile=(16, 16), compression="zlib", resolution=(4, 4))
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tif:
        offset = tif.pages[0].tags[tag].offset
    damaged = bytearray((tmp_path / "a.tif").read_bytes())
    damaged[offset + place : offset + place + 2] = value.to_bytes(2, "little")
    (tmp_path / "a.tif").write_bytes(damaged)
    try:
        frames = list_frames(tmp_path / "a.tif")
        read_geometry(frames)
        assert frames[0].read().shape == (32, 32, 1)
    except UserError as error:
        assert str(tmp_path / "a.tif") in str(error) and "\n" not in str(error)


def write_zarr(path, pixels, scales, version=3):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(path, mode="w", zarr_format=version)
    group.create_array("0", data=pixels)
    group.attrs.update({"ome": {"multiscales": scales}} if version == 3 else {"multiscales": scales})


def scale(*factors):
    return {"coordinateTransformations": [{"type": "scale", "scale": factors}]}


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
    frames = list_frames(tmp_path / "a.zarr", (".zarr",))
    g = read_geometry(frames)
    assert [frame.read().shape for frame in frames] == [(32, 32, 1)] * 3
    if transforms is SCALE:
        assert (g.pixel, g.unit) == ({"Z": 1, "Y": 0.5, "X": 0.5}, "micron")


def test_the_only_image_in_a_zarr_group_is_taken_and_several_are_named(tmp_path):
    zarr = pytest.importorskip("zarr")
    image = {"axes": [{"name": "y"}, {"name": "x"}], "datasets": [{"path": "0"}]}
    zarr.open_group(tmp_path / "a.zarr", mode="w").attrs["ome"] = {"bioformats2raw.layout": 3}
    write_zarr(tmp_path / "a.zarr" / "0", stack(1)[0], [image])
    assert read_frames(tmp_path / "a.zarr")[0].shape == (32, 32, 1)
    write_zarr(tmp_path / "a.zarr" / "1", stack(1)[0], [image])
    with pytest.raises(UserError, match=r"not one OME-Zarr image: name one .*a\.zarr/0, .*a\.zarr/1"):
        list_frames(tmp_path / "a.zarr", (".zarr",))


def test_a_damaged_chunk_of_a_zarr_is_named(tmp_path):
    zarr = pytest.importorskip("zarr")
    zarr.create_array(tmp_path / "a.zarr", data=stack(2), chunks=(1, 32, 32))
    chunk = tmp_path / "a.zarr" / "c" / "1" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    first, second = list_frames(tmp_path / "a.zarr", (".zarr",))
    assert first.read().shape == (32, 32, 1)
    with pytest.raises(UserError, match="Z 1: damaged chunk"):
        second.read()


@pytest.mark.parametrize(
    ("pixels", "axes"),
    [(stack(1, 8)[0, 0], None), (stack(2, 8).astype(complex), None), (stack(2, 8), "yx"), (stack(2, 8), "zab")],
)
def test_a_zarr_that_is_no_image_is_refused(tmp_path, pixels, axes):
    zarr = pytest.importorskip("zarr")
    if axes:
        named = [{"name": axis} for axis in axes]
        write_zarr(tmp_path / "a.zarr", pixels, [{"axes": named, "datasets": [{"path": "0"}]}])
    else:
        zarr.create_array(tmp_path / "a.zarr", data=pixels)
    with pytest.raises(UserError, match="must be numbers along Y and X"):
        list_frames(tmp_path / "a.zarr", (".zarr",))


@pytest.mark.parametrize("compression", ["jpeg", "lzw", "zstd", "webp", "jpeg2000"])
@pytest.mark.parametrize("colour", ["minisblack", "rgb"])
def test_pages_of_any_compression_are_read_by_rows(tmp_path, compression, colour):
    pytest.importorskip("imagecodecs")
    if (compression, colour) == ("webp", "minisblack"):
        pytest.skip("WebP has colours only")
    pixels = np.tile(np.arange(96, dtype=np.uint8)[:, None], (3, 1, 64)) * 2
    pixels = np.stack([pixels] * 3, axis=-1) if colour == "rgb" else pixels
    options = {"photometric": colour, "compression": compression, "tile": (32, 32)}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    expected = tifffile.imread(tmp_path / "a.tif").reshape(3, 96, 64, -1)
    for frame, pixels in zip(read_frames(tmp_path / "a.tif"), expected, strict=True):
        assert np.array_equal(frame[20:70], pixels[20:70]) and np.array_equal(frame[:], pixels)


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
def test_neighbours_are_along_z_alone(tmp_path, axes, shape, expected, kind):
    pixels = RNG.integers(0, 255, (*shape, 8, 9)).astype(np.uint8)
    if kind == "zarr":
        named = [{"name": axis} for axis in axes.lower()]
        write_zarr(tmp_path / "a.zarr", pixels, [{"axes": named, "datasets": [{"path": "0"}]}])
    else:
        tifffile.imwrite(tmp_path / "a.ome.tif", pixels, metadata={"axes": axes})
    assert numbers(next(tmp_path.iterdir())) == expected


def test_neighbours_are_of_one_position_but_pages_written_one_by_one_are_a_stack(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tif:
        for _ in range(2):
            tif.write(stack(3, 8), metadata={"axes": "ZYX"}, photometric="minisblack")
    assert numbers(tmp_path / "a.ome.tif") == BY_TIME
    for name, metadata in (("b.tif", None), ("c.tif", {})):
        with tifffile.TiffWriter(tmp_path / name) as tif:
            for page in stack(3, 8):
                tif.write(page, photometric="minisblack", metadata=metadata)
        assert numbers(tmp_path / name) == BY_TIME[:3]


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_where_white_is_zero_the_picture_is_no_negative(tmp_path, dtype, options):
    pixels = stack(2, 8, dtype)
    top = {np.uint8: 255, np.uint16: 65535, np.int16: -1, np.float32: 0}[dtype]
    tifffile.imwrite(tmp_path / "a.tif", (top - pixels).astype(dtype), photometric="miniswhite", **options)
    assert np.array_equal(np.stack([frame[:] for frame in read_frames(tmp_path / "a.tif")])[..., 0], pixels)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "group3", "group4"])
def test_one_bit_is_0_and_255_whatever_the_compression(tmp_path, compression):
    pytest.importorskip("imagecodecs")
    mask = stack(1, 40)[0] > 99
    Image.fromarray(mask).save(tmp_path / "a.tif", compression=compression)
    tifffile.imwrite(tmp_path / "b.tif", ~mask, photometric="miniswhite")
    for name in ("a.tif", "b.tif"):
        assert np.array_equal(list_frames(tmp_path / name)[0].read()[..., 0], mask * np.uint8(255))


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("colour", "samples", "extra", "kept"),
    [
        ("minisblack", 2, None, [0, 1]),
        ("minisblack", 2, [2], [0]),
        ("minisblack", 4, None, [0, 1, 2, 3]),
        ("rgb", 4, [0], [0, 1, 2, 3]),
        ("rgb", 4, [1], [0, 1, 2]),
        ("rgb", 5, [2, 0], [0, 1, 2, 4]),
    ],
)
def test_only_what_the_file_calls_alpha_is_dropped(tmp_path, colour, samples, extra, kept, compression, planar):
    pixels = RNG.integers(0, 255, (8, 9, samples)).astype(np.uint8)
    stored = pixels if planar == "contig" else pixels.transpose(2, 0, 1)
    options = {"photometric": colour, "extrasamples": extra, "planarconfig": planar, "compression": compression}
    tifffile.imwrite(tmp_path / "a.tif", stored, **options)
    assert np.array_equal(list_frames(tmp_path / "a.tif")[0].read(), pixels[..., kept])


def test_inks_become_the_colours_that_pillow_makes_of_them(tmp_path):
    inks = Image.fromarray(RNG.integers(0, 255, (16, 16, 4)).astype(np.uint8), "CMYK")
    for name in ("a.tif", "a.jpg"):
        inks.save(tmp_path / name)
        expected = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert np.array_equal(list_frames(tmp_path / name)[0].read(), expected)
    tifffile.imwrite(tmp_path / "b.tif", np.asarray(inks).astype(np.uint16) * 257, photometric="separated")
    expected = np.asarray(inks.convert("RGB")).astype(float) * 257
    assert np.abs(list_frames(tmp_path / "b.tif")[0].read() - expected).max() < 257


@pytest.mark.parametrize("kind", ["png", "jpeg2k"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_picture_in_16_bits_keeps_them(tmp_path, channels, kind):
    codecs = pytest.importorskip("imagecodecs")
    pixels = RNG.integers(0, 65535, (8, 9, channels)).astype(np.uint16)
    options = {"reversible": True} if kind == "jpeg2k" else {}
    (tmp_path / "a.png").write_bytes(getattr(codecs, f"{kind}_encode")(np.squeeze(pixels), **options))
    frame = list_frames(tmp_path / "a.png")[0]
    assert frame.open().dtype == np.uint16
    assert np.array_equal(frame.read(), pixels[..., : {2: 1, 4: 3}.get(channels, channels)])


def test_a_png_in_16_bits_names_the_package_that_it_needs(tmp_path, monkeypatch):
    codecs = pytest.importorskip("imagecodecs")
    (tmp_path / "a.png").write_bytes(codecs.png_encode(np.zeros((8, 9, 3), np.uint16)))
    monkeypatch.setitem(__import__("sys").modules, "imagecodecs", None)
    with pytest.raises(UserError, match="pip install imagecodecs"):
        list_frames(tmp_path / "a.png")


@pytest.mark.parametrize("ending", ["png", "webp", "gif"])
def test_several_images_in_one_picture_are_refused(tmp_path, ending):
    first, *others = (Image.fromarray(page).convert("RGB") for page in stack(3, 8))
    first.save(tmp_path / f"a.{ending}", save_all=True, append_images=others)
    with pytest.raises(UserError, match="3 images in one file"):
        list_frames(tmp_path / f"a.{ending}")


@pytest.mark.parametrize("name", ["a.lsm", "a.stk", "a.btf", "a.qptiff", "a.weird", "a", "a.png", "a.npy"])
@pytest.mark.parametrize("options", [{}, {"byteorder": ">"}, {"bigtiff": True}, {"bigtiff": True, "byteorder": ">"}])
def test_a_tiff_is_known_by_its_first_bytes(tmp_path, name, options):
    pixels = stack(3, 8)
    tifffile.imwrite(tmp_path / name, pixels, photometric="minisblack", **options)
    assert np.array_equal(np.stack(read_frames(tmp_path / name))[..., 0], pixels)
    if name not in ("a", "a.weird"):
        assert len(list_frames(tmp_path)) == 3


def test_arrays_and_pictures_are_known_by_their_first_bytes(tmp_path):
    with (tmp_path / "a.tif").open("wb") as file:
        np.save(file, stack(2, 8))
    Image.fromarray(stack(1, 8)[0]).save(tmp_path / "b.tif", format="png")
    assert [frame.path.name for frame in list_frames(tmp_path)] == ["a.tif", "a.tif", "b.tif"]


def write_in_files(folder, num=3, compression=None, count=' PlaneCount="1"'):
    """An OME-TIFF whose sections lie in a file each."""
    pixels, uuids = stack(num, 16), [f"urn:uuid:00000000-0000-0000-0000-{number:012d}" for number in range(num)]
    data = "".join(
        f'<TiffData FirstZ="{z}" IFD="0"{count}><UUID FileName="z{z}.ome.tif">{uuid}</UUID></TiffData>'
        for z, uuid in enumerate(uuids)
    )
    for z, uuid in enumerate(uuids):
        text = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuid}"><Image ID="Image:0"><Pixels '
            f'ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="16" SizeY="16" SizeZ="{num}" SizeC="1" '
            f'SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>{data}</Pixels></Image></OME>'
        )
        options = {"metadata": None, "compression": compression, "photometric": "minisblack"}
        tifffile.imwrite(folder / f"z{z}.ome.tif", pixels[z], description=text, **options)
    return pixels


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_an_image_in_several_files_is_read_from_each_and_once(tmp_path, compression):
    pixels = write_in_files(tmp_path, compression=compression)
    for source in (tmp_path / "z1.ome.tif", tmp_path):
        frames = list_frames(source)
        assert np.array_equal(np.stack([frame.read() for frame in frames])[..., 0], pixels)
        assert read_geometry(frames).axes == "Z"
        assert {path.name for path in files_of(frames)} == {"z0.ome.tif", "z1.ome.tif", "z2.ome.tif"}
    (tmp_path / "z2.ome.tif").unlink()
    os.utime(tmp_path / "z0.ome.tif", (0, 0))  # what was read of it is kept until it changes
    with pytest.raises(UserError, match=r"1 of 3 pages are missing: put z2\.ome\.tif beside it"):
        list_frames(tmp_path / "z0.ome.tif")


def test_a_part_of_an_image_that_does_not_count_its_pages_names_the_missing_file(tmp_path):
    write_in_files(tmp_path, count="")
    assert len(list_frames(tmp_path)) == 3
    (tmp_path / "z0.ome.tif").unlink()
    with pytest.raises(UserError, match=r"put z0\.ome\.tif beside it"):
        list_frames(tmp_path / "z1.ome.tif")


def test_threads_that_read_a_broken_file_disturb_no_others(tmp_path):
    for name in ("good.tif", "bad.tif"):
        tifffile.imwrite(tmp_path / name, stack(3, 8), photometric="minisblack", metadata=None)
    data = (tmp_path / "bad.tif").read_bytes()
    (tmp_path / "bad.tif").write_bytes(data[:-300])
    results = {"good": [], "bad": []}

    def read(name):
        for number in range(25):
            os.utime(tmp_path / f"{name}.tif", ns=(0, 1000 * number + threading.get_native_id()))
            try:
                results[name].append(len(list_frames(tmp_path / f"{name}.tif")))
            except UserError:
                results[name].append("refused")

    threads = [threading.Thread(target=read, args=(name,)) for name in ("good", "bad") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"good": [3] * 75, "bad": ["refused"] * 75}


def test_of_a_slide_the_image_is_taken_at_its_full_size(tmp_path):
    pixels, plain = RNG.integers(0, 255, (64, 64, 3)).astype(np.uint8), {"photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(tmp_path / "slide.tif") as tif:
        tif.write(pixels, tile=(32, 32), description="Aperio Image Library v10", **plain)
        tif.write(pixels[:20, :30], description="Aperio Image Library v10", **plain)
        tif.write(pixels[::2, ::2], tile=(32, 32), description="Aperio Image Library v10", **plain)
        for kind, subfile in (("label", 1), ("macro", 9)):
            tif.write(pixels[:9, :9], description=f"Aperio {kind}", subfiletype=subfile, **plain)
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as tif:
        tif.write(pixels, subifds=1, tile=(32, 32), photometric="rgb")
        tif.write(pixels[::2, ::2], subfiletype=1, tile=(32, 32), photometric="rgb")
        tif.write(pixels[:9, :7], subfiletype=1, photometric="rgb")
    for name in ("slide.tif", "pyramid.tif"):
        (frame,) = list_frames(tmp_path / name)
        assert np.array_equal(frame.read(), pixels)


def png(width, height, data=b"", bits=8):
    """A grey PNG whose header says a size and whose data are any."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_large_png_is_read_and_one_that_can_not_be_so_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns above, and refuses twice as many
    pixels = stack(1, 64)[0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(list_frames(tmp_path / "a.png")[0].read()[..., 0], pixels)
    assert Image.MAX_IMAGE_PIXELS == 100
    (tmp_path / "a.png").write_bytes(png(60_000, 60_000, zlib.compress(bytes(10**6))))
    with pytest.raises(UserError, match=r"3.6 GB of pixels can't be in \d+ bytes"):
        list_frames(tmp_path / "a.png")


def test_what_does_not_fit_in_memory_is_refused_before_it_is_allocated(tmp_path):
    whole = tmp_path / "a.tif"
    tifffile.imwrite(whole, stack(1)[0], photometric="minisblack", compression="zlib", metadata=None)
    data = whole.read_bytes()
    for tag in (256, 257, 278):  # width, height, rows of a strip
        entry = data.index(struct.pack("<HH", tag, 4) if tag < 258 else struct.pack("<H", tag)) + 8
        data = data[:entry] + struct.pack("<I", 10**6) + data[entry + 4 :]
    whole.write_bytes(data)
    with pytest.raises(UserError, match="GB"):
        list_frames(whole)[0].read()


def test_channels_among_the_pages_are_mapped_and_not_copied(tmp_path):
    pixels = RNG.integers(0, 255, (2, 3, 4, 8, 9)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, metadata={"axes": "TCZYX"})
    images = read_frames(tmp_path / "a.ome.tif")
    assert all(isinstance(image, np.memmap) for image in images)
    assert np.array_equal(np.stack(images), pixels.transpose(0, 2, 3, 4, 1).reshape(8, 8, 9, 3))


def test_a_picture_is_decoded_once_and_only_when_its_pixels_are_asked_for(tmp_path, monkeypatch):
    for number in range(6):
        Image.fromarray(stack(1, 16)[0]).save(tmp_path / f"{number}.png")
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.filename) or load(self))
    frames = list_frames(tmp_path)
    assert [frame.open().shape for frame in frames] == [(16, 16, 1)] * 6
    assert not decoded
    for frame in frames * 2:
        assert np.array_equal(frame.open()[3:9], frame.read()[3:9])
    assert len({*decoded}) == 6 and len(decoded) <= 12  # Pillow calls it twice


def test_a_chunk_that_sections_share_is_decoded_once(tmp_path):
    zarr = pytest.importorskip("zarr")
    pixels = RNG.integers(0, 255, (10, 20, 30)).astype(np.uint16)
    array = zarr.create_array(tmp_path / "a.zarr", shape=pixels.shape, chunks=(4, 8, 16), dtype="uint16")
    array[:] = pixels
    frames = list_frames(tmp_path / "a.zarr", (".zarr",))
    assert np.array_equal(np.stack([frame.read()[..., 0] for frame in frames]), pixels)
    frames = list_frames(tmp_path / "a.zarr", (".zarr",))
    assert np.array_equal(frames[0].open()[3:13][..., 0], pixels[0, 3:13])
    shutil.rmtree(tmp_path / "a.zarr" / "c" / "0")
    assert np.array_equal(frames[2].open()[5:16][..., 0], pixels[2, 5:16])


def test_pipes_devices_and_folders_are_refused_and_not_opened(tmp_path):
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


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"shape":[3,', '"shape":[1000000000,', "claims 1000000000 images"),
        ('"chunk_shape":[3,32,32]', '"chunk_shape":[3,100000,100000]', "a chunk: 30 GB"),
    ],
)
def test_a_zarr_that_claims_too_much_is_refused(tmp_path, old, new, reason):
    zarr = pytest.importorskip("zarr")
    zarr.create_array(tmp_path / "a.zarr", data=stack(3), chunks=(3, 32, 32))
    text = "".join((tmp_path / "a.zarr" / "zarr.json").read_text().split())
    assert old in text
    (tmp_path / "a.zarr" / "zarr.json").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=reason):
        list_frames(tmp_path / "a.zarr", (".zarr",))


def test_a_chunk_that_claims_more_than_its_size_is_refused_before_it_is_decoded(tmp_path):
    zarr = pytest.importorskip("zarr")
    codecs = pytest.importorskip("numcodecs")
    array = zarr.create_array(tmp_path / "a.zarr", data=stack(1)[0], compressors=zarr.codecs.ZstdCodec())
    assert array.chunks == (32, 32)
    bomb = codecs.Zstd(1).encode(bytes(10**8))
    next(path for path in (tmp_path / "a.zarr" / "c").rglob("*") if path.is_file()).write_bytes(bomb)
    frame = list_frames(tmp_path / "a.zarr", (".zarr",))[0]
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="damaged chunk"):
            frame.read()
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_an_array_whose_header_is_too_long_is_one_line_without_numpys_advice(tmp_path):
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_2_0(file, {"descr": "|u1", "fortran_order": False, "shape": (1,) * 5000})
    with pytest.raises(UserError) as refused:
        list_frames(tmp_path / "a.npy")
    assert "\n" not in str(refused.value) and "pickle" not in str(refused.value)


def test_types_are_named_in_words(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 2, 2, 2, 2), ">u2"))
    with pytest.raises(UserError, match="of uint16"):
        list_frames(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.arange(12, dtype=">u2").reshape(3, 4))
    (frame,) = list_frames(tmp_path / "b.npy")
    assert frame.read().dtype == np.uint16 and frame.read()[2, 3, 0] == 11


def test_patterns_name_folders_too_and_folders_that_exist_are_no_patterns(tmp_path):
    for folder in ("a", "b", "b/c", "d[1]*"):
        (tmp_path / folder).mkdir()
        Image.fromarray(stack(1, 8)[0]).save(tmp_path / folder / "im.png")

    def names(pattern):
        return [str(frame.path.relative_to(tmp_path).parent) for frame in list_frames(f"{tmp_path}/{pattern}")]

    assert names("d[1]*") == names("d[1]*/im.png") == names("d[1]*/*.png") == ["d[1]*"]
    assert names("*/im.png") == ["a", "b", "d[1]*"]
    assert names("**/*.png") == ["a", "b/c", "b", "d[1]*"]
    with pytest.raises(UserError, match="no image"):
        names("[xyz]/*.png")


def test_two_links_to_one_file_are_two_images(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", stack(1, 8)[0])
    (tmp_path / "b.tif").symlink_to("a.tif")
    assert len(list_frames(tmp_path)) == 2


def test_several_sources_are_read_in_natural_order_and_urls_are_not_read(tmp_path):
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
        for place in rng.integers(0, min(len(data), 400), 3):
            flipped[place] = rng.integers(256)
        yield bytes(flipped)


@pytest.mark.parametrize("kind", ["plain.tif", "tiles.tif", "a.png", "a.npy", "zarr.json", "chunk"])
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, kind):
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
            for frame in list_frames(path, (".zarr",)):
                frame.read()
        except UserError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)
