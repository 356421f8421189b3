import numpy as np
import pytest
from conftest import Killed
from examples import bands, value_of, write

from images import zarr_writer
from images.geometry import Geometry
from images.layout import Layout
from images.zarr_writer import ZarrWriter


def test_pyramid_halves_odd_sizes(tmp_path, monkeypatch):
    zarr = pytest.importorskip("zarr")
    pixels = np.arange(2 * 35 * 21, dtype=np.uint32).reshape(2, 1, 35, 21)
    layout = Layout(pixels.shape, np.dtype("uint32"), Geometry("Z", (2,)), labels=True)
    monkeypatch.setattr(zarr_writer, "CHUNK", 16)
    writer = ZarrWriter(tmp_path / "out.zarr", layout, True, 16)
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


@pytest.mark.parametrize(
    ("dtype", "labels", "half"), [("u1", False, [2, 5]), ("f4", False, [1.75, 5]), ("u1", True, [0, 4])]
)
def test_pyramid_of_four_pixels_is_their_mean(tmp_path, monkeypatch, dtype, labels, half):
    zarr = pytest.importorskip("zarr")
    pixels = np.array([[[[0, 2, 4], [2, 3, 6]]]], dtype)
    monkeypatch.setattr(zarr_writer, "CHUNK", 2)
    writer = ZarrWriter(tmp_path / "out.zarr", Layout(pixels.shape, pixels.dtype, labels=labels), True, 2)
    writer.write(0, 0, pixels[0])
    writer.finish()
    assert zarr.open_array(tmp_path / "out.zarr" / "1", mode="r")[:].tolist() == [half]


def test_zarr_that_is_older_comes_back_when_a_run_after_a_kill_fails_too(tmp_path):
    pytest.importorskip("zarr")
    path = tmp_path / "out.zarr"
    write(path, 1)
    path.rename(tmp_path / "out.zarr.old")
    with pytest.raises(Killed):
        write(path, 2, kill_at=8)
    assert value_of(path) == 1
