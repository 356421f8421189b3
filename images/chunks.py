"""Images (H, W, C) that are cut out of an array with named axes, chunk by chunk."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from images.memory import ByteCache, check_size
from images.rows import Readable, Rows, reraise_as_user_error, to_native

BAND = 128  # [px] fewest rows that are decoded together

_blocks = ByteCache(2**29)  # decoded chunks: frames that share one are requested one after another
_numbers = itertools.count()  # of open arrays, as keys of the cache


class ChunkedArray:
    """Array that images are read from by whole chunks, which are cached for the images that share them.

    Parameters
    ----------
    path : Path
        File or folder, named in messages.
    array : array
        Has `shape`, `dtype` and `chunks` (the shape of a chunk), and is indexed by slices and numbers.
    axes : str
        Its axes: Y and X, perhaps C for the channels, others count the frames.
    keeps_planes : bool
        Whether chunks that belong to one image are cached, too: where one holds many more rows than are requested.
    """

    def __init__(self, path: Path, array: Any, axes: str, *, keeps_planes: bool = False) -> None:
        self.path, self.array, self.axes = path, array, axes
        self._number, self._keeps_planes = next(_numbers), keeps_planes
        self.chunk_byte = math.prod(array.chunks) * array.dtype.itemsize
        check_size(f"{path}, a chunk", self.chunk_byte, copies=2)

    @property
    def outer(self) -> tuple[str, tuple[int, ...]]:
        """Axes that count the frames, and their lengths."""
        sizes = dict(zip(self.axes, self.array.shape, strict=True))
        axes = "".join(axis for axis in self.axes if axis not in "CYX")
        return axes, tuple(sizes[axis] for axis in axes)

    def images(self) -> list[Rows]:
        """All frames."""
        axes, lengths = self.outer
        return [ChunkedImage(self, dict(zip(axes, place, strict=True))) for place in np.ndindex(*lengths)]

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
        is_alone = not self._keeps_planes and all(last - first == 1 for first, last in block.values())
        if is_alone or num_byte > _blocks.max_byte // 2:
            return self._read(wanted, place)  # no other image shares these chunks, or the block is too large to cache
        parts = []  # the requested rows, block by block
        for first in range(top // tall * tall, bottom, tall):
            span = block | {"Y": (first, min(first + tall, size["Y"]))}
            pixels = _blocks.get((self._number, *span.values()), partial(self._read, span, {}))
            inside = {"Y": slice(max(top - first, 0), bottom - first)}
            inside |= {axis: number - block[axis][0] for axis, number in place.items()}
            parts.append(pixels[tuple(inside.get(axis, slice(None)) for axis in self.axes)])
        left = [axis for axis in self.axes if axis not in place]
        return np.concatenate(parts, axis=left.index("Y"))

    def _read(self, span: dict[str, tuple[int, int]], place: dict[str, int]) -> np.ndarray:
        """Part of the array; the axes in `place` are dropped."""
        spans = {axis: slice(*limits) for axis, limits in span.items()} | place
        return np.asarray(self.array[tuple(spans.get(axis, slice(None)) for axis in self.axes)])


class ChunkedImage(Readable):
    """One image (H, W, C) of an array with named axes, read chunk by chunk."""

    def __init__(self, source: ChunkedArray, place: dict[str, int]) -> None:
        self._source, self._place = source, place
        size = dict(zip(source.axes, source.array.shape, strict=True))
        self.shape = (size["Y"], size["X"], size.get("C", 1))
        self.dtype = to_native(np.empty(0, source.array.dtype)).dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        top, bottom, step = rows.indices(self.shape[0])
        if bottom <= top:
            return np.empty((0, *self.shape[1:]), self.dtype)
        where = "".join(f", {axis} {number}" for axis, number in self._place.items())
        with reraise_as_user_error(f"{self._source.path}{where}: damaged chunk", "copy it again"):
            block = self._source.rows(self._place, top, bottom)
        left = [axis for axis in self._source.axes if axis not in self._place]
        block = to_native(block.transpose([left.index(axis) for axis in "YXC" if axis in left]))
        return (block if "C" in left else block[..., None])[::step]


def usual_axes(shape: tuple[int, ...]) -> str:
    """Axes of an array that does not name them; the last axis is the channels if it is at most 4 long.

    Examples
    --------
    >>> usual_axes((30, 512, 512)), usual_axes((512, 512, 3)), usual_axes((2, 30, 512, 512))
    ('ZYX', 'YXC', 'CZYX')
    """
    if len(shape) == 3 and shape[-1] > 4:
        return "ZYX"
    return ("TZYXC" if len(shape) > 2 and shape[-1] <= 4 else "TCZYX")[-len(shape) :]
