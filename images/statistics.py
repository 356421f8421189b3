"""Statistics of images, including those that are read by rows, and of the objects in labels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from images.rows import Rows
from utils import UserError

ONE_PIECE = 2**22  # [px] larger images are measured in parts
LARGEST = 1e150  # largest pixel whose square float64 can hold, with room for a sum
LABEL_TILE = 2048  # [px] height and width of the parts of a label whose objects are measured
SPECKS = 3e-4  # fraction of the area of all objects that specks of the annotation make up
FEW_HOLES = 0.01  # as many holes per object are taken for errors of the annotation


def image_statistics(image: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) float64 of the channels of an image (H, W, C); the latter is 1 of a constant."""
    height, width = image.shape[:2]
    moments = Moments()
    is_small = height * width < ONE_PIECE
    num_read = height if is_small else 512  # rows read at once: each segment of a file is decoded once
    num_add = height if is_small else max(2**18 // width, 1)  # rows that stay in the processor's cache as float64
    for top in range(0, height, num_read):
        rows = image[top : min(top + num_read, height)]
        for first in range(0, len(rows), num_add):
            moments.add(rows[first : first + num_add])
    return moments.statistics()


class Moments:
    """Mean and standard deviation of each channel, for pixels that are added in parts.

    Squares are summed about the mean of each part, so that a large offset costs no precision:
    T. F. Chan, G. H. Golub and R. J. LeVeque, The American Statistician 37 (1983), equation 2.1.
    """

    def __init__(self) -> None:
        self.count: int = 0
        self.mean: np.ndarray = np.zeros(())  # (C,)
        self.square: np.ndarray = np.zeros(())  # (C,) sum of squared differences from the mean

    def add(self, image: np.ndarray) -> None:
        """Add pixels (H, W, C)."""
        pixels = image.reshape(-1, image.shape[2]).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # `statistics` refuses the result
            shift = pixels[0].copy() if is_wide(image.dtype) else np.float64(0)
            pixels -= shift
            mean = pixels.mean(0)
            square = ((pixels - mean) ** 2).sum(0)
            difference, count = mean + shift - self.mean, self.count + len(pixels)
            self.square = self.square + square + difference**2 * (self.count * len(pixels) / count)
            self.mean = self.mean + difference * (len(pixels) / count) if self.count else mean + shift
            self.count = count

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (C,); the latter is 1 of a constant channel."""
        std = self.std
        if not np.isfinite([self.mean, std]).all():
            raise UserError("it holds NaN, infinity or numbers beyond 1e150: repair the image")
        return self.mean, np.where(std > 0, std, 1.0)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation (C,), also where it is 0."""
        return np.sqrt(self.square / self.count)


def is_wide(dtype: np.dtype) -> bool:
    """Whether float32 can't hold all values of a type: integers from 32 bits on, and float64."""
    return not np.can_cast(dtype, np.float32)


class ObjectSizes:
    """Areas and holes of the objects of each class, the 4-connected regions in labels that are added one by one.

    Those that touch the border of the label or of a tile of it, or a pixel that is not annotated (its index is not
    below `num_class`), may be cut and are not measured.
    """

    def __init__(self, num_class: int) -> None:
        self.areas: list[list[int]] = [[] for _ in range(num_class)]
        self._num_hole = [0] * num_class

    def add(self, label: np.ndarray) -> None:
        """Measure the objects of a label (H, W) of class indices, in tiles that need little memory."""
        for top in range(0, label.shape[0], LABEL_TILE):
            for left in range(0, label.shape[1], LABEL_TILE):
                self._add_tile(np.asarray(label[top : top + LABEL_TILE, left : left + LABEL_TILE]))

    def _add_tile(self, label: np.ndarray) -> None:
        cut = np.ones(label.shape, bool)
        cut[1:-1, 1:-1] = ndimage.binary_dilation(label >= len(self.areas))[1:-1, 1:-1]
        for k, areas in enumerate(self.areas):
            regions = ndimage.label(label == k)[0]
            area = np.bincount(regions.ravel())
            area[0], area[regions[cut]] = 0, 0
            areas += area[area > 0].tolist()
            self._num_hole[k] += _count_holes(regions, cut)

    @property
    def min_size(self) -> list[int]:
        """Area [px] that hardly any object of each class falls below; 0 if there are no objects.

        It is half of the area up to which objects make up 0.03 % of the area of all. Specks that the annotation left,
        which may be a tenth of the objects by number, have next to no area.
        """
        sizes = []
        for areas in map(np.sort, self.areas):
            total = np.cumsum(areas)
            sizes.append(int(areas[np.searchsorted(total, SPECKS * total[-1])]) // 2 if len(areas) else 0)
        return sizes

    @property
    def fill_holes(self) -> list[bool]:
        """Whether there are objects of a class, and at most one hole per hundred of them."""
        pairs = zip(self.areas, self._num_hole, strict=True)
        return [bool(areas) and num_hole <= FEW_HOLES * len(areas) for areas, num_hole in pairs]


def _count_holes(regions: np.ndarray, cut: np.ndarray) -> int:
    """Number of holes in regions (H, W): 4-connected parts of the rest in a single region, none of which is `cut`."""
    rest, num = ndimage.label(regions == 0)
    lowest, highest = np.full(num + 1, np.iinfo(regions.dtype).max), np.zeros(num + 1, regions.dtype)
    for hole, region in neighbours(rest, regions):
        edge = (hole > 0) & (region > 0)
        np.minimum.at(lowest, hole[edge], region[edge])
        np.maximum.at(highest, hole[edge], region[edge])
    is_hole = lowest == highest
    is_hole[rest[cut]] = False
    return int(is_hole[1:].sum())


def neighbours(one: np.ndarray, other: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parts of two (H, W) images whose pixels are 4-adjacent, for each of the four directions."""
    for first, second in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        yield one[first], other[second]
        yield one[second], other[first]
