"""The tables of the objects: a row for each, a summary with a row for each image, and one for each object in 3-D."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from files import atomic_write
from images.geometry import Geometry
from images.notes import say_notes
from images.readers import Frame, geometries_of, read_geometry
from prediction.measure import Measures
from prediction.output_files import OutputFiles
from prediction.outputs import Table
from utils import csv_cell, echo, names_below, printable

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


@dataclass(frozen=True)
class ObjectTables:
    """The objects of each frame as rows of the tables."""

    files: OutputFiles
    objects: list[FrameObjects]  # of each frame
    shapes: Sequence[tuple[int, ...]]  # height and width [px], ... of each frame
    class_names: list[str]  # by class index
    classes: list[int]  # those that have objects
    stacks: list[int]  # number of the stack of each frame, from 0; empty if objects are not linked

    def write(self) -> None:
        """Write each table, and print which images have no pixel size."""
        for name, path in self.files.tables.items():
            with atomic_write(path, "w") as file:
                table = csv.writer(file, lineterminator="\n")
                for number, columns in enumerate(TABLES[name](self)):
                    if number == 0:
                        table.writerow(map(csv_cell, columns))
                    for row in zip(*map(_texts, columns.values()), strict=True):
                        table.writerow(map(csv_cell, row))
        _say_what_is_unknown(self.files, self._geometries)

    @cached_property
    def _geometries(self) -> list[Geometry]:
        return geometries_of(self.files.frames)

    @cached_property
    def _planes(self) -> list[dict[str, Any]]:
        return _planes(self.files.frames)

    @cached_property
    def _images(self) -> list[tuple[str, str]]:
        """Short name and path of the image of each frame; some names are no UTF-8."""
        frames = self.files.frames
        short = names_below([*dict.fromkeys(frame.path for frame in frames)])
        series = [f":{frame.series}" if frame.series else "" for frame in frames]
        pairs = zip(frames, series, strict=True)
        return [(printable(f"{short[frame.path]}{name}"), printable(f"{frame.path}{name}")) for frame, name in pairs]

    def rows(self) -> Iterator[Columns]:
        """Columns of the objects of each frame; several stacks, each numbered for itself, get a column."""
        is_in_micron = any(geometry.pixel_size for geometry in self._geometries)
        for part in self.objects:
            frame, measures = part.frame, part.measures
            assert measures is not None
            image, path = self._images[frame]
            columns: Columns = {"image": image, "section": self.files.section(frame)} | self._stack(frame)
            columns |= {"object": measures.number} | self._planes[frame]
            if len(self.classes) > 1:
                columns |= {"class": [self.class_names[index] for index in part.classes]}
            columns |= _measures_of(measures, self._geometries[frame].pixel_size, is_in_micron)
            yield _filled(columns | {"path": path}, len(measures.number))

    def summary(self) -> Iterator[Columns]:
        """Columns of each frame: number, density and size of its objects; a size that is unknown is blank."""
        for part in self.objects:
            assert part.measures is not None
            frame, areas, pixel = part.frame, part.measures.area, self._area_of(part.frame)
            num, num_pixel = len(areas), self.shapes[frame][0] * self.shapes[frame][1]
            image, path = self._images[frame]
            columns: Columns = {"image": image, "section": self.files.section(frame), "count": num}
            if len(self.classes) > 1:
                columns |= {f"count_{self.class_names[k]}": int((part.classes == k).sum()) for k in self.classes}
            mean = areas.mean() if num else np.nan
            columns |= self._stack(frame) | self._planes[frame] | {"area_fraction": areas.sum() / num_pixel}
            columns |= {"mean_area_px": mean, "mean_area_um2": mean * pixel}
            yield _filled(columns | {"density_per_mm2": num / (num_pixel * pixel) * 1e6, "path": path}, 1)

    def linked(self) -> Iterator[Columns]:
        """Columns of the objects of each stack in 3-D; a size that is unknown is blank."""
        for stack in dict.fromkeys(self.stacks):
            yield self._linked([part for part in self.objects if self.stacks[part.frame] == stack])

    def _linked(self, parts: list[FrameObjects]) -> Columns:
        """Columns of the objects through the sections of one stack."""
        frames, nums = [part.frame for part in parts], [len(part.numbers) for part in parts]
        numbers, classes = (np.concatenate([getattr(part, name) for part in parts]) for name in ("numbers", "classes"))
        area, centre = (np.concatenate([getattr(part.measures, name) for part in parts]) for name in ("area", "centre"))
        section = np.repeat([self.files.section(frame) for frame in frames], nums)
        z = np.repeat([self._planes[frame].get("z") or number for number, frame in enumerate(frames, 1)], nums) - 1
        objects, first, index, num_section = np.unique(
            numbers, return_index=True, return_inverse=True, return_counts=True
        )
        last = len(numbers) - 1 - np.unique(numbers[::-1], return_index=True)[1]  # of its sections, as first is
        image, path = self._images[frames[0]]
        columns: Columns = {"image": image, "object": objects, "first_section": section[first]}
        columns |= {"last_section": section[last], "num_section": num_section} | self._stack(frames[0])
        columns |= {axis: n for axis, n in self._planes[frames[0]].items() if axis == "t"}
        columns |= {"class": [self.class_names[k] for k in classes[first]]} if len(self.classes) > 1 else {}
        columns["volume_voxels"] = np.bincount(index, area).astype(np.int64)
        spacing = read_geometry([self.files.frames[frame] for frame in frames]).pixel.get("Z", np.nan)
        columns["volume_um3"] = columns["volume_voxels"] * self._area_of(frames[0]) * spacing
        for axis, values in zip("zyx", (z, *centre.T), strict=True):
            columns[f"centre_{axis}_px"] = np.bincount(index, area * values) / columns["volume_voxels"]
        geometry = self._geometries[frames[0]]
        pixel = geometry.pixel if geometry.pixel_size else {}
        columns |= {
            f"centre_{axis}_um": columns[f"centre_{axis}_px"] * pixel.get(axis.upper(), np.nan) for axis in "zyx"
        }
        return _filled(columns | {"path": path}, len(objects))

    def _stack(self, frame: int) -> Columns:
        """Number of the stack of a frame, from 1, if there are several."""
        return {"stack": self.stacks[frame] + 1} if len({*self.stacks}) > 1 else {}

    def _area_of(self, frame: int) -> float:
        """Area of a pixel [micron²]; NaN if it is unknown."""
        height, width = self._geometries[frame].pixel_size or (np.nan, np.nan)
        return height * width


TABLES: dict[str, Callable[[ObjectTables], Iterator[Columns]]] = {
    "table": ObjectTables.rows,
    "summary": ObjectTables.summary,
    "linked": ObjectTables.linked,
}


def _filled(columns: Columns, num: int) -> Columns:
    """Columns of `num` values each, where one that is the same for all rows is given once."""
    return {name: [values] * num if np.ndim(values) == 0 else values for name, values in columns.items()}


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
        echo(f"{files.tables[Table.name]}: {none if len(notes) == len(geometries) else some}")
    say_notes(notes)


def _texts(column: Any) -> list[Any]:
    """Values of a column, fractions as texts; NaN, what is unknown, is blank."""
    return [
        ("" if np.isnan(value) else f"{value:.8g}") if isinstance(value, float | np.floating) else value
        for value in column
    ]


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
