"""Images at the pixel size of a training, and probabilities at that of the images: `--scale`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from description import DataInfo
from flags import LARGEST_SCALE, scale_factors
from images.geometry import Geometry
from images.readers import Frame, geometries_of
from images.resample import resampled
from images.rows import LazyImage, Rows, listed
from images.writers import RowFile
from prediction.objects import ObjectFilter
from prediction.tiling import Band
from utils import UserError

SAME_SIZE = 1.02  # factor between two pixel sizes up to which an image is not resampled, which would only blur it
BAND_HEIGHT, BAND_VALUES = 512, 2**24  # largest band that is brought back: rows, and values over the full width
ADVICE = "give --scale FACTOR, how many times larger the image becomes"


class Scale(NamedTuple):
    """How many times larger an image becomes for the network."""

    y: float = 1.0
    x: float = 1.0

    def shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of an image (H, W, ...) at this scale."""
        return max(round(shape[0] * self.y), 1), max(round(shape[1] * self.x), 1)

    def filter(self, trained: ObjectFilter) -> ObjectFilter:
        """Filter in pixels of the image, from one in pixels of the training.

        >>> Scale(2, 2).filter(ObjectFilter(24)).min_size, Scale(0.5, 0.5).filter(ObjectFilter(24)).min_size
        (6, 96)
        """
        return trained._replace(min_size=math.ceil(trained.min_size / (self.y * self.x)))

    def __str__(self) -> str:
        """Factor as `--scale` takes it."""
        return f"{self.y:.4g}" if self.y == self.x else f"{self.y:.4g},{self.x:.4g}"


def scales_of(wanted: str, frames: Sequence[Frame], trained: Mapping[Path, DataInfo]) -> list[Scale]:
    """Scale of each frame for `--scale`; `auto` takes it from the pixel sizes of its file and of the training."""
    if factors := scale_factors(wanted):
        return [Scale(*factors)] * len(frames)
    size = _trained_size(trained)
    return [_scale_to(size, frame, geometry) for frame, geometry in zip(frames, geometries_of(frames), strict=True)]


def _trained_size(trained: Mapping[Path, DataInfo]) -> tuple[float, float]:
    """Height and width [µm] of a pixel in the training of all networks."""
    sizes: dict[str, tuple[float, float]] = {}
    for path, info in trained.items():
        if not (info.profile and info.profile.pixel_size):
            raise UserError(f"--scale auto: {path}: the pixel size of its training is unknown: {ADVICE}")
        height, width = info.profile.pixel_size
        sizes[f"{height:.3g} x {width:.3g} µm"] = (height, width)
    if len(sizes) > 1:
        raise UserError(f"--scale auto: the networks were trained with pixels of {' and '.join(sizes)}: {ADVICE}")
    return next(iter(sizes.values()))


def _scale_to(size: tuple[float, float], frame: Frame, geometry: Geometry) -> Scale:
    """Scale at which the pixels of a frame have a size [µm]."""
    if not geometry.pixel_size:
        raise UserError(f"--scale auto: {frame}: its pixel size is unknown ({geometry.unknown}): {ADVICE}")
    factors = []
    for of_image, side in zip(geometry.pixel_size, size, strict=True):
        factor = of_image / side
        if not 1 / LARGEST_SCALE <= factor <= LARGEST_SCALE:
            what = f"{frame}: a pixel has {of_image:.4g} µm, in the training {side:.4g} µm"
            rule = f"they may differ by a factor of {LARGEST_SCALE:g}"
            raise UserError(f"--scale auto: {what}: {rule}: check the unit, or {ADVICE}")
        factors.append(1.0 if 1 / SAME_SIZE < factor < SAME_SIZE else factor)
    return Scale(*factors)


def scale_line(scales: Sequence[Scale]) -> str:
    """Line that tells how images are scaled."""
    return f"scale of the images for the network: {listed(list(dict.fromkeys(scales)), most=5)}"


def store(file: RowFile, band: Band) -> None:
    """Add a band (K, h, w) of a probability to a temporary file."""
    file.append(band.values.transpose(1, 2, 0).reshape(band.values.shape[1], -1))


def stored(file: RowFile, num_channel: int) -> LazyImage:
    """Probability (h, w, K) in a temporary file."""
    shape = (file.shape[0], file.shape[1] // num_channel, num_channel)
    return LazyImage(shape, file.dtype, lambda top, bottom: file[top:bottom].reshape(bottom - top, *shape[1:]))


def restored(probability: Rows, shape: tuple[int, int]) -> Iterator[Band]:
    """Bands (K, H', W) of a probability (h, w, K) at the size of the image (H, W) that was scaled."""
    image = resampled(probability, shape)
    for rows in restored_rows(shape, image.shape[2]):
        values = np.ascontiguousarray(image[rows].transpose(2, 0, 1))
        yield Band(rows, np.clip(values, 0, 1, out=values))  # weights add up to 1 + 1e-7


def restored_rows(shape: tuple[int, int], num_channel: int) -> list[slice]:
    """Rows of each band of an image (H, W) that is brought back.

    >>> restored_rows((1000, 2000), 1), len(restored_rows((1000, 200_000), 1))
    ([slice(0, 512, None), slice(512, 1000, None)], 13)
    """
    height, width = shape
    num = min(max(BAND_VALUES // (width * num_channel), 1), BAND_HEIGHT)
    return [slice(top, min(top + num, height)) for top in range(0, height, num)]
