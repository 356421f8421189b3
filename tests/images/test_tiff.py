import importlib.util
import os
import struct
import threading

import numpy as np
import pytest
import tifffile
from examples import RNG, read_frames, stack
from PIL import Image, ImageCms, TiffImagePlugin

from images.layout import Layout
from images.readers import files_of, list_frames, read_geometry, with_neighbours
from images.selection import Choice
from utils import UserError


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.float32, np.float64, ">u2"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_stack_keeps_its_type_and_pixels(tmp_path, dtype, compression):
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
def test_pages_are_no_colours_if_there_are_three_or_four(tmp_path, num, size):
    tifffile.imwrite(tmp_path / "a.tif", stack(num, size), photometric="minisblack")
    assert [frame.read().shape for frame in list_frames(tmp_path / "a.tif")] == [(size, size, 1)] * num


@pytest.mark.parametrize(("channels", "num_colour"), [(3, 3), (4, 3)])
def test_rgb_keeps_its_channels_and_drops_alpha(tmp_path, channels, num_colour):
    pixels = RNG.integers(0, 255, (2, 8, 9, channels)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    assert np.array_equal(np.stack(read_frames(tmp_path / "a.tif")), pixels[..., :num_colour])
    assert np.array_equal(read_frames(tmp_path / "a.png")[0], pixels[0, ..., :num_colour])


def test_imagej_hyperstack_has_its_channels_last(tmp_path):
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
def test_truncated_tiff_is_refused_wherever_it_ends(tmp_path, compression, fraction):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stack(10), photometric="minisblack", compression=compression)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(UserError, match=r"a\.tif"):
        read_frames(path)


def test_tiff_without_pages_is_refused_as_such(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II*\0" + bytes(4))
    with pytest.raises(UserError, match=r"a\.tif: holds no page with pixels"):
        list_frames(tmp_path / "a.tif")


def test_compression_that_needs_a_package_names_it(tmp_path):
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
        for rows in (slice(0, 5), slice(3, 20), slice(18, 45), slice(44, 99), slice(0, 45, 4), slice(9, 9)):
            assert np.array_equal(frame[rows], expected[rows])


@pytest.mark.parametrize(("tag", "field", "value"), [(277, 8, 3), (323, 8, 0), (296, 2, 2), (296, 2, 7), (282, 8, 0)])
def test_damaged_tag_is_one_line_or_does_no_harm(tmp_path, tag, field, value):
    tifffile.imwrite(tmp_path / "a.tif", stack(2), tile=(16, 16), compression="zlib", resolution=(4, 4))
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tif:
        offset = tif.pages[0].tags[tag].offset
    damaged = bytearray((tmp_path / "a.tif").read_bytes())
    damaged[offset + field : offset + field + 2] = value.to_bytes(2, "little")
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
def test_white_is_zero_gives_no_negative(tmp_path, dtype, options):
    pixels = stack(2, 8, dtype)
    top = {np.uint8: 255, np.uint16: 65535, np.int16: -1, np.float32: 0}[dtype]
    tifffile.imwrite(tmp_path / "a.tif", (top - pixels).astype(dtype), photometric="miniswhite", **options)
    assert np.array_equal(np.stack([frame[:] for frame in read_frames(tmp_path / "a.tif")])[..., 0], pixels)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "group3", "group4"])
def test_bilevel_is_0_and_255_whatever_the_compression(tmp_path, compression):
    pytest.importorskip("imagecodecs")
    mask = stack(1, 40)[0] > 99
    Image.fromarray(mask).save(tmp_path / "a.tif", compression=compression)
    tifffile.imwrite(tmp_path / "b.tif", ~mask, photometric="miniswhite")
    for name in ("a.tif", "b.tif"):
        assert np.array_equal(list_frames(tmp_path / name)[0].read()[..., 0], mask * np.uint8(255))


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("colour", "samples", "extra", "left"),
    [
        ("minisblack", 2, None, [0, 1]),
        ("minisblack", 2, [2], [0]),
        ("minisblack", 4, None, [0, 1, 2, 3]),
        ("rgb", 4, [0], [0, 1, 2, 3]),
        ("rgb", 4, [1], [0, 1, 2]),
        ("rgb", 5, [2, 0], [0, 1, 2, 4]),
    ],
)
def test_alpha_is_dropped_and_no_other_sample(tmp_path, colour, samples, extra, left, compression, planar):
    pixels = RNG.integers(0, 255, (8, 9, samples)).astype(np.uint8)
    stored = pixels if planar == "contig" else pixels.transpose(2, 0, 1)
    options = {"photometric": colour, "extrasamples": extra, "planarconfig": planar, "compression": compression}
    tifffile.imwrite(tmp_path / "a.tif", stored, **options)
    assert np.array_equal(list_frames(tmp_path / "a.tif")[0].read(), pixels[..., left])


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
def test_tiff_is_recognised_by_its_first_bytes(tmp_path, name, options):
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
def test_ome_image_in_several_files_is_read_from_each_and_once(tmp_path, compression):
    pixels = write_in_files(tmp_path, compression=compression)
    for source in (tmp_path / "z1.ome.tif", tmp_path):
        frames = list_frames(source)
        assert np.array_equal(np.stack([frame.read() for frame in frames])[..., 0], pixels)
        assert read_geometry(frames).axes == "Z"
        assert {path.name for path in files_of(frames)} == {"z0.ome.tif", "z1.ome.tif", "z2.ome.tif"}
    (tmp_path / "z2.ome.tif").unlink()
    os.utime(tmp_path / "z0.ome.tif", (0, 0))  # what was read of it stays in the cache until it changes
    with pytest.raises(UserError, match=r"1 of 3 images are missing: put z2\.ome\.tif next to it"):
        list_frames(tmp_path / "z0.ome.tif")


def test_ome_part_that_does_not_count_its_pages_names_the_missing_file(tmp_path):
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


def test_slide_is_read_at_its_full_size_without_label_and_macro(tmp_path):
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


def aborted(path, axes, shape, claimed, compression=None):
    """An OME-TIFF of random pages whose description claims more of them along its first axis, and the pages."""
    pixels = stack(int(np.prod(shape)), 16).reshape(*shape, 16, 16)
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata={"axes": axes}, compression=compression)
    size, num = f'Size{axes[0]}="{shape[0]}"', f'PlaneCount="{np.prod(shape)}"'
    data = path.read_bytes().replace(size.encode(), f'Size{axes[0]}="{claimed}"'.encode())
    path.write_bytes(data.replace(num.encode(), b'PlaneCount="9"'))
    return pixels


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_aborted_ome_tiff_is_refused_but_its_planes_are_read_by_section(tmp_path, capsys, compression):
    pixels = aborted(tmp_path / "z.ome.tif", "ZYX", (6,), 9, compression)
    with pytest.raises(UserError, match=r"3 of 9 images are missing: .* by --section 0-5$"):
        list_frames(tmp_path / "z.ome.tif")
    frames = list_frames(tmp_path / "z.ome.tif", Choice(section="2-5"))
    assert np.array_equal(np.stack([frame.read() for frame in frames])[..., 0], pixels[2:])
    assert capsys.readouterr().out == f"note: {tmp_path}/z.ome.tif: 3 of 9 images are missing and left out\n"
    assert [frame.index for frame in with_neighbours(frames, 1)[-1]] == [4, 5, 5]
    with pytest.raises(UserError, match="images are missing"):
        list_frames(tmp_path / "z.ome.tif", Choice(section="6:"))
    times = aborted(tmp_path / "t.ome.tif", "TZCYX", (1, 3, 2), 2, compression)
    frames = list_frames(tmp_path / "t.ome.tif", Choice(section=":"))
    assert np.array_equal(np.stack([frame.read() for frame in frames]), times[0].transpose(0, 2, 3, 1))
    assert read_geometry(frames).axes == "TZ"


def test_messages_of_tifffile_are_one_line_of_ours(tmp_path, capsys):
    for number in range(3):
        path = tmp_path / f"{number}.ome.tif"
        tifffile.imwrite(path, stack(6, 8), photometric="minisblack", metadata={"axes": "ZYX"})
        path.write_bytes(path.read_bytes().replace(b"</Pixels>", b"         "))
    assert len(list_frames(tmp_path)) == 18
    (line,) = capsys.readouterr().out.splitlines()
    assert "0.ome.tif and 2 more file(s): tifffile says: OME series raised ParseError" in line
    assert "each of its pages is an image of one channel" in line


def test_pages_that_are_taken_for_lower_resolutions_are_told(tmp_path, capsys):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        for size in (64, 32):
            tif.write(stack(1, size)[0], photometric="minisblack", metadata=None)
    assert len(list_frames(tmp_path / "a.tif")) == 1
    assert "a.tif: the page(s) of 32 x 32 px are taken for lower resolutions" in capsys.readouterr().out


@pytest.mark.parametrize("axes", ["RZYX", "ZPYX"])
@pytest.mark.parametrize("ome", [False, True])
def test_positions_are_series_and_no_sections(tmp_path, axes, ome):
    pixels = stack(6, 8).reshape(2, 3, 8, 8)  # two positions of three sections
    stored = pixels if axes[0] == "R" else pixels.transpose(1, 0, 2, 3)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", metadata={"axes": axes}, ome=ome)
    frames = list_frames(tmp_path / "a.tif")
    assert np.array_equal(np.stack([frame.read() for frame in frames])[..., 0], pixels.reshape(6, 8, 8))
    position = axes.strip("ZYX")
    assert [frame.series.split()[-1] for frame in frames] == [f"{position}0"] * 3 + [f"{position}1"] * 3
    g = read_geometry(frames)
    assert (g.axes, g.lengths, read_geometry(frames[:3]).axes) == ("PZ", (2, 3), "Z")
    assert Layout((6, 1, 8, 8), np.dtype("uint8"), g, order="TZC").lead == {"T": 2, "Z": 3}
    assert Layout((6, 1, 8, 8), np.dtype("uint8"), g).lead == {"P": 2, "Z": 3}
    assert len(list_frames(tmp_path / "a.tif", Choice(series="1", section="2"))) == 1


SMOOTH = np.stack(np.meshgrid(np.arange(40) * 5, np.arange(30) * 7, [20, 60, 150]), -1)[..., 0, :].astype(np.uint8)
SMOOTH[..., 2] = 90 + SMOOTH[..., 0] // 3


@pytest.mark.parametrize(
    ("mode", "compression"),
    [("YCbCr", "raw"), ("YCbCr", "tiff_lzw"), ("YCbCr", "jpeg"), ("LAB", "raw"), ("LAB", "tiff_lzw")],
)
def test_colours_of_other_spaces_become_red_green_and_blue(tmp_path, mode, compression):
    image = Image.fromarray(SMOOTH)
    if mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    image = image.convert("YCbCr") if mode == "YCbCr" else image
    image.save(tmp_path / "a.tif", compression=compression, save_all=True, append_images=[image.transpose(1)])
    for frame, expected in zip(read_frames(tmp_path / "a.tif"), (SMOOTH, SMOOTH[::-1]), strict=True):
        assert np.abs(frame[:].astype(int) - expected).mean() <= 2  # stored as RGB they differ by 50
        assert np.array_equal(frame[5:9], frame[:][5:9])


@pytest.mark.parametrize("photometric", [8, 9, 32845])
def test_colours_that_nothing_converts_are_named(tmp_path, photometric):
    tifffile.imwrite(tmp_path / "a.tif", SMOOTH.astype(np.uint16), photometric="rgb")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tif:
        tif.pages[0].tags[262].overwrite(photometric)
    with pytest.raises(UserError, match=r"a\.tif: (CIELAB|ICCLAB|LogLuv) colours, which .* convert it to an RGB TIFF"):
        list_frames(tmp_path / "a.tif")


def write_subsampled(path, compression):
    """A YCbCr TIFF with one blue and one red difference for each 2 x 2 px, which no package writes uncompressed."""
    y, cb, cr = np.moveaxis(np.asarray(Image.fromarray(SMOOTH).convert("YCbCr")), -1, 0)
    units = y.reshape(15, 2, 20, 2).transpose(0, 2, 1, 3).reshape(15, 20, 4)
    units = np.concatenate([units, cb[::2, ::2, None], cr[::2, ::2, None]], -1)
    tifffile.imwrite(path, units.reshape(15, 120), compression=compression, metadata=None, rowsperstrip=15)
    with tifffile.TiffFile(path) as tif:
        where, count = tif.pages[0].dataoffsets[0], tif.pages[0].databytecounts[0]
    data = path.read_bytes()[where : where + count]
    tags = {256: 40, 257: 30, 259: 8 if compression else 1, 262: 6, 277: 3, 278: 30, 279: count}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    end = 8 + 2 + 12 * (len(tags) + 3) + 4
    entries += [struct.pack("<HHII", 258, 3, 3, end), struct.pack("<HHII", 273, 4, 1, end + 8)]
    entries += [struct.pack("<HHIHH", 530, 3, 2, 2, 2)]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(sorted(entries, key=lambda e: e[1::-1]))
    path.write_bytes(head + bytes(4) + struct.pack("<4H", 8, 8, 8, 0) + data)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_subsampled_colours_are_read(tmp_path, compression):
    write_subsampled(tmp_path / "a.tif", compression)
    assert np.abs(list_frames(tmp_path / "a.tif")[0].read().astype(int) - SMOOTH).max() <= 16


@pytest.mark.parametrize("options", [0, 1, 5])
def test_ccitt_t4_is_read_in_one_and_two_dimensions(tmp_path, options):
    mask, tags = stack(1, 47)[0] > 99, TiffImagePlugin.ImageFileDirectory_v2()
    tags[292], tags.tagtype[292] = options, 4
    Image.fromarray(mask).save(tmp_path / "a.tif", compression="group3", tiffinfo=tags)
    assert np.array_equal(list_frames(tmp_path / "a.tif")[0].read()[..., 0], mask * np.uint8(255))


def test_series_that_is_not_read_does_not_hide_the_others(tmp_path, capsys):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(stack(1, 8)[0].astype(np.complex64), photometric="minisblack")
        tif.write(stack(1, 16)[0], photometric="minisblack")
    (frame,) = list_frames(tmp_path / "a.tif")
    assert frame.read().shape == (16, 16, 1) and "is left out: pixels of complex64" in capsys.readouterr().out
    with pytest.raises(UserError, match="pixels of complex64"):
        list_frames(tmp_path / "a.tif", Choice(series="0"))


def test_path_that_contains_the_name_of_a_package_is_no_advice_to_install_it(tmp_path):
    folder = tmp_path / "imagecodecs"
    folder.mkdir()
    tifffile.imwrite(folder / "a.tif", stack(3, 8), photometric="minisblack")
    (folder / "a.tif").write_bytes((folder / "a.tif").read_bytes()[:100])
    (folder / "a.npy").write_bytes(b"\x93NUMPY")
    for name in ("a.tif", "a.npy"):
        with pytest.raises(UserError, match=name) as refused:
            list_frames(folder / name)
        assert "pip install" not in str(refused.value)


@pytest.mark.parametrize("compression", [34888, 48124])
def test_compression_that_nothing_reads_is_not_called_damage(tmp_path, compression):
    tifffile.imwrite(tmp_path / "a.tif", stack(1)[0], compression="zlib", metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tif:
        tif.pages[0].tags[259].overwrite(compression)
    with pytest.raises(
        UserError, match=r"a\.tif.*: of a kind that is not read .*: save it as an uncompressed TIFF"
    ) as error:
        list_frames(tmp_path / "a.tif")[0].read()
    assert "damaged" not in str(error.value)


GAPPY = """<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0"
DimensionOrder="XYZCT" Type="uint8" SizeX="20" SizeY="16" SizeZ="3" SizeC="1" SizeT="1"><Channel ID="Channel:0:0"
SamplesPerPixel="1"/><TiffData IFD="0" FirstZ="0" PlaneCount="1"/><TiffData IFD="1" FirstZ="2" PlaneCount="1"/></Pixels>
</Image></OME>""".replace("\n", " ")


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_ome_plane_that_is_missing_is_refused_however_the_image_is_turned(tmp_path, orientation):
    with tifffile.TiffWriter(tmp_path / "m.ome.tif") as file:
        for number in (1, 2):
            tag = [(274, "H", 1, orientation, True)]
            pixels, text = np.full((16, 20), 10 * number, np.uint8), GAPPY if number == 1 else None
            file.write(pixels, compression="zlib", description=text, extratags=tag, metadata=None)
    with pytest.raises(UserError, match="1 of 3 images are missing"):
        list_frames(tmp_path / "m.ome.tif")
    frames = list_frames(tmp_path / "m.ome.tif", Choice(section="0,2"))
    assert [int(frame.read().mean()) for frame in frames] == [10, 20]
