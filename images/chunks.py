"""Images (H, W, C) that are cut out of an array with named axes, chunk by chunk."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from images.memory import ByteCache, check_size
from images.rows import LazyImage, check_count, reraise_as_user_error, to_native

BAND = 128  # [px] fewest rows that are decoded together

_blocks = ByteCache(2**29)  # decoded chunks: frames that share one are requested one after another


class ChunkedArray:
    """Array that images are read from by whole chunks, which are cached for the images that share them.

    `path` is named in messages. `array` has `shape`, `dtype` and `chunks` (the shape of a chunk), and is indexed by
    slices and numbers. Of its `axes`, Y and X are those of an image, C its channels, others count the frames. With
    `keeps_planes`, chunks of a single image are cached, too: where one holds many more rows than are requested.
    """

    def __init__(self, path: Path, array: Any, axes: str, *, keeps_planes: bool = False) -> None:
        self.path, self.array, self.axes = path, array, axes
        self.size = dict(zip(axes, array.shape, strict=True))
        self.chunk = dict(zip(axes, array.chunks, strict=True))
        self.outer_axes = "".join(axis for axis in axes if axis not in "CYX")  # those that count the frames
        self.outer_lengths = tuple(self.size[axis] for axis in self.outer_axes)
        self._key, self._keeps_planes = object(), keeps_planes
        check_count(path, self.outer_lengths)
        check_size(f"{path}, a chunk", math.prod(array.chunks) * array.dtype.itemsize, copies=2)

    def images(self) -> list[LazyImage]:
        """All frames."""
        shape = (self.size["Y"], self.size["X"], self.size.get("C", 1))
        dtype = to_native(np.empty(0, self.array.dtype)).dtype
        frames = [dict(zip(self.outer_axes, index, strict=True)) for index in np.ndindex(*self.outer_lengths)]
        return [LazyImage(shape, dtype, partial(self._rows, frame)) for frame in frames]

    def _rows(self, frame: dict[str, int], top: int, bottom: int) -> np.ndarray:
        """Rows (h, W, C) of the image at an index along each outer axis."""
        name = "".join(f", {axis} {number}" for axis, number in frame.items())
        with reraise_as_user_error(f"{self.path}{name}: damaged chunk", "copy it again"):
            pixels = self._stored_rows(frame, top, bottom)
        inner = [axis for axis in self.axes if axis not in frame]
        pixels = to_native(pixels.transpose([inner.index(axis) for axis in "YXC" if axis in inner]))
        return pixels if "C" in inner else pixels[..., None]

    def _stored_rows(self, frame: dict[str, int], top: int, bottom: int) -> np.ndarray:
        """Rows of an image with its axes in the order of the array, from cached blocks where images share them."""
        # A block is as long as a chunk along T and Z, and at least BAND rows high, a multiple of the chunk's.
        block = {axis: number // self.chunk[axis] * self.chunk[axis] for axis, number in frame.items()}
        spans = {axis: (first, min(first + self.chunk[axis], self.size[axis])) for axis, first in block.items()}
        height = math.ceil(BAND / self.chunk["Y"]) * self.chunk["Y"]
        num_image = math.prod(last - first for first, last in spans.values())
        num_pixel = num_image * min(height, self.size["Y"]) * self.size["X"] * self.size.get("C", 1)
        is_alone = num_image == 1 and not self._keeps_planes
        if is_alone or num_pixel * self.array.dtype.itemsize > _blocks.max_byte // 2:
            return self._part({**frame, "Y": slice(top, bottom)})
        inside: dict[str, Any] = {axis: number - block[axis] for axis, number in frame.items()}
        parts = []
        for first in range(top // height * height, bottom, height):
            limits = {**spans, "Y": (first, min(first + height, self.size["Y"]))}
            read = partial(self._part, {axis: slice(*span) for axis, span in limits.items()})
            pixels = _blocks.get((self._key, *limits.values()), read)
            inside["Y"] = slice(max(top - first, 0), bottom - first)
            parts.append(pixels[self._index(inside)])
        return np.concatenate(parts, axis=[axis for axis in self.axes if axis not in frame].index("Y"))

    def _part(self, parts: dict[str, Any]) -> np.ndarray:
        """Part of the array by a slice or number along each axis, all of those that are not named."""
        return np.asarray(self.array[self._index(parts)])

    def _index(self, parts: dict[str, Any]) -> tuple[slice | int, ...]:
        return tuple(parts.get(axis, slice(None)) for axis in self.axes)


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
