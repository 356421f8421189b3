"""Axes of the frames of a file, and the size of their pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

# units in files, in micron and in seconds
MICRON = {"µm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "nm": 1e-3, "nanometer": 1e-3}
MICRON |= {"Å": 1e-4, "angstrom": 1e-4, "mm": 1e3, "millimeter": 1e3, "cm": 1e4, "centimeter": 1e4, "inch": 25400.0}
SECOND = {"s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "ms": 1e-3, "msec": 1e-3, "millisecond": 1e-3}
SECOND |= {"µs": 1e-6, "us": 1e-6, "microsecond": 1e-6, "min": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0}


@dataclass(frozen=True)
class Geometry:
    """Axes of the frames of a file, and the size of their pixels."""

    axes: str = ""  # of the frames, slowest first: "" for one image, "Z", "TZ"...
    lengths: tuple[int, ...] = ()  # of these axes; their product is the number of frames
    pixel: dict[str, float] = field(default_factory=dict)  # size along X, Y and Z in `unit`, where the file has it
    unit: str = ""  # "micron", or an unknown unit as in the file; empty if the file has none
    interval: float | None = None  # time between two frames along T [s]
    labels: tuple[str, ...] = ()  # name of each frame, as ImageJ shows it
    channels: tuple[str, ...] = ()  # name of each channel

    def of_frames(self, indices: Sequence[int]) -> Geometry:
        """Geometry of some of the frames, with the distance between these along Z and T.

        They become one axis Z if they are not all combinations of indices along each axis.

        >>> Geometry("TZ", (2, 5), {"Z": 2.0}).of_frames([0, 3, 5, 8])
        Geometry(axes='TZ', lengths=(2, 2), pixel={'Z': 6.0}, unit='', interval=None, labels=(), channels=())
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


def in_micron(sizes: dict[str, Any], units: dict[str, str]) -> tuple[dict[str, float], str]:
    """Pixel size along each axis in micron and `"micron"`, or both as in the file if a unit is unknown.

    Sizes that are not positive numbers are left out.

    >>> in_micron({"X": 4, "Z": 0.05}, {"X": "nm", "Z": "µm"}), in_micron({"X": 2}, {"X": "pixel"}), in_micron({}, {})
    (({'X': 0.004, 'Z': 0.05}, 'micron'), ({'X': 2.0}, 'pixel'), ({}, ''))
    """
    pixel = {axis: number for axis, size in sizes.items() if (number := positive(size))}
    if pixel and all(units[axis] in MICRON for axis in pixel):
        return {axis: number * MICRON[units[axis]] for axis, number in pixel.items()}, "micron"
    return pixel, next((units[axis] for axis in pixel), "")


def in_seconds(interval: Any, unit: str) -> float | None:
    """Time between two frames [s]; None if it is not a positive number or its unit is unknown.

    >>> in_seconds("250", "ms"), in_seconds(0, "s"), in_seconds(1, "frame")
    (0.25, None, None)
    """
    return positive(interval) * SECOND.get(unit, 0.0) or None


def positive(value: Any) -> float:
    """Value from a file as a number; 0 if it is not a number, not positive, or infinite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return number if 0 < number < math.inf else 0.0
