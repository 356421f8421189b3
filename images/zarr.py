"""Zarr folders and OME-Zarr images as frames (H, W, C), read chunk by chunk."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from images.geometry import Geometry, in_micron, in_seconds
from images.memory import ByteCache, check_size
from images.rows import Frames, Readable, Rows, check_count, naming, plain, stack_numbers
from utils import UserError, check_module

BAND = 128  # [px] fewest rows that are decoded together
MOST_EDGE = 64  # largest ratio of the sizes of a chunk and the part of the array in it


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr array or group of version 2 or 3."""
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def read_zarr(path: Path) -> Frames:
    """Frames of a Zarr array, or of the full resolution of an OME-Zarr image."""
    array, axes, _ = open_zarr(path)
    others = [axis for axis in axes if axis not in "CYX"]
    lengths = tuple(array.shape[axes.index(axis)] for axis in others)
    check_count(path, lengths)
    source = _Source(path, array, axes)
    places = np.ndindex(*lengths)
    images: list[Rows] = [ZarrImage(source, dict(zip(others, place, strict=True))) for place in places]
    return Frames(images, stack_numbers("".join(others), lengths))


def zarr_geometry(path: Path) -> Geometry:
    """Axes of the frames of a Zarr, pixel size and time step."""
    array, letters, sizes = open_zarr(path)
    space = [axis for axis in "ZYX" if axis in sizes]
    pixel, unit = in_micron({axis: sizes[axis][0] for axis in space}, {axis: sizes[axis][1] for axis in space})
    axes = "".join(axis for axis in letters if axis not in "CYX")
    lengths = tuple(array.shape[letters.index(axis)] for axis in axes)
    return Geometry(axes, lengths, pixel, unit, in_seconds(*sizes["T"]) if "T" in sizes else None)


def open_zarr(path: Path) -> tuple[Any, str, dict[str, tuple[Any, str]]]:
    """Array of a Zarr folder, its axes as letters, and the pixel size and its unit along each of them.

    Raises
    ------
    UserError
        The package `zarr` is missing, or the folder is not an image.
    """
    check_module("zarr", str(path))
    import zarr

    node = zarr.open(_careful_store(path), mode="r")
    pixel: dict[str, tuple[Any, str]] = {}
    if isinstance(node, zarr.Array):
        array, axes = node, _usual_axes(node.shape)
    else:
        array, axes, pixel = _open_image(path, node)
    if len(axes) != array.ndim or "Y" not in axes or "X" not in axes or array.dtype.kind not in "uifb":
        what = f"shape {array.shape} of {array.dtype}, axes {axes}"
        raise UserError(f"{path}: {what}: must be numbers with axes Y and X, and otherwise only T, C and Z")
    return array, axes, pixel


def _careful_store(path: Path) -> Any:
    """Store of a folder that refuses a chunk whose header claims more than `most` bytes."""
    from zarr.storage import LocalStore, WrapperStore

    class CarefulStore(WrapperStore):
        most = 2**63

        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            chunk = await super().get(key, prototype, byte_range)
            claimed = 0 if chunk is None else _claimed(chunk.as_numpy_array()[:18].tobytes(), len(chunk))
            if claimed > self.most:
                raise ValueError(f"{key} unpacks to {claimed} bytes")
            return chunk

    return CarefulStore(LocalStore(path, read_only=True))


def _claimed(start: bytes, length: int) -> int:
    """Uncompressed size claimed by the header of a Zstandard or Blosc chunk; 0 for other codecs.

    Sources: RFC 8878, section 3.1.1.1, and README_CHUNK_FORMAT.rst of c-blosc.
    """
    if start[:4] == b"\x28\xb5\x2f\xfd" and len(start) > 5:
        # magic number (4 bytes), flags, window descriptor unless single-segment, dictionary id, size of the content
        flags = start[4]
        single = flags >> 5 & 1
        size = (single, 2, 4, 8)[flags >> 6]
        first = 6 - single + (0, 1, 2, 4)[flags & 3]
        return int.from_bytes(start[first : first + size], "little") + 256 * (size == 2)  # two bytes: minus 256
    of_blosc = start[:1] == b"\2" and int.from_bytes(start[12:16], "little") == length
    return int.from_bytes(start[4:8], "little") if of_blosc else 0


def _usual_axes(shape: tuple[int, ...]) -> str:
    """Axes of an array that does not name them; the last axis is the channels if it is at most 4 long.

    Examples
    --------
    >>> _usual_axes((30, 512, 512)), _usual_axes((512, 512, 3)), _usual_axes((2, 30, 512, 512))
    ('ZYX', 'YXC', 'CZYX')
    """
    if len(shape) == 3 and shape[-1] > 4:
        return "ZYX"
    return ("TZYXC" if len(shape) > 2 and shape[-1] <= 4 else "TCZYX")[-len(shape) :]


def _open_image(path: Path, group: Any) -> tuple[Any, str, dict[str, tuple[Any, str]]]:
    """What `open_zarr` returns, for an OME-Zarr image or a group of a single one, as bioformats2raw writes it."""
    scales = _multiscales(group)
    if not scales:
        images = [(name, inner) for name, inner in sorted(group.groups()) if _multiscales(inner)]
        if len(images) != 1:
            inside = ", ".join(f"{path / name}" for name in sorted(name for name, _ in images or group.members()))
            raise UserError(f"{path}: not one OME-Zarr image: name one of its members ({inside or 'nothing'})")
        group = images[0][1]
        scales = _multiscales(group)
    named = scales[0].get("axes", "tczyx")  # no axes in OME-Zarr 0.1 and 0.2, only names in 0.3
    named = [{"name": axis} if isinstance(axis, str) else axis for axis in named]
    axes = "".join(axis["name"] for axis in named).upper()
    first = scales[0]["datasets"][0]
    sizes: list[Any] = next(
        (item["scale"] for item in first.get("coordinateTransformations", []) if "scale" in item), []
    )
    units = [str(axis.get("unit", "")) for axis in named]
    pixel = {axis: (size, unit) for axis, size, unit in zip(axes, sizes, units, strict=False)}
    return group[first["path"]], axes, pixel


def _multiscales(group: Any) -> list[dict]:
    """Entry `multiscales` of a group by OME-Zarr 0.5 or older; empty if it has none."""
    attributes = dict(group.attrs)
    return attributes.get("ome", attributes).get("multiscales", [])


_blocks = ByteCache(2**29)  # decoded chunks: frames that share one are requested one after another
_numbers = itertools.count()  # of open arrays, as keys of the cache


class _Source:
    """Array that images are read from by whole chunks, which are cached for the images that share them."""

    def __init__(self, path: Path, array: Any, axes: str) -> None:
        self.path, self.array, self.axes = path, array, axes
        self.number = next(_numbers)
        num_byte = math.prod(array.chunks) * array.dtype.itemsize
        used = math.prod(map(min, array.chunks, array.shape)) * array.dtype.itemsize
        check_size(f"{path}, a chunk", num_byte, used, ratio=MOST_EDGE, copies=2)
        array.store.most = 8 * num_byte + 2**20  # filters may change the size a little

    def rows(self, place: dict[str, int], top: int, bottom: int) -> np.ndarray:
        """Rows of the image at a place, with its axes in the order of the array."""
        size = dict(zip(self.axes, self.array.shape, strict=True))
        chunk = dict(zip(self.axes, self.array.chunks, strict=True))
        wanted = {axis: (number, number + 1) for axis, number in place.items()} | {"Y": (top, bottom)}
        tall = -(-BAND // chunk["Y"]) * chunk["Y"]  # rows of a cached block, a multiple of the chunk's
        block = {  # along T and Z, the whole chunk that contains the image
            axis: (number // chunk[axis] * chunk[axis], min((number // chunk[axis] + 1) * chunk[axis], size[axis]))
            for axis, number in place.items()
        }
        num_byte = math.prod(last - first for first, last in block.values()) * min(tall, size["Y"])
        num_byte *= size["X"] * size.get("C", 1) * self.array.dtype.itemsize
        if all(last - first == 1 for first, last in block.values()) or num_byte > _blocks.max_byte // 2:
            return self._read(wanted, place)  # no other image shares these chunks, or the block is too large to cache
        parts = []  # the requested rows, block by block
        for first in range(top // tall * tall, bottom, tall):
            span = block | {"Y": (first, min(first + tall, size["Y"]))}
            pixels = _blocks.get((self.number, *span.values()), partial(self._read, span, {}))
            inside = {"Y": slice(max(top - first, 0), bottom - first)}
            inside |= {axis: number - block[axis][0] for axis, number in place.items()}
            parts.append(pixels[tuple(inside.get(axis, slice(None)) for axis in self.axes)])
        left = [axis for axis in self.axes if axis not in place]
        return np.concatenate(parts, axis=left.index("Y"))

    def _read(self, span: dict[str, tuple[int, int]], place: dict[str, int]) -> np.ndarray:
        """Part of the array; the axes in `place` are dropped."""
        spans = {axis: slice(*limits) for axis, limits in span.items()} | place
        return np.asarray(self.array[tuple(spans.get(axis, slice(None)) for axis in self.axes)])


class ZarrImage(Readable):
    """One image (H, W, C) of a Zarr array with named axes, read chunk by chunk."""

    def __init__(self, source: _Source, place: dict[str, int]) -> None:
        self._source, self._place = source, place
        size = dict(zip(source.axes, source.array.shape, strict=True))
        self.shape = (size["Y"], size["X"], size.get("C", 1))
        self.dtype = plain(np.empty(0, source.array.dtype)).dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        top, bottom, step = rows.indices(self.shape[0])
        if bottom <= top:
            return np.empty((0, *self.shape[1:]), self.dtype)
        where = "".join(f", {axis} {number}" for axis, number in self._place.items())
        with naming(f"{self._source.path}{where}: damaged chunk", "copy the folder again"):
            block = self._source.rows(self._place, top, bottom)
        left = [axis for axis in self._source.axes if axis not in self._place]
        block = plain(block.transpose([left.index(axis) for axis in "YXC" if axis in left]))
        return (block if "C" in left else block[..., None])[::step]
