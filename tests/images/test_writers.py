import errno
import os
import tempfile
from contextlib import suppress

import numpy as np
import pytest
import tifffile
from conftest import Killed
from examples import bands, value_of, write

from images import writers
from images.geometry import Geometry
from images.layout import Layout
from images.readers import list_frames, read_geometry
from images.writers import TIFF_WRITERS, FlatWriter, PngWriter, RowFile
from utils import UserError


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "uint32"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["out.tif", "out.npy", "zlib.tif"])
def test_writer_makes_the_file_of_bands_in_any_order(tmp_path, monkeypatch, name, channels, dtype, big):
    monkeypatch.setattr(writers, "BIG", 1000 if big else 2**32)
    pixels = np.random.default_rng(0).integers(0, 255, (4, channels, 50, 33)).astype(dtype)
    layout = Layout(
        pixels.shape, np.dtype(dtype), Geometry("TZ", (2, 2), {"X": 0.25, "Y": 0.5, "Z": 2.0}, "micron"), order="TZC"
    )
    monkeypatch.setattr(writers, "STRIP", 600)  # several strips in each plane
    compression = "zlib" if name == "zlib.tif" else "none"
    writer = TIFF_WRITERS[compression](tmp_path / name, layout, create=True)
    for band in bands(pixels, 16):
        writer.write(*band)
    assert not (tmp_path / name).exists()
    writer.finish()
    expected = pixels.reshape(2, 2, *([channels] if channels > 1 else []), 50, 33)
    read = np.load if name.endswith("npy") else tifffile.imread
    assert np.array_equal(read(tmp_path / name), expected) and read(tmp_path / name).dtype == dtype
    if name.endswith("tif"):
        with tifffile.TiffFile(tmp_path / name) as tif:
            assert tif.is_bigtiff == big and tif.is_imagej == (not big and dtype != "uint32")
            assert tif.series[0].axes == ("TZCYX" if channels > 1 else "TZYX")
            assert tif.pages[0].compression == (8 if compression == "zlib" else 1)
        geometry = read_geometry(list_frames(tmp_path / name))
        assert geometry.pixel == pytest.approx(layout.geometry.pixel) and not geometry.unknown
        assert np.array_equal(list_frames(tmp_path / name)[2].open()[9:40], pixels[2, :, 9:40].transpose(1, 2, 0))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("compression", ["none", "zlib"])
def test_writer_makes_colours_the_last_axis_of_a_tiff(tmp_path, compression):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 1, 50, 33, 3)).astype(np.uint8)
    layout = Layout(pixels.shape[:4], pixels.dtype, Geometry("Z", (2,), {"X": 0.25, "Y": 0.5}, "micron"), rgb=True)
    writer = TIFF_WRITERS[compression](tmp_path / "out.tif", layout, create=True)
    for frame in (1, 0):
        for top in (32, 0, 16, 48):
            writer.write(frame, top, pixels[frame][:, top : top + 16])
    writer.finish()
    with tifffile.TiffFile(tmp_path / "out.tif") as tif:
        assert tif.is_imagej and tif.series[0].axes == "ZYXS" and tif.pages[0].photometric == 2
        assert np.array_equal(tif.asarray(), pixels[:, 0])


def test_zlib_tiff_is_read_strip_by_strip(tmp_path):
    layout = Layout((1, 1, 4000, 600), np.dtype("uint8"))
    writer = TIFF_WRITERS["zlib"](tmp_path / "out.tif", layout, create=True)
    for top in range(0, 4000, 500):
        writer.write(0, top, np.full((1, 500, 600), top // 500, np.uint8))
    writer.finish()
    with tifffile.TiffFile(tmp_path / "out.tif") as tif:
        assert tif.pages[0].rowsperstrip * 600 <= writers.STRIP < 4000 * 600
    image = list_frames(tmp_path / "out.tif")[0].open()
    assert set(np.unique(image[990:1010])) == {1, 2}
    assert sum(segment.nbytes for segment, _ in image._decoded.values()) <= writers.STRIP


def test_zlib_tiff_for_which_the_disk_is_too_full_is_refused_and_removed(tmp_path, monkeypatch):
    writer = TIFF_WRITERS["zlib"](tmp_path / "out.tif", Layout((1, 1, 8, 8), np.dtype("uint8")), create=True)
    writer.write(0, 0, np.zeros((1, 8, 8), np.uint8))
    monkeypatch.setattr(writers.zlib, "compress", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
    with pytest.raises(UserError, match=r"cannot write .*out.tif: disk full"):
        writer.finish()
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_flat_writer_of_which_the_disk_holds_only_a_part_is_refused_and_removed(tmp_path):
    resource = pytest.importorskip("resource")
    writer = FlatWriter(tmp_path / "out.npy", Layout((1, 1, 8, 8), np.dtype("uint8")), create=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 12, limits[1]))  # of a header of 128 bytes and 8 rows of 8 bytes
    try:
        writer.write(0, 0, np.zeros((1, 1, 8), np.uint8))
        with pytest.raises(UserError, match=r"cannot write .*out.npy: File too large"):
            writer.write(0, 1, np.zeros((1, 4, 8), np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_row_file_returns_its_rows_and_a_full_disk_is_an_error(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).random((10, 7), np.float32)
    with RowFile(tmp_path / "new" / "out.tif") as rows:
        for top in (0, 4, 8):
            rows.append(pixels[top : top + 4].T.copy().T)  # not contiguous
        assert len(rows) == 10 and np.array_equal(rows[3:9], pixels[3:9]) and np.array_equal(rows[8:99], pixels[8:])
        assert not list((tmp_path / "new").iterdir())
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "w+b", buffering=0))  # noqa: PTH123, SIM115
    with RowFile(tmp_path / "out.tif") as rows, pytest.raises(UserError, match=r"cannot write .*out.tif: No space"):
        rows.append(pixels)


def test_png_writer_counts_to_65535(tmp_path):
    with pytest.raises(UserError, match="70000 objects"):
        PngWriter([tmp_path / "a"], [2]).write(0, 0, np.full((1, 2, 2), 70000, np.uint32))


@pytest.mark.parametrize(("name", "again"), [("out.tif", ""), ("zlib.tif", ""), ("zlib.tif", "none"), ("out.zarr", "")])
def test_writer_that_is_killed_leaves_the_old_or_the_new_or_what_the_next_mends(tmp_path, name, again):
    if name.endswith("zarr"):
        pytest.importorskip("zarr")
    path = tmp_path / name
    write(path, 1)
    for point in range(0, 200, 2 if name.endswith("zarr") else 1):
        with suppress(Killed):
            write(path, 2, kill_at=point)
            break
        assert value_of(path if path.exists() else tmp_path / f"{name}.old") in (1, 2)
        write(path, 1, compression=again)
        assert value_of(path) == 1 and list(tmp_path.iterdir()) == [path]
    assert 2 < point < 150


def test_flat_writer_whose_file_can_not_be_flushed_leaves_nothing(tmp_path, monkeypatch):
    writer = FlatWriter(tmp_path / "out.npy", Layout((1, 1, 8, 8), np.dtype("uint8")), create=True)
    writer.write(0, 0, np.zeros((1, 4, 8), np.uint8))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    writer.discard()
    assert not list(tmp_path.iterdir())
