"""What predict can write: a class for each name of `--what`, with its type of file and what it makes of a band.

A new output is a class here, in `OUTPUTS`, and its name in config.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from config import Config
from images.drawing import Range, grey_range, input_picture, outlines, overlay_picture, palette, picture_channels
from images.readers import Frame
from images.rows import Rows
from prediction.digits import ObjectNumbers
from prediction.label_values import label_values
from prediction.measure import Measures, ObjectMeasurer
from prediction.objects import ObjectList
from prediction.predictor import Predictor
from prediction.rois import ObjectOutlines
from prediction.tiling import Band
from utils import FlagError, echo

CONTRAST_FRAMES, CONTRAST_ROWS = 8, 32  # sections of a file, and rows of each, that its contrast is taken from


@dataclass
class ObjectBand:
    """Some rows of the objects of a frame; the bands of a frame come from top to bottom, in one process."""

    frame: Frame
    rows: slice
    objects: np.ndarray  # (h, W) uint32, 0 for the background
    above: np.ndarray | None  # (W,) objects of the row above; None: the first band
    below: np.ndarray | None  # (W,) of the row below; None: the last band
    area: np.ndarray  # (N + 1,) [px] of each number until now
    class_of: np.ndarray  # (N + 1,) class index of each number

    @cached_property
    def pixels(self) -> np.ndarray:
        """Grey values (h, W, C) of these rows, without the context of the frame."""
        return np.asarray(self.frame.open()[self.rows])


def object_bands(frame: Frame, bands: Iterable[Band], class_ids: Rows | None, foreground: int) -> Iterator[ObjectBand]:
    """Bands of objects with the rows next to them; their class: `class_ids` (class + 1), else the foreground."""
    counts, above = ObjectList(), None
    following: Iterable[Band | None] = chain(bands, [None])
    for band, below in pairwise(following):
        assert band is not None
        counts.add(band.values, None if class_ids is None else class_ids[band.rows])
        classes = np.full(len(counts.area), foreground) if class_ids is None else counts.class_id.astype(np.int64) - 1
        next_row = below.values[0] if below else None
        yield ObjectBand(frame, band.rows, band.values, above, next_row, counts.area, classes)
        above = band.values[-1].copy()


class Output:
    """An output of predict."""

    name: str
    ending = ""  # of its file, such as ".csv"; empty: a picture in the format of `--output`
    dtype = "uint8"  # of a picture
    num_channel = 1
    is_labels = False  # whether the values are numbers of classes or objects
    is_rgb = False
    is_extra = False  # not asked for: a table next to the cells of several classes
    of_objects = False  # made of each `ObjectBand`, else of each `Band` of the probability (K, h, W)

    def __init__(self, predictor: Predictor, frames: list[Frame], config: Config) -> None:
        self.predictor = predictor

    def of(self, band: Any) -> Any:
        """What the writer of this output writes of a band, such as rows (C, h, W) of a picture; None: nothing."""
        raise NotImplementedError


class Probability(Output):
    """Probability (K, h, W) of class 1, or of each of K classes, in the type that `--dtype` names."""

    name = "probability"

    def __init__(self, predictor: Predictor, frames: list[Frame], config: Config) -> None:
        self.dtype, self.num_channel = config.dtype, predictor.num_channel

    def of(self, band: Band) -> np.ndarray:
        """Rows (K, h, W)."""
        return PROBABILITY[self.dtype](band.values)


def _to_bytes(probability: np.ndarray) -> np.ndarray:
    """Probability (K, h, W) in 8 bits; row by row, to save memory for a second band in float32."""
    scaled = np.empty(probability.shape, np.uint8)
    for row in range(probability.shape[1]):
        scaled[:, row] = np.round(probability[:, row] * np.float32(255))
    return scaled


PROBABILITY: dict[str, Callable[[np.ndarray], np.ndarray]] = {"uint8": _to_bytes, "float32": lambda values: values}


class Mask(Output):
    """Class of each pixel: 0 and 255 for two classes, else the class index."""

    name, is_labels = "mask", True

    def of(self, band: Band) -> np.ndarray:
        """Rows (1, h, W)."""
        full = np.uint8(255 if self.predictor.num_channel == 1 else 1)
        return class_indices(band.values, self.predictor.threshold)[None].astype(np.uint8) * full


class Labels(Output):
    """Label images as run_make_database.py reads them: the database's value of each class, or numbered objects."""

    name, is_labels = "labels", True

    def __init__(self, predictor: Predictor, frames: list[Frame], config: Config) -> None:
        super().__init__(predictor, frames, config)
        self.values = label_values(predictor.info)
        self.of_objects = self.values is None
        self.dtype = "uint32" if self.values is None else self.values.dtype.name
        self.is_rgb = self.values is not None and self.values.ndim == 2
        words = predictor.info.class_values
        if self.of_objects and words[predictor.background] == "object":
            raise FlagError(
                f"--what labels: they number the objects, so the background is {words[0]}: add --background"
            )

    def of(self, band: Any) -> np.ndarray:
        """Rows (1, h, W), or (1, h, W, 3) of colours."""
        if self.values is not None:
            return self.values[class_indices(band.values, self.predictor.threshold)][None]
        ignored = self.predictor.info.ignore
        skipped = band.objects >= ignored if isinstance(ignored, int | float) and ignored > 0 else np.uint32(0)
        return (band.objects + skipped)[None]  # no object has the number of what is not annotated


def class_indices(probability: np.ndarray, threshold: float) -> np.ndarray:
    """Class index (h, W) by a probability (K, h, W): the highest of several, else above the threshold."""
    return probability.argmax(0) if len(probability) > 1 else (probability[0] > threshold).astype(np.intp)


class Cells(Output):
    """Number of the object of each pixel, 0 for the background."""

    name, dtype, is_labels, of_objects = "cells", "uint32", True, True

    def of(self, band: ObjectBand) -> np.ndarray:
        """Rows (1, h, W)."""
        return band.objects[None]


class Table(Output):
    """Measures of the objects, which object_table.py writes at the end, with a summary."""

    name, ending, of_objects = "table", ".csv", True
    measures: Measures | None = None  # of the frame whose last band came

    def __init__(self, predictor: Predictor, frames: list[Frame], config: Config) -> None:
        self.more = ("summary", "linked") if config.link else ("summary",)

    def of(self, band: ObjectBand) -> None:
        """Measure the objects."""
        if band.above is None:
            self._measurer = ObjectMeasurer(band.pixels.shape[2])
        self._measurer.add(band.rows.start, band.objects, band.pixels)
        if band.below is None:
            self.measures = self._measurer.measures()


class Overlay(Output):
    """The image with the outlines of its objects, in the colours of their classes, and their numbers."""

    name, is_rgb, of_objects = "overlay", True, True

    def __init__(self, predictor: Predictor, frames: list[Frame], config: Config) -> None:
        self.colours = outline_colours(predictor.info.num_class, predictor.background)
        self.has_numbers = config.numbers
        self._frames: dict[Path, list[Frame]] = {}  # of each file
        for frame in frames:
            self._frames.setdefault(frame.path, []).append(frame)
        self._ranges: dict[Path, Range] = {}  # grey values shown as black and white in the file read last

    def of(self, band: ObjectBand) -> np.ndarray:
        """Rows (1, h, W, 3); made row by row, to save memory for float values."""
        path = band.frame.path
        if path not in self._ranges:
            self._ranges = {path: display_range(self._frames[path])}
        edge, colour_of = outlines(band.objects, band.above, band.below), self.colours[band.class_of]
        picture = np.empty((*edge.shape, 3), np.uint8)
        for row in range(len(edge)):
            part = slice(row, row + 1)
            image = input_picture(band.pixels[part].astype(np.float64), self._ranges[path])
            picture[part] = overlay_picture(image, edge[part], colour_of[band.objects[part]])
        if band.above is None:
            self._numbers = ObjectNumbers()
        if self.has_numbers:
            self._numbers.draw(picture, band.objects)
        return picture[None]


def display_range(frames: list[Frame]) -> Range:
    """Grey values of a file's frames that are shown as black and white: one contrast for all of its sections."""
    values = []
    for frame in frames[:: -(-len(frames) // CONTRAST_FRAMES)]:
        image = frame.open()
        for row in range(0, image.shape[0], -(-image.shape[0] // CONTRAST_ROWS)):
            values.append(np.asarray(image[row : row + 1])[0, :, picture_channels(image.shape[2])])
    return grey_range(np.concatenate(values))


def outline_colours(num_class: int, background: int) -> np.ndarray:
    """Colours (K, 3) uint8 of the outlines of each class: those of the palette, with its black for the background."""
    colours = palette(num_class)
    colours[[0, background]] = colours[[background, 0]]
    return colours


class Rois(Output):
    """Outlines of the objects for Fiji."""

    name, ending, of_objects = "rois", ".zip", True

    def of(self, band: ObjectBand) -> list[tuple[int, np.ndarray]]:
        """Number and outline (N, 2) of each object that is complete."""
        if band.above is None:
            self._outlines = ObjectOutlines()
        complete = list(self._outlines.add(band.rows.start, band.objects))
        if band.below is None:
            complete += self._outlines.finish()
            if num := len(self._outlines.too_large):
                echo(f"note: {band.frame}: {num} object(s) too large to be outlined (of more than 4096 x 4096 px)")
        return complete


OUTPUTS = {output.name: output for output in (Probability, Mask, Labels, Cells, Table, Overlay, Rois)}


def make_outputs(config: Config, predictor: Predictor, frames: list[Frame]) -> dict[str, Output]:
    """Outputs by their names in `--what`, and a table next to the cells of several classes."""
    names = {*config.what.split(",")}
    is_extra = Cells.name in names and Table.name not in names and predictor.num_channel > 1
    names |= {Table.name} if is_extra else set()
    outputs: dict[str, Output] = {
        name: make(predictor, frames, config) for name, make in OUTPUTS.items() if name in names
    }
    if is_extra:
        outputs[Table.name].is_extra = True
    return outputs
