"""Axes of the frames of a file, and the size of their pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class Geometry:
    """Axes of the frames of a file, and the size of their pixels."""

    axes: str = ""  # of the frames, slowest first: "" for one image, "Z", "TZ"...
    lengths: tuple[int, ...] = ()  # of these axes; their product is the number of frames
    pixel: dict[str, float] = field(default_factory=dict)  # [µm] along those of X, Y and Z where it is known
    unknown: str = "the file gives none"  # why there is not one along both X and Y; empty if there is
    interval: float | None = None  # time between two frames along T [s]
    labels: tuple[str, ...] = ()  # name of each frame, as ImageJ shows it
    channels: tuple[str, ...] = ()  # name of each channel

    @property
    def pixel_size(self) -> tuple[float, float] | None:
        """Height and width of a pixel [µm]; None if one of them is unknown."""
        return None if self.unknown else (self.pixel["Y"], self.pixel["X"])

    def of_frames(self, indices: Sequence[int]) -> Geometry:
        """Geometry of some of the frames, with the distance between these along Z and T.

        They become one axis Z if they are not all combinations of indices along each axis.

        >>> Geometry("TZ", (2, 5), {"Z": 2.0}, "no unit").of_frames([0, 3, 5, 8])
        Geometry(axes='TZ', lengths=(2, 2), pixel={'Z': 6.0}, unknown='no unit', interval=None, labels=(), channels=())
        """
        num = math.prod(self.lengths)
        along: dict[str, np.ndarray] = {}  # axis -> indices along it, ascending
        if self.lengths and max(indices) < num:
            along = {a: np.unique(i) for a, i in zip(self.axes, np.unravel_index(indices, self.lengths), strict=True)}
        lengths = tuple(map(len, along.values()))
        if max(indices) >= num or math.prod(lengths) != len(indices):
            axes, lengths = ("Z", (len(indices),)) if len(indices) > 1 else ("", ())
            return replace(self, axes=axes, lengths=lengths, labels=())
        steps = {axis: {*np.diff(numbers).tolist()} or {1} for axis, numbers in along.items()}
        step = {axis: min(values) if len(values) == 1 else 0 for axis, values in steps.items()}  # 0: they differ
        pixel = {axis: size * step.get(axis, 1) for axis, size in self.pixel.items() if step.get(axis, 1)}
        interval = self.interval * step.get("T", 1) or None if self.interval else None
        labels = tuple(self.labels[index] for index in indices) if len(self.labels) == num else ()
        return replace(self, lengths=lengths, pixel=pixel, interval=interval, labels=labels)


def numbers_along(axes: str, lengths: Sequence[int], index: int) -> dict[str, int]:
    """Number of a frame along each axis, from 1; without axes of length 1.

    >>> numbers_along("TZ", (2, 3), 4), numbers_along("TZ", (1, 3), 1), numbers_along("", (), 0)
    ({'T': 2, 'Z': 2}, {'Z': 2}, {})
    """
    indices = np.unravel_index(index, tuple(lengths)) if lengths else ()
    return {axis: int(i) + 1 for axis, i, num in zip(axes, indices, lengths, strict=True) if num > 1}
