import importlib.util

import numpy as np
import pytest
import tifffile
from PIL import Image

from images import Frame, list_frames, read_frames, read_geometry, with_neighbours
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
        read_frames(tmp_path / "a.png")


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
