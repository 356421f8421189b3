import importlib.util
import os
import threading

import numpy as np
import pytest
import tifffile
from PIL import Image
from samples import RNG, read_frames, stack

from images.readers import files_of, list_frames, read_geometry
from utils import UserError


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


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.9, 0.97])
def test_a_truncated_tiff_is_refused_wherever_it_ends(tmp_path, compression, fraction):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stack(10), photometric="minisblack", compression=compression)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(UserError, match=r"a\.tif"):
        read_frames(path)


def test_a_compression_that_needs_a_package_names_it(tmp_path):
    if importlib.util.find_spec("imagecodecs"):
        pytest.skip("imagecodecs is installed")
    Image.fromarray(stack(1, 64)[0]).save(tmp_path / "a.tif", compression="tiff_lzw")
    with pytest.raises(UserError, match="pip install imagecodecs"):
        read_frames(tmp_path / "a.tif")


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


@pytest.mark.parametrize("name", ["a.lsm", "a.stk", "a.btf", "a.qptiff", "a.weird", "a", "a.png", "a.npy"])
@pytest.mark.parametrize("options", [{}, {"byteorder": ">"}, {"bigtiff": True}, {"bigtiff": True, "byteorder": ">"}])
def test_a_tiff_is_known_by_its_first_bytes(tmp_path, name, options):
    pixels = stack(3, 8)
    tifffile.imwrite(tmp_path / name, pixels, photometric="minisblack", **options)
    assert np.array_equal(np.stack(read_frames(tmp_path / name))[..., 0], pixels)
    if name not in ("a", "a.weird"):
        assert len(list_frames(tmp_path)) == 3


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
    with pytest.raises(UserError, match=r"1 of 3 pages are missing: put z2\.ome\.tif next to it"):
        list_frames(tmp_path / "z0.ome.tif")


def test_a_part_of_an_image_that_does_not_count_its_pages_names_the_missing_file(tmp_path):
    write_in_files(tmp_path, count="")
    assert len(list_frames(tmp_path)) == 3
    (tmp_path / "z0.ome.tif").unlink()
    with pytest.raises(UserError, match=r"put z0\.ome\.tif next to it"):
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


def test_channels_among_the_pages_are_mapped_and_not_copied(tmp_path):
    pixels = RNG.integers(0, 255, (2, 3, 4, 8, 9)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, metadata={"axes": "TCZYX"})
    images = read_frames(tmp_path / "a.ome.tif")
    assert all(isinstance(image, np.memmap) for image in images)
    assert np.array_equal(np.stack(images), pixels.transpose(0, 2, 3, 4, 1).reshape(8, 8, 9, 3))
