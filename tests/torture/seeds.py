"""Whole files of all kinds that the programs read, for the fuzzer to damage."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 255, (3, 40, 48), dtype=np.uint8)
GREY = {"photometric": "minisblack"}


def _bytes_of(write: Any, *args: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    write(file, *args, **options)
    return file.getvalue()


@cache
def tiffs() -> list[bytes]:
    """TIFF of the kinds that microscopes and Fiji write."""
    colour, one = np.stack([STACK[0]] * 3, -1), STACK[0]
    size = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    variants: list[tuple[np.ndarray, dict[str, Any]]] = [
        (STACK, GREY),
        (STACK, {"imagej": True, "resolution": (2.0, 2.0), "metadata": {"unit": "um", "spacing": 0.5, "axes": "ZYX"}}),
        (STACK.astype(np.uint16), GREY | {"ome": True, "metadata": {"axes": "ZYX"} | size}),
        (STACK, GREY | {"compression": "zlib", "rowsperstrip": 7}),
        (STACK, GREY | {"compression": "lzw", "predictor": True}),
        (STACK, GREY | {"compression": "zlib", "tile": (16, 16)}),
        (STACK, GREY | {"bigtiff": True}),
        (colour, {"photometric": "rgb", "compression": "jpeg"}),
        (one > 100, GREY),
        (STACK.astype(np.float32), GREY | {"compression": "zstd"}),
        (STACK, GREY | {"compression": "packbits", "byteorder": ">"}),
        (np.stack([one] * 4, -1), {"photometric": "rgb", "compression": "deflate", "extrasamples": ["unassalpha"]}),
        (one, {"compression": "jpeg2000"}),
        (np.stack([STACK] * 2), GREY | {"ome": True, "metadata": {"axes": "TZYX"}, "compression": "zlib"}),
    ]
    return [_bytes_of(tifffile.imwrite, array, **options) for array, options in variants]


@cache
def pictures() -> list[tuple[str, bytes]]:
    """Ending and bytes of PNG, JPEG, GIF and BMP."""
    grey = STACK[0]
    images = [
        (Image.fromarray(grey), "png"),
        (Image.fromarray(grey.astype(np.uint16) * 200), "png"),
        (Image.fromarray(np.stack([grey] * 4, -1)), "png"),
        (Image.fromarray(grey).convert("P"), "png"),
        (Image.fromarray(grey).convert("1"), "png"),
        (Image.fromarray(grey).convert("LA"), "png"),
        (Image.fromarray(np.stack([grey] * 3, -1)), "jpeg"),
        (Image.fromarray(grey), "bmp"),
        (Image.fromarray(grey), "gif"),
    ]
    return [(ending, _bytes_of(image.save, format=ending)) for image, ending in images]


@cache
def arrays() -> list[bytes]:
    """`.npy` images."""
    shapes = [((40, 48), "u1"), ((3, 40, 48), "<f4"), ((2, 40, 48, 3), ">u2"), ((40, 48, 3), "?")]
    return [_bytes_of(np.save, RNG.integers(0, 255, shape).astype(kind)) for shape, kind in shapes]


@cache
def samples() -> list[bytes]:
    """`.npy` samples of a database, with one to three channels."""
    made = []
    for kind, channels in (("u1", 1), ("<u2", 3), ("<f4", 2)):
        sample = np.zeros((40, 48), [("input", kind, (channels,)), ("label", "u1")])
        sample["input"] = RNG.integers(0, 200, sample["input"].shape)
        sample["label"] = RNG.integers(0, 2, (40, 48))
        made.append(_bytes_of(np.save, sample))
    return [*made, _bytes_of(np.save, RNG.random((40, 48, 1), dtype=np.float32))]


def write_zarrs(folder: Path) -> None:
    """Zarr arrays of both formats, and OME-Zarr 0.4 and 0.5."""
    import zarr

    pair = STACK[:2]
    for name, version, options in (("v3", 3, {}), ("v2", 2, {}), ("shard", 3, {"shards": (2, 40, 48)})):
        path = folder / f"{name}.zarr"
        array = zarr.create_array(
            path, shape=pair.shape, dtype="u1", chunks=(1, 20, 24), zarr_format=version, **options
        )
        array[:] = pair
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    scale = [{"type": "scale", "scale": [1.0, 0.5, 0.5]}]
    scales = [{"name": "p", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}]
    for name, version in (("ome5", 3), ("ome4", 2)):
        group = zarr.open_group(folder / f"{name}.zarr", mode="w", zarr_format=version)
        group.create_array("0", shape=pair.shape, dtype="u1", chunks=(1, 40, 48))[:] = pair
        described = {"ome": {"version": "0.5", "multiscales": scales}}
        group.attrs.update(described if version == 3 else {"multiscales": [scales[0] | {"version": "0.4"}]})
