"""The table of the objects: a row for each, with its measures in pixels and in micron."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import Any

import numpy as np

from files import atomic_write
from images.geometry import Geometry
from images.notes import say_notes
from images.readers import Frame, geometries_of
from prediction.measure import Measures
from prediction.output_files import OutputFiles
from utils import csv_cell, echo, printable

BOX = ("top", "left", "bottom", "right")
Columns = dict[str, Any]  # name -> (N,) values
PixelSize = tuple[float, float] | None  # height and width [micron]; None: unknown


@dataclass(frozen=True)
class FrameObjects:
    """The objects of a frame."""

    frame: int  # its number
    numbers: np.ndarray  # (N,)
    classes: np.ndarray  # (N,) class index of each
    measures: Measures | None  # of each, if there is a table


def write_table(files: OutputFiles, objects: list[FrameObjects], class_names: list[str], stacks: list[int]) -> None:
    """Write the measures of the objects of each frame, and print which images have no pixel size.

    `class_names` are empty if all objects are of one class, `stacks` (number of the stack of each frame, from 0) if
    objects are not linked; several stacks, each numbered for itself, get a column.
    """
    assert files.table is not None
    geometries, planes, has_stacks = geometries_of(files.frames), _planes(files.frames), len({*stacks}) > 1
    is_in_micron = any(geometry.pixel_size for geometry in geometries)
    with atomic_write(files.table, "w") as file:
        table = csv.writer(file, lineterminator="\n")
        for part in objects:
            frame, measures = files.frames[part.frame], part.measures
            assert measures is not None
            # some names are no UTF-8
            name = printable(f"{frame.path}:{frame.series}" if frame.series else str(frame.path))
            num = len(measures.number)
            columns: Columns = {"image": [name] * num, "section": [files.section(part.frame)] * num}
            columns |= {"stack": [stacks[part.frame] + 1] * num} if has_stacks else {}
            columns |= {"object": measures.number} | {axis: [n] * num for axis, n in planes[part.frame].items()}
            columns |= {"class": [class_names[index] for index in part.classes]} if class_names else {}
            columns |= _measures_of(measures, geometries[part.frame].pixel_size, is_in_micron)
            if part is objects[0]:
                table.writerow(map(csv_cell, columns))
            for row in zip(*map(_texts, columns.values()), strict=True):
                table.writerow(map(csv_cell, row))
    _say_what_is_unknown(files, geometries)


def _say_what_is_unknown(files: OutputFiles, geometries: list[Geometry]) -> None:
    """Print how many images have no pixel size, and why."""
    notes = [
        (frame.path, f"pixel size unknown: {geometry.unknown}")
        for frame, geometry in zip(files.frames, geometries, strict=True)
        if geometry.unknown
    ]
    some = f"{len(notes)} of {len(geometries)} images have no pixel size, their measures in micron are blank"
    if notes:
        none = "measures in px only, the images have no pixel size"
        echo(f"{files.table}: {none if len(notes) == len(geometries) else some}")
    say_notes(notes)


def _texts(column: Any) -> Any:
    """Values of a column, fractions as texts."""
    has_fractions = isinstance(column, np.ndarray) and column.dtype.kind == "f"
    return [f"{value:.8g}" for value in column] if has_fractions else column


def _planes(frames: list[Frame]) -> list[dict[str, Any]]:
    """Columns `t` and `z`, the numbers of each frame along T and Z in its file; one that no image has is left out.

    An axis of unknown meaning counts as Z, as for `number_stacks`.
    """
    planes: list[dict[str, Any]] = []
    for numbers in (frame.numbers for frame in frames):
        z = next((numbers[axis] for axis in "ZQI" if axis in numbers), "")
        planes.append({"t": numbers.get("T", ""), "z": z})
    present = [axis for axis in "tz" if any(plane[axis] for plane in planes)]
    return [{axis: plane[axis] for axis in present} for plane in planes]


def _measures_of(measures: Measures, pixel: PixelSize, is_in_micron: bool) -> Columns:
    """Columns of the measures in pixels; in micron too, which are blank without a pixel size."""
    columns = _lengths(measures, (1, 1), "px")
    columns |= {"eccentricity": measures.eccentricity(pixel or (1.0, 1.0)), "solidity": measures.solidity}
    num_channel = measures.mean.shape[1]
    for channel in range(num_channel):
        ending = f"_{channel + 1}" if num_channel > 1 else ""
        columns |= {f"mean{ending}": measures.mean[:, channel], f"std{ending}": measures.std[:, channel]}
    if is_in_micron:
        in_micron = _lengths(measures, pixel or (1, 1), "um")
        columns |= in_micron if pixel else {name: [""] * len(measures.area) for name in in_micron}
    return columns


def _lengths(measures: Measures, pixel: tuple[float, float], unit: str) -> Columns:
    """Columns in a unit of length, for pixels of this height and width."""
    height, width = pixel
    centre, box = measures.centre * (height, width), measures.box * (height, width, height, width)
    columns: Columns = {"area_px" if unit == "px" else "area_um2": measures.area * height * width}
    columns |= {f"centre_{axis}_{unit}": centre[:, index] for index, axis in enumerate("yx")}
    columns |= {f"box_{side}_{unit}": box[:, index] for index, side in enumerate(BOX)}
    return columns | {f"diameter_{unit}": measures.diameter(pixel)}
