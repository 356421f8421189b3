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
    """Shape, type and geometry of an output file.

    Attributes
    ----------
    shape : (int, int, int, int)
        Frames, channels, height and width.
    dtype : numpy.dtype
        uint8, float32 or uint32.
    geometry : Geometry
        Axes of the frames, as in the input, the pixel size, and the names of the frames.
    labels : bool
        Whether the values are class or object numbers, which must not be averaged in a pyramid.
    order : str
        Order of the axes before Y and X that the format requires; empty: as in the input, then the channels.
    rgb : bool
        Whether each pixel is a colour: red, green and blue are the last axis of the file.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype
    geometry: Geometry = field(default_factory=Geometry)
    labels: bool = False
    order: str = ""
    rgb: bool = False

    @property
    def counted(self) -> dict[str, int]:
        """Axes of the frames in the input's order, and their lengths; Z if the format lacks one of them.

        Positions are times where a format has no axis for them, since they are no sections of one stack.
        """
        axes = dict(zip(self.geometry.axes, self.geometry.lengths, strict=True))
        if "P" in axes and self.order:
            num = axes.pop("P")
            is_slowest = next(iter(axes), "T") == "T" or "T" not in axes
            axes = {"T": num * axes.pop("T", 1)} | axes if is_slowest else {}
        if set(axes) <= set(self.order or axes) and math.prod(axes.values()) == self.shape[0]:
            return axes
        return {"Z": self.shape[0]} if self.shape[0] > 1 else {}

    @property
    def lead(self) -> dict[str, int]:
        """Axes of the file before Y and X, in file order, and their lengths."""
        axes = self.counted | ({"C": self.shape[1]} if self.shape[1] > 1 else {})
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
    def photometric(self) -> str:
        """Meaning of the values, as TIFF calls it."""
        return "rgb" if self.rgb else "minisblack"

    @property
    def num_plane(self) -> int:
        """Number of planes (H, W) of the file."""
        return self.shape[0] * self.shape[1]

    @property
    def row_byte(self) -> int:
        """Size of one row of a plane [bytes]."""
        return self.shape[3] * self.dtype.itemsize * (3 if self.rgb else 1)

    @property
    def num_byte(self) -> int:
        """Size of all pixels [bytes]."""
        return math.prod(self.full_shape) * self.dtype.itemsize

    def place(self, frame: int, channel: Any) -> tuple[Any, ...]:
        """Index of a frame's channel (an int or a slice) along the axes before Y and X."""
        lengths = tuple(self.counted.values())
        numbers = np.unravel_index(frame, lengths) if lengths else ()
        index = dict(zip(self.counted, map(int, numbers), strict=True)) | {"C": channel}
        return tuple(index[axis] for axis in self.lead)

    def plane(self, frame: int, channel: int) -> int:
        """Number of the plane (H, W) in the file that holds a channel of a frame."""
        number = 0
        for index, length in zip(self.place(frame, channel), self.lead.values(), strict=True):
            number = number * length + index
        return number
