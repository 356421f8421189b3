"""What is written of objects besides their numbers: measures, outlines for Fiji, and pictures with outlines."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from files import atomic_write
from images.drawing import Range, grey_range, input_picture, outlines, overlay_picture, palette, picture_channels
from images.readers import Frame, Rows, drop_cached_pages, read_geometry
from prediction.measure import Measures, ObjectMeasurer
from prediction.output_files import OutputFiles
from prediction.rois import ObjectOutlines, RoiWriter
from prediction.tiling import Band
from utils import csv_cell, echo, printable

SHOWN_FRAMES, SHOWN_ROWS = 8, 32  # sections of a file, and rows of each, that its contrast is taken from
BOX = ("top", "left", "bottom", "right")
Columns = dict[str, Any]  # name -> (N,) values
PixelSize = tuple[float, float] | None  # height and width [micron]; None: unknown
Beside = tuple[np.ndarray | None, np.ndarray | None]  # the rows (W,) above and below a band


@dataclass(frozen=True)
class FrameObjects:
    """The objects of a frame.

    Attributes
    ----------
    frame : int
        Number of the frame.
    numbers, classes : ndarray
        (N,) number and class index of each.
    measures : Measures or None
        Measures of each, if there is a table.
    """

    frame: int
    numbers: np.ndarray
    classes: np.ndarray
    measures: Measures | None


class FrameOutputs:
    """Makes the outputs of the objects of one frame, band by band.

    Parameters
    ----------
    files : OutputFiles
        Files to write.
    frame : int
        Number of the frame.
    rois : RoiWriter or None
        Takes the outlines.
    colours : ndarray
        (K, 3) uint8 of the outlines in an overlay, for each class.
    value_range : Range
        Grey values shown as black and white in an overlay.
    """

    def __init__(
        self, files: OutputFiles, frame: int, rois: RoiWriter | None, colours: np.ndarray, value_range: Range
    ) -> None:
        self.files, self.frame, self.colours, self.value_range = files, frame, colours, value_range
        self.image: Rows = files.frames[frame].open()  # without its context
        self.measurer = ObjectMeasurer(self.image.shape[2]) if files.table else None
        self.outlines = ObjectOutlines() if rois else None
        self.rois = rois

    def add(self, band: Band, beside: Beside, class_of: np.ndarray) -> dict[str, np.ndarray]:
        """Add the next band of objects with the rows beside it, and the class index (N + 1,) of each number until now.

        Returns
        -------
        dict
            Rows (1, h, W) of cells and (1, h, W, 3) of the overlay, where they are wanted.
        """
        outputs: dict[str, np.ndarray] = {}
        if "cells" in self.files.outputs:
            outputs["cells"] = band.values[None]
        if self.measurer or "overlay" in self.files.outputs:
            pixels = np.asarray(self.image[band.rows])
            if self.measurer:
                self.measurer.add(band.rows.start, band.values, pixels)
            if "overlay" in self.files.outputs:
                outputs["overlay"] = self._overlay(band.values, beside, pixels, class_of)[None]
            drop_cached_pages(self.image)
        if self.outlines:
            self._write_outlines(self.outlines.add(band.rows.start, band.values))
        return outputs

    def _overlay(self, objects: np.ndarray, beside: Beside, pixels: np.ndarray, class_of: np.ndarray) -> np.ndarray:
        """Rows (h, W, 3) of the image with the outlines of the objects; row by row, to save memory for float values."""
        edge, colour_of = outlines(objects, *beside), self.colours[class_of]
        picture = np.empty((*objects.shape, 3), np.uint8)
        for row in range(len(objects)):
            here = slice(row, row + 1)
            shown = input_picture(pixels[here].astype(np.float64), self.value_range)
            picture[here] = overlay_picture(shown, edge[here], colour_of[objects[here]])
        return picture

    def _write_outlines(self, found: Iterable[tuple[int, np.ndarray]]) -> None:
        assert self.rois is not None
        numbers = enumerate(self.files.roi_files.values())
        file = next(file for file, frames in numbers if self.frame in frames)
        section, position = self.files.section(self.frame), self.files.position(self.frame)
        for number, outline in found:
            self.rois.keep(file, f"{section:04d}-{number:06d}", position, outline)

    def finish(self) -> Measures | None:
        """Write the last outlines, and return the measures of all objects."""
        if self.outlines:
            self._write_outlines(self.outlines.finish())
            if self.outlines.too_large:
                what = f"{len(self.outlines.too_large)} object(s) too large to be outlined"
                echo(f"note: {self.files.frames[self.frame]}: {what} (of more than 4096 x 4096 px)")
        return self.measurer.measures() if self.measurer else None


def with_rows_beside(bands: Iterable[Band]) -> Iterator[tuple[Band, Beside]]:
    """Bands of objects with the row (W,) above and below each; None at the ends of the image."""
    above, current = None, None
    for band in bands:
        if current is not None:
            yield current, (above, band.values[0])
            above = current.values[-1].copy()
        current = band
    if current is not None:
        yield current, (above, None)


def display_range(frames: list[Frame]) -> Range:
    """Grey values of a file's frames that are shown as black and white: one contrast for all of its sections."""
    values = []
    for frame in frames[:: -(-len(frames) // SHOWN_FRAMES)]:
        image = frame.open()
        for row in range(0, image.shape[0], -(-image.shape[0] // SHOWN_ROWS)):
            values.append(np.asarray(image[row : row + 1])[0, :, picture_channels(image.shape[2])])
    return grey_range(np.concatenate(values))


def outline_colours(num_class: int, background: int) -> np.ndarray:
    """Colours (K, 3) uint8 of the outlines of each class: those of the palette, with its black for the background."""
    colours = palette(num_class)
    colours[[0, background]] = colours[[background, 0]]
    return colours


def write_table(
    path: Path, files: OutputFiles, objects: list[FrameObjects], class_names: list[str] | None, stacks: list[int]
) -> None:
    """Write the measures of all objects, one row each, and say which images have no pixel size.

    Parameters
    ----------
    path : Path
        The table, CSV.
    files : OutputFiles
        Names of the images and their sections.
    objects : list of FrameObjects
        Objects of each frame, with measures.
    class_names : list of str or None
        Names of the classes, which get a column; None: all objects are of one class.
    stacks : list of int
        Number of the stack of each frame, from 0, if objects are linked; several stacks, each numbered for itself, get
        a column.
    """
    pixels, planes = _pixel_sizes(files.frames), _planes(files.frames)
    unknown, several = pixels.count(None), len({*stacks}) > 1
    with atomic_write(path, "w") as file:
        table = csv.writer(file, lineterminator="\n")
        for found in objects:
            frame, pixel, measures = files.frames[found.frame], pixels[found.frame], found.measures
            assert measures is not None
            place = {"image": _image_name(frame), "section": files.section(found.frame)}
            place |= {"stack": stacks[found.frame] + 1} if several else {}
            columns: Columns = {axis: [number] * len(measures.number) for axis, number in planes[found.frame].items()}
            columns |= {} if class_names is None else {"class": [class_names[index] for index in found.classes]}
            columns |= _columns_in_px(measures, pixel)
            columns |= _columns_in_micron(measures, pixel) if unknown < len(pixels) else {}
            if found is objects[0]:
                table.writerow(map(csv_cell, [*place, "object", *columns]))
            lists = [
                [f"{value:.8g}" for value in column] if _is_float(column) else column for column in columns.values()
            ]
            for number, *cells in zip(measures.number, *lists, strict=True):
                table.writerow(map(csv_cell, [*place.values(), number, *cells]))
    if unknown:
        some = f"{unknown} of {len(pixels)} images have no pixel size, their measures in micron are blank"
        echo(f"{path}: " + (some if unknown < len(pixels) else "measures in px only, the images have no pixel size"))


def _image_name(frame: Frame) -> str:
    """Name of a frame's image in a table: its file, and its series if outputs need it, as in `file.h5:/path`."""
    return printable(f"{frame.path}:{frame.series}" if frame.series else str(frame.path))  # some names are no UTF-8


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


def _is_float(column: Any) -> bool:
    """Whether a column holds numbers with fractions."""
    return getattr(column, "dtype", np.dtype(object)).kind == "f"


def _pixel_sizes(frames: list[Frame]) -> list[PixelSize]:
    """Pixel size of each frame; each series of a file has its own."""
    known: dict[tuple[Path, int], PixelSize] = {}
    sizes = []
    for frame in frames:
        series = frame.path, frame.series_number
        if series not in known:
            geometry = read_geometry([frame])
            is_known = geometry.unit == "micron" and {"X", "Y"} <= geometry.pixel.keys()
            known[series] = (geometry.pixel["Y"], geometry.pixel["X"]) if is_known else None
        sizes.append(known[series])
    return sizes


def _columns_in_px(measures: Measures, pixel: PixelSize) -> Columns:
    """Columns of a table that need no pixel size; the shape is that in micron where the pixels are no squares."""
    columns: Columns = {"area_px": measures.area}
    columns |= {f"centre_{axis}_px": measures.centre[:, place] for place, axis in enumerate("yx")}
    columns |= {f"box_{side}_px": measures.box[:, place] for place, side in enumerate(BOX)}
    columns |= {"diameter_px": measures.diameter()}
    columns |= {"eccentricity": measures.eccentricity(pixel or (1.0, 1.0)), "solidity": measures.solidity}
    num_channel = measures.mean.shape[1]
    for channel in range(num_channel):
        ending = f"_{channel + 1}" if num_channel > 1 else ""
        columns |= {f"mean{ending}": measures.mean[:, channel], f"std{ending}": measures.std[:, channel]}
    return columns


def _columns_in_micron(measures: Measures, pixel: PixelSize) -> Columns:
    """Columns of a table in micron; blank without a pixel size."""
    height, width = pixel or (1.0, 1.0)
    columns: Columns = {"area_um2": measures.area * height * width}
    centre, box = measures.centre * (height, width), measures.box * (height, width, height, width)
    columns |= {f"centre_{axis}_um": centre[:, place] for place, axis in enumerate("yx")}
    columns |= {f"box_{side}_um": box[:, place] for place, side in enumerate(BOX)}
    columns |= {"diameter_um": measures.diameter((height, width))}
    return columns if pixel else {name: [""] * len(measures.area) for name in columns}
