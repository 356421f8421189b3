"""What the page of predict shows of each image: a small picture, its objects, and how uncertain the network is."""

from __future__ import annotations

import io
import math
from typing import Any, NamedTuple

import numpy as np

from images.drawing import input_picture, outlines, picture_range
from images.readers import Frame, drop_cached_pages
from prediction.digits import ObjectNumbers
from prediction.outputs import ObjectBand, outline_colours
from prediction.predictor import Predictor
from prediction.tiling import Band

NUM = 100  # images on the page, the most uncertain ones
SIDE, SIDE_OF_ALL = 1024, 4096  # [px] at most of a picture, and of the square that all of them would fill
WHITE, BLACK = 254, 255  # colours of numbers and their rims in the palette of a map; 0 is transparent


class Preview(NamedTuple):
    """An image on the page; the pictures are PNGs of every n-th row and column."""

    frame: int  # its number
    shape: tuple[int, int]  # height and width of the image [px]
    uncertainty: float  # see `uncertainty`
    picture: bytes
    outlines: bytes  # of objects, or without those of classes; transparent elsewhere
    classes: np.ndarray  # (N,) class index of each object
    area: np.ndarray  # (N,) of each [px]


def uncertainty(probability: np.ndarray) -> np.ndarray:
    """Entropy (h, W) of a probability (K, h, W) of each class or of one of two; 1 where all are equally probable.

    >>> uncertainty(np.array([[[0.5, 1.0]]])).tolist()
    [[1.0, 0.0]]
    """
    p = np.concatenate([probability, 1 - probability]) if len(probability) == 1 else probability
    return np.abs((p * np.log(np.maximum(p, np.finfo(np.float32).tiny))).sum(0)) / math.log(len(p))


class PreviewMaker:
    """Makes the preview of an image from its bands, which come from top to bottom."""

    def __init__(self, number: int, frame: Frame, num_frame: int, predictor: Predictor) -> None:
        self.number, self.frame, self.predictor = number, frame, predictor
        self.shape = frame.open().shape[:2]
        side = min(SIDE, SIDE_OF_ALL // math.isqrt(min(num_frame, NUM)))
        self.step = -(-max(self.shape) // side)  # rounded up
        self._rows: dict[str, list[np.ndarray]] = {"pixels": [], "uncertainty": [], "classes": [], "objects": []}
        self._last: ObjectBand | None = None

    def _add(self, name: str, rows: slice, values: np.ndarray) -> None:
        """Keep every n-th row and column of a band (h, W, ...)."""
        self._rows[name].append(values[-rows.start % self.step :: self.step, :: self.step].copy())

    def add(self, band: Band) -> None:
        """Add a band of the probability (K, h, W)."""
        rows, background = band.rows, self.predictor.background
        few = band.values[:, -rows.start % self.step :: self.step, :: self.step]
        self._rows["uncertainty"].append(uncertainty(few))
        classes = few.argmax(0) if len(few) > 1 else few[0] > self.predictor.threshold
        self._rows["classes"].append(np.where(classes == background, 0, classes + np.uint8(1)))
        image = self.frame.open()
        self._add("pixels", rows, np.asarray(image[rows]))
        drop_cached_pages(image)

    def add_objects(self, band: ObjectBand) -> None:
        """Add a band of objects."""
        self._add("objects", band.rows, band.objects)
        self._last = band

    def finish(self) -> Preview:
        """The preview, after the last band."""
        rows = {name: np.concatenate(parts) for name, parts in self._rows.items() if parts}
        last, classes = self._last, np.zeros(0, np.int64)
        area = classes
        if last is not None:
            numbers = np.flatnonzero(last.area[1:]) + 1
            classes, area = last.class_of[numbers], last.area[numbers]
        objects = rows.get("objects", rows["classes"])
        picture = input_picture(rows["pixels"].astype(np.float32), picture_range(rows["pixels"]))
        colours = last.class_of[objects] + 1 if last is not None else objects
        drawn = np.where(outlines(objects), colours, 0).astype(np.uint8)
        palette = np.zeros((256, 3), np.uint8)
        named = outline_colours(self.predictor.info.num_class, self.predictor.background)
        palette[1 : len(named) + 1], palette[WHITE] = named, 255
        if last is not None:
            ObjectNumbers().draw(drawn, objects, BLACK, WHITE)
        of_map = _png(drawn, palette)
        return Preview(self.number, self.shape, float(rows["uncertainty"].mean()), _png(picture), of_map, classes, area)


def _png(picture: np.ndarray, palette: np.ndarray | None = None) -> bytes:
    """PNG of a picture, or of a map with a palette (256, 3) whose first colour is transparent."""
    from PIL import Image

    image, file, options = Image.fromarray(picture), io.BytesIO(), dict[str, Any]()
    if palette is not None:
        image.putpalette(palette.tobytes())
        options = {"transparency": 0}
    image.save(file, "PNG", compress_level=3, **options)
    return file.getvalue()


def most_uncertain(previews: list[Preview]) -> list[Preview]:
    """The most uncertain images first, and those without pictures after the first `NUM`."""
    ordered = sorted(previews, key=lambda preview: (-preview.uncertainty, preview.frame))
    return ordered[:NUM] + [preview._replace(picture=b"", outlines=b"") for preview in ordered[NUM:]]
