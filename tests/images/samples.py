"""Images that the tests of this folder write."""

import numpy as np
import pytest

RNG = np.random.default_rng(0)


def stack(num=5, size=32, dtype=np.uint8):
    return RNG.integers(0, 255, (num, size, size)).astype(dtype)


def write_zarr(path, pixels, scales, version=3):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(path, mode="w", zarr_format=version)
    group.create_array("0", data=pixels)
    group.attrs.update({"ome": {"multiscales": scales}} if version == 3 else {"multiscales": scales})
