import os
import tempfile
from contextlib import suppress

import numpy as np
import pytest
import tifffile

from images import writers
from images.geometry import Geometry
from images.layout import Layout
from images.outputs import check_replaceable
from images.writers import FlatWriter, PngWriter, RowFile
from images.zarr_writer import ZarrWriter, _halved
from utils import UserError


def bands(pixels, tall):
    """Frame, first row and band (C, h, W) of pixels (N, C, H, W), last first."""
    places = [(frame, top) for frame in range(len(pixels)) for top in range(0, pixels.shape[2], tall)]
    return [(frame, top, pixels[frame, :, top : top + tall]) for frame, top in reversed(places)]


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "uint32"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["out.tif", "out.npy"])
def test_bands_in_any_order_become_the_file(tmp_path, monkeypatch, name, channels, dtype, big):
    monkeypatch.setattr(writers, "BIG", 1000 if big else 2**32)
    pixels = np.random.default_rng(0).integers(0, 255, (4, channels, 50, 33)).astype(dtype)
    layout = Layout(
        pixels.shape, np.dtype(dtype), Geometry("TZ", (2, 2), {"X": 0.25, "Y": 0.5, "Z": 2.0}, "micron"), order="TZC"
    )
    writer = FlatWriter(tmp_path / name, layout, create=True)
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


def test_a_disk_that_fills_up_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    layout = Layout((1, 1, 8, 8), np.dtype("uint8"))
    writer = FlatWriter(tmp_path / "out.npy", layout, create=True)
    writer.write(0, 0, np.zeros((1, 4, 8), np.uint8))
    writer.file.close()
    writer.file = open("/dev/full", "r+b", buffering=0)  # noqa: PTH123, SIM115
    with pytest.raises(UserError, match=r"cannot write .*out.npy: No space left"):
        writer.write(0, 4, np.zeros((1, 4, 8), np.uint8))
    writer.file.close()
    writer.file = None
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_rows_are_kept_on_the_disk_and_a_full_one_is_told(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).random((10, 7), np.float32)
    with RowFile(tmp_path / "new" / "out.tif") as rows:
        for top in (0, 4, 8):
            rows.append(pixels[top : top + 4].T.copy().T)  # not contiguous
        assert len(rows) == 10 and np.array_equal(rows[3:9], pixels[3:9]) and np.array_equal(rows[8:99], pixels[8:])
        assert not list((tmp_path / "new").iterdir())
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "w+b", buffering=0))  # noqa: PTH123, SIM115
    with RowFile(tmp_path / "out.tif") as rows, pytest.raises(UserError, match=r"cannot write .*out.tif: No space"):
        rows.append(pixels)


def test_a_png_counts_to_65535(tmp_path):
    with pytest.raises(UserError, match="70000 objects"):
        PngWriter([tmp_path / "a"], [2]).write(0, 0, np.full((1, 2, 2), 70000, np.uint32))


def test_a_pyramid_halves_odd_sizes(tmp_path):
    zarr = pytest.importorskip("zarr")
    pixels = np.arange(2 * 35 * 21, dtype=np.uint32).reshape(2, 1, 35, 21)
    layout = Layout(pixels.shape, np.dtype("uint32"), Geometry("Z", (2,)), labels=True)
    writer = ZarrWriter(tmp_path / "out.zarr", layout, True, 16, chunk=16)
    for band in bands(pixels, 16):
        writer.write(*band)
    writer.finish()
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    assert [group[str(level)].shape for level in range(3)] == [(2, 35, 21), (2, 18, 11), (2, 9, 6)]
    assert np.array_equal(group["1"][:], pixels[:, 0, ::2, ::2])
    scales = [
        level["coordinateTransformations"][0]["scale"] for level in group.attrs["ome"]["multiscales"][0]["datasets"]
    ]
    assert scales == [[1, 1, 1], [1, 2, 2], [1, 4, 4]]


def test_the_mean_of_four_pixels_by_hand():
    rows = np.array([[0, 2, 4], [2, 4, 6]], np.uint8)
    assert _halved(rows, labels=False).tolist() == [[2, 5]]
    assert _halved(rows.astype(np.float32), labels=False).tolist() == [[2.0, 5.0]]
    assert _halved(rows, labels=True).tolist() == [[0, 4]]


class Killed(BaseException):
    """Stands for the end of the process."""


def write(path, value, kill_at=None):
    """Write an image of 20 px with one value; before a change of the folder's entries the process may be killed."""
    layout = Layout((1, 1, 20, 16), np.dtype("uint8"))
    left = iter(range(10**9 if kill_at is None else kill_at))

    def killing(function):
        def run(*arguments, **options):
            if next(left, None) is None:
                raise Killed
            return function(*arguments, **options)

        return run

    check_replaceable(path)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
            patch.setattr(os, name, killing(getattr(os, name)))
        zarr = path.suffix == ".zarr"
        writer = ZarrWriter(path, layout, True, 16, chunk=16) if zarr else FlatWriter(path, layout, True)
        for band in bands(np.full(layout.shape, value, np.uint8), 16):
            writer.write(*band)
        writer.finish()


def value_of(path):
    """Value of an image that is whole."""
    if path.is_file():
        return int(np.unique(tifffile.imread(path)).item())
    import zarr

    group = zarr.open_group(path, mode="r")
    (value,) = {int(np.unique(group[str(level)][:]).item()) for level in range(2)}
    return value


@pytest.mark.parametrize("name", ["out.tif", "out.zarr"])
def test_a_kill_at_any_point_leaves_the_old_or_the_new_or_what_the_next_run_mends(tmp_path, name):
    if name.endswith("zarr"):
        pytest.importorskip("zarr")
    path = tmp_path / name
    write(path, 1)
    for point in range(0, 200, 2 if name.endswith("zarr") else 1):
        with suppress(Killed):
            write(path, 2, kill_at=point)
            break
        assert value_of(path if path.exists() else tmp_path / f"{name}.old") in (1, 2)
        write(path, 1)
        assert value_of(path) == 1 and list(tmp_path.iterdir()) == [path]
    assert 2 < point < 150


def test_the_older_image_comes_back_when_a_run_after_a_kill_fails_too(tmp_path):
    pytest.importorskip("zarr")
    path = tmp_path / "out.zarr"
    write(path, 1)
    path.rename(tmp_path / "out.zarr.old")
    with pytest.raises(Killed):
        write(path, 2, kill_at=8)
    assert value_of(path) == 1


@pytest.mark.parametrize("entry", ["notes.txt", "0/c/0/notes.txt", "labels/zarr.json"])
@pytest.mark.parametrize("ending", ["", ".old", ".partial"])
def test_a_zarr_with_something_else_in_it_is_not_replaced(tmp_path, entry, ending):
    pytest.importorskip("zarr")
    path = tmp_path / "out.zarr"
    write(path, 1)
    check_replaceable(path)
    place = path.with_name(path.name + ending) / entry
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("mine")
    with pytest.raises(UserError, match=r"is no Zarr image that --mode predict wrote \(it holds"):
        check_replaceable(path)
    assert place.read_text() == "mine"
