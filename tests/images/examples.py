"""Images that the tests of this folder write."""

import numpy as np
import pytest
import tifffile
from conftest import kill_before

from images.layout import Layout
from images.output_paths import check_replaceable
from images.readers import list_frames
from images.writers import TIFF_WRITERS
from images.zarr_writer import ZarrWriter

RNG = np.random.default_rng(0)


def stack(num=5, size=32, dtype=np.uint8):
    return RNG.integers(0, 255, (num, size, size)).astype(dtype)


def read_frames(path):
    """Images of all frames of a file."""
    return [frame.open() for frame in list_frames(path)]


def bands(pixels, height):
    """Frame, first row and band (C, h, W) of pixels (N, C, H, W), last first."""
    tops = [(frame, top) for frame in range(len(pixels)) for top in range(0, pixels.shape[2], height)]
    return [(frame, top, pixels[frame, :, top : top + height]) for frame, top in reversed(tops)]


def write(path, value, kill_at=None, compression=""):
    """Write an image of 20 px with one value; before a change of the folder's entries the process may be killed."""
    compression = compression or ("zlib" if path.stem == "zlib" else "none")
    layout = Layout((1, 1, 20, 16), np.dtype("uint8"))
    check_replaceable(path)
    with pytest.MonkeyPatch.context() as patch:
        if kill_at is not None:
            kill_before(patch, ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"), kill_at)
        if path.suffix == ".zarr":
            patch.setattr("images.zarr_writer.CHUNK", 16)  # two levels
            writer = ZarrWriter(path, layout, True, 16)
        else:
            writer = TIFF_WRITERS[compression](path, layout, True)
        for band in bands(np.full(layout.shape, value, np.uint8), 16):
            writer.write(*band)
        writer.finish()


def value_of(path):
    """Value of a complete image."""
    if path.is_file():
        return int(np.unique(tifffile.imread(path)).item())
    import zarr

    group = zarr.open_group(path, mode="r")
    (value,) = {int(np.unique(group[str(level)][:]).item()) for level in range(2)}
    return value
