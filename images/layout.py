"""Layout of an output file: its axes, their order and lengths, and the pixel type."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from images.geometry import Geometry

ORDER = {".tif": "TZC", ".tiff": "TZC", ".zarr": "TCZ"}  # leading axes, as ImageJ and OME-Zarr order them


@dataclass(frozen=True)
class Layout:
    """Shape, type and geometry of an output file."""

    shape: tuple[int, int, int, int]  # frames, channels, height and width
    dtype: np.dtype  # uint8, float32 or uint32
    geometry: Geometry = field(default_factory=Geometry)  # of the input
    labels: bool = False  # values are class or object numbers, which must not be averaged in a pyramid
    order: str = ""  # of the axes before Y and X that the format requires; empty: as in the input, then the channels
    rgb: bool = False  # each pixel is a colour: red, green and blue are the last axis of the file

    @property
    def frame_axes(self) -> dict[str, int]:
        """Axes of the frames in the input's order, and their lengths; Z if the format lacks one of them."""
        axes = dict(zip(self.geometry.axes, self.geometry.lengths, strict=True))
        if "P" in axes and self.order:  # no format orders positions; they are no sections of a stack, so become times
            num = axes.pop("P")
            is_slowest = next(iter(axes), "T") == "T" or "T" not in axes
            axes = {"T": num * axes.pop("T", 1)} | axes if is_slowest else {}
        if set(axes) <= set(self.order or axes) and math.prod(axes.values()) == self.shape[0]:
            return axes
        return {"Z": self.shape[0]} if self.shape[0] > 1 else {}

    @property
    def lead(self) -> dict[str, int]:
        """Axes of the file before Y and X, in file order, and their lengths."""
        axes = self.frame_axes | ({"C": self.shape[1]} if self.shape[1] > 1 else {})
        return {axis: axes[axis] for axis in sorted(axes, key=(self.order or "".join(axes)).index)}

    @property
    def axes(self) -> str:
        """Axes of the file as letters, e.g. `TZCYX`."""
        return "".join(self.lead) + ("YXS" if self.rgb else "YX")

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the file."""
        return (*self.lead.values(), *self.shape[2:], *([3] if self.rgb else []))

    @property
    def row_byte(self) -> int:
        """Size of one row of a plane [bytes]."""
        return self.shape[3] * self.dtype.itemsize * (3 if self.rgb else 1)

    @property
    def num_byte(self) -> int:
        """Size of all pixels [bytes]."""
        return math.prod(self.full_shape) * self.dtype.itemsize

    def index(self, frame: int, channel: Any) -> tuple[Any, ...]:
        """Index of a frame's channel (an int or a slice) along the axes before Y and X."""
        axes = self.frame_axes
        numbers = map(int, np.unravel_index(frame, tuple(axes.values())))
        index = dict(zip(axes, numbers, strict=True)) | {"C": channel}
        return tuple(index[axis] for axis in self.lead)

    def plane(self, frame: int, channel: int) -> int:
        """Number of the plane (H, W) in the file that holds a channel of a frame."""
        return int(np.ravel_multi_index(self.index(frame, channel), tuple(self.lead.values())))
