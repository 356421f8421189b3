"""Curves of a training, read from its TensorBoard log, as the lines of small charts."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from utils import echo

Points = list[tuple[float, float]]  # (epoch, value)
GROUPS = {  # title of a chart -> the names of its curves, or what they begin with
    "loss": ("loss/train", "loss/val"),
    "pixel error of the validation set": ("pixel_error", "min_pixel_error"),
    "Dice of the validation set": ("dice/",),
    "segments of the validation set": ("max/v_rand", "max/v_info"),
}
MAX_POINT = 1000  # of a curve
MIN_POINT, OUTLYING = 10, 5  # of a chart that may have outliers; how far those lie, see `without_outliers`


class Line(NamedTuple):
    """A curve: its name and last value, and its points as in the attribute `points` of an SVG polyline."""

    name: str
    last: float
    points: str


@dataclass(frozen=True)
class Chart:
    """Lines with one scale, and the positions and texts of the ticks of both axes."""

    title: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marked: float | None  # position of the epoch that was tested
    cut: float | None  # highest value, if it lies above the chart

    width, height = 360, 190
    left, right, top, bottom = 44, width - 14, 8, height - 24  # sides of the part with the lines


def read_curves(folder: Path) -> dict[str, Points]:
    """Curves of the event files in a folder, as TensorBoard shows them; empty if there are none."""
    curves: dict[str, Points] = {}
    try:
        runs = [_read_run(path) for path in sorted(folder.glob("events*"))]
    except OSError as error:
        echo(f"warning: {folder}: can't be read ({error.strerror or error}): no training curves", sys.stderr)
        return {}
    for run in _in_order(runs):
        # without what an interrupted run wrote of the epochs that the next one trains again
        curves = {name: [point for point in points if point[0] < run.first] for name, points in curves.items()}
        for name, step, value in run.points:
            curves.setdefault(name, []).append((step, value))
    steps = {name: -(-len(points) // MAX_POINT) for name, points in curves.items() if points}
    return {name: curves[name][::-step][::-1] for name, step in steps.items()}


class _Run(NamedTuple):
    """Scalars of an event file."""

    first: float  # first epoch of the run, infinite if the file does not have it
    points: list[tuple[str, int, float]]  # curve, epoch and value


def _read_run(path: Path) -> _Run:
    """Scalars of an event file, to its first damaged event; its pictures are not held in memory.

    TensorBoard's own reader also computes the checksums of all pictures, in Python: 0.96 s instead of 0.005 s for a
    training of 330 epochs.
    """
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    first, points = math.inf, []
    with path.open("rb") as file, suppress(DecodeError):
        size = os.fstat(file.fileno()).st_size
        while len(head := file.read(12)) == 12:  # length of an event (8 bytes), checksum (4), event, checksum (4)
            length = int.from_bytes(head[:8], "little")
            if file.tell() + length + 4 > size:
                break
            event = Event.FromString(file.read(length))
            file.seek(4, os.SEEK_CUR)
            if event.session_log.status == event.session_log.START:
                first = event.step
            points += [(v.tag, event.step, v.simple_value) for v in event.summary.value if v.HasField("simple_value")]
    return _Run(first, points)


def _in_order(runs: list[_Run]) -> Iterator[_Run]:
    """Runs in the order of their epochs; their files are sorted by the clock, which may have been set back.

    A run is resumed from an epoch that an earlier one has reached: one that is not reached yet comes later.
    """
    rest, reached = [*runs], 0
    while rest:
        possible = [run for run in rest if run.first <= reached + 1 or math.isinf(run.first)]
        run = possible[0] if possible else min(rest, key=lambda run: run.first)
        rest.remove(run)
        reached = max([reached, *(step for _, step, _ in run.points)])
        yield run


def charts(curves: dict[str, Points], epoch: int | None = None) -> list[Chart]:
    """Charts of losses and scores; `epoch` is marked in each."""
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in curves.items()}
    drawable = {name: points for name, points in finite.items() if len(points) > 1}
    groups = {
        title: {name: points for name, points in drawable.items() if name.startswith(names)}
        for title, names in GROUPS.items()
    }
    return [_chart(title, group, epoch) for title, group in groups.items() if group]


def _chart(title: str, curves: dict[str, Points], epoch: int | None) -> Chart:
    """Chart of curves, each with at least two points."""
    steps, values = (sorted(point[axis] for points in curves.values() for point in points) for axis in (0, 1))
    x_range, y_range = _range(steps), _range(without_outliers(values))
    width, height = Chart.right - Chart.left, Chart.bottom - Chart.top

    def x(value: float) -> float:
        return round(Chart.left + width * (value - x_range[0]) / (x_range[1] - x_range[0]), 1)

    def y(value: float) -> float:
        return round(Chart.bottom - height * (value - y_range[0]) / (y_range[1] - y_range[0]), 1)

    lines = [
        Line(name.replace("/", " "), points[-1][1], " ".join(f"{x(step)},{y(value)}" for step, value in points))
        for name, points in curves.items()
    ]
    return Chart(
        title,
        lines,
        x_ticks=[(x(tick), f"{tick:g}") for tick, _ in ticks(*x_range) if float(tick).is_integer()],
        y_ticks=[(y(tick), text) for tick, text in ticks(*y_range)],
        marked=x(epoch) if epoch is not None and x_range[0] <= epoch <= x_range[1] else None,
        cut=values[-1] if values[-1] > y_range[1] else None,
    )


def without_outliers(values: list[float]) -> list[float]:
    """Sorted values without the highest few, if these would leave the others a small part of a chart.

    Outliers are at most a twentieth of the values, or two, and five times as far above the lowest value as the others.

    >>> without_outliers([0.1] * 6 + [0.2, 0.3, 6.0, 7.0])[-1], without_outliers([0.1] * 6 + [0.2, 0.3, 0.6, 0.9])[-1]
    (0.3, 0.9)
    """
    usual = values[: -max(2, len(values) // 20)] if len(values) >= MIN_POINT else values
    limit = values[0] + OUTLYING * (usual[-1] - values[0])
    return [value for value in values if value <= limit] if limit > values[0] else values


def _range(values: list[float]) -> tuple[float, float]:
    """Least and greatest of sorted values, apart from each other."""
    low, high = values[0], values[-1]
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round numbers from `low` to `high`, three to seven of them, with their texts.

    >>> [text for _, text in ticks(0.12, 0.4)], [text for _, text in ticks(1, 300)]
    (['0.15', '0.20', '0.25', '0.30', '0.35', '0.40'], ['50', '100', '150', '200', '250', '300'])
    """
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(number * step, f"{number * step:.{digits}f}") for number in numbers]
