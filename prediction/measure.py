"""Measures of the objects of an image that is given band by band, as `skimage.measure.regionprops_table` has them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

PART = 2**20  # [px] of a band that are measured at once
CLOSE = 1e-9  # [px] a pixel so close to the convex hull lies in it


@dataclass(frozen=True)
class Runs:
    """Horizontal runs of pixels of one object, (N,) each, by object, then from top to bottom and left to right."""

    objects: np.ndarray  # number of the object
    rows: np.ndarray  # [px]
    first: np.ndarray  # column [px]
    last: np.ndarray  # column [px]

    def __getitem__(self, index: slice | np.ndarray) -> Runs:
        """Some of the runs."""
        return Runs(self.objects[index], self.rows[index], self.first[index], self.last[index])

    def by_object(self) -> Iterator[tuple[int, slice]]:
        """Number of each object, and the slice of its runs."""
        bounds = [*np.flatnonzero(np.diff(self.objects, prepend=-1)), len(self.objects)]
        for start, stop in pairwise(bounds):
            yield int(self.objects[start]), slice(start, stop)


def runs_of(objects: np.ndarray, top: int) -> Runs:
    """Runs of the objects (h, W) of a band that starts at row `top`."""
    change = np.ones((objects.shape[0], objects.shape[1] + 1), bool)
    change[:, 1:-1] = objects[:, 1:] != objects[:, :-1]
    row, first = np.nonzero(change[:, :-1])
    _, stop = np.nonzero(change[:, 1:])
    number = objects[row, first].astype(np.int64)
    order = np.argsort(number, kind="stable")
    order = order[number[order] > 0]
    return Runs(number[order], (row[order] + top).astype(np.int32), *(x[order].astype(np.int32) for x in (first, stop)))


def join_runs(parts: list[Runs]) -> Runs:
    """Runs of consecutive bands in one order."""
    columns = zip(*((part.objects, part.rows, part.first, part.last) for part in parts), strict=True)
    joined = Runs(*map(np.concatenate, columns))
    return joined[np.argsort(joined.objects, kind="stable")]


class Measures(NamedTuple):
    """Measures of the N objects of an image with C channels."""

    number: np.ndarray  # (N,) ascending
    area: np.ndarray  # (N,) [px]
    centre: np.ndarray  # (N, 2) row and column of the centre of mass [px]; the centre of the first pixel is (0, 0)
    box: np.ndarray  # (N, 4) first row, first column, and the row and column after the last one [px]
    covariance: np.ndarray  # (N, 3) of the coordinates of the pixels: of rows, of rows and columns, of columns [px²]
    solidity: np.ndarray  # (N,) area divided by that of the convex hull
    mean: np.ndarray  # (N, C) of the grey values of each channel
    std: np.ndarray  # (N, C)

    def diameter(self, pixel: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
        """Diameter (N,) of the circle of the same area, for pixels of this height and width."""
        return np.sqrt(4 / math.pi * self.area * pixel[0] * pixel[1])

    def eccentricity(self, pixel: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
        """Eccentricity (N,) of the ellipse of the same second moments: 0 is a circle, 1 a line."""
        height, width = pixel
        rows, mixed, columns = (self.covariance * (height**2, height * width, width**2)).T
        middle, half = (rows + columns) / 2, np.hypot((rows - columns) / 2, mixed)
        longest = middle + half
        return np.sqrt(np.clip(np.divide(2 * half, longest, out=np.zeros_like(half), where=longest > 0), 0, 1))


class Moments(NamedTuple):
    """Moments of the pixels of N objects, of V values each: row, column and grey values."""

    num: np.ndarray  # (N,) pixels
    mean: np.ndarray  # (V, N)
    m2: np.ndarray  # (V, N) sum of (value - mean)²
    mxy: np.ndarray  # (N,) sum of (row - mean row) (column - mean column)

    @classmethod
    def of(cls, index: np.ndarray, values: list[np.ndarray], num_object: int) -> Moments:
        """Moments of some pixels (M,), from the index of their object and their values; each object has pixels."""

        def total(of_pixels: np.ndarray) -> np.ndarray:
            return np.bincount(index, of_pixels, num_object)

        def distance(variable: int) -> np.ndarray:
            return values[variable] - mean[variable, index]

        num = np.bincount(index, minlength=num_object).astype(np.float64)
        mean = np.stack([total(value) / num for value in values])
        m2 = np.stack([total(distance(variable) ** 2) for variable in range(len(values))])
        return cls(num, mean, m2, total(distance(0) * distance(1)))

    def merge(self, other: Moments) -> Moments:
        """Moments of the pixels of both (Chan, Golub and LeVeque 1983, doi 10.1080/00031305.1983.10483115)."""
        num, shift = self.num + other.num, other.mean - self.mean
        weight = self.num * other.num / num
        mean = self.mean + shift * other.num / num
        m2 = self.m2 + other.m2 + weight * shift**2
        mxy = self.mxy + (other.mxy + weight * shift[0] * shift[1])
        return Moments(num, mean, m2, mxy)


class ObjectMeasurer:
    """Measures the objects of an image of some channels band by band, in memory that grows with their number only.

    `skimage.measure.regionprops` needs an object's crop whole, which may be as large as the image, with the grey values
    of bands that are gone when the object ends.
    """

    def __init__(self, num_channel: int) -> None:
        empty = np.zeros((2 + num_channel, 1))
        self._moments = Moments(np.zeros(1), empty, empty, np.zeros(1))  # of each number, 0 included
        self._extents: list[Runs] = []  # per row of an object one run, from its first to its last pixel
        self._hulls: dict[int, tuple[np.ndarray, int]] = {}  # vertices and area, of objects that seem complete

    def add(self, top: int, objects: np.ndarray, pixels: np.ndarray) -> None:
        """Add the next band: its first row, objects (h, W), and grey values (h, W, C)."""
        height = max(PART // objects.shape[1], 1)
        for row in range(0, len(objects), height):
            self._add_part(top + row, objects[row : row + height], pixels[row : row + height])
        if self._extents:
            extents = join_runs(self._extents)
            is_open = np.isin(extents.objects, np.unique(objects[-1]))
            self._close(extents[~is_open])
            self._extents = [extents[is_open]]

    def _add_part(self, top: int, objects: np.ndarray, pixels: np.ndarray) -> None:
        inside = np.flatnonzero(objects)
        if not len(inside):
            return
        number = objects.ravel()[inside]
        row, column = np.divmod(inside, objects.shape[1])
        values = [row + top, column, *pixels.reshape(-1, pixels.shape[-1])[inside].T]
        more = max(int(number.max()) + 1 - len(self._moments.num), 0)
        self._moments = Moments(*(np.pad(m, [(0, 0)] * (m.ndim - 1) + [(0, more)]) for m in self._moments))
        is_present = np.bincount(number, minlength=len(self._moments.num)) > 0
        index = np.cumsum(is_present)[number] - 1
        part = Moments.of(index, [value.astype(np.float64) for value in values], int(is_present.sum()))
        merged = Moments(*(moment[..., is_present] for moment in self._moments)).merge(part)
        for moment, updated in zip(self._moments, merged, strict=True):
            moment[..., is_present] = updated
        runs = runs_of(objects, top)
        is_first = (np.diff(runs.objects, prepend=-1) != 0) | (np.diff(runs.rows, prepend=-1) != 0)
        first = np.flatnonzero(is_first)  # runs of each row of each object
        last = np.append(first[1:], len(is_first)) - 1
        self._extents.append(Runs(runs.objects[first], runs.rows[first], runs.first[first], runs.last[last]))

    def _close(self, extents: Runs) -> None:
        """Compute the convex hulls of objects that do not continue in the next band; a later piece is added.

        The hull of the middles of the pixels' outer sides, (y, x) [px], is that of an object.
        """
        rows, first, last = (values.astype(np.float64) for values in (extents.rows, extents.first, extents.last))
        sides = [(rows, first - 0.5), (rows, last + 0.5)]
        sides += [(rows + shift, end) for shift in (-0.5, 0.5) for end in (first, last)]
        middles = np.stack([np.stack(side, axis=1) for side in sides], axis=1)  # (N, 6, 2)
        for number, runs in extents.by_object():
            points = middles[runs].reshape(-1, 2)
            if number in self._hulls:
                points = np.concatenate([points, self._hulls[number][0]])
            self._hulls[number] = _convex_hull(points)

    def measures(self) -> Measures:
        """Measures of all objects."""
        if self._extents:
            self._close(join_runs(self._extents))
            self._extents = []
        number = np.flatnonzero(self._moments.num)
        num, mean, m2, mxy = (moment[..., number] for moment in self._moments)
        area, mean, variance = num.astype(np.int64), mean.T, (m2 / num).T
        covariance = np.stack([variance[:, 0], mxy / num, variance[:, 1]], axis=1)
        hulls = [self._hulls[index] for index in number.tolist()]
        box = np.array([[*(points.min(0) + 0.5), *(points.max(0) + 0.5)] for points, _ in hulls]).reshape(-1, 4)
        solidity = area / np.array([hull_area for _, hull_area in hulls], np.float64)
        std = np.sqrt(variance[:, 2:])
        return Measures(number, area, mean[:, :2], box.astype(np.int64), covariance, solidity, mean[:, 2:], std)


def _convex_hull(points: np.ndarray) -> tuple[np.ndarray, int]:
    """Vertices (V, 2) of the convex hull of points (y, x), and the number of pixels whose centre lies in it."""
    from scipy.spatial import ConvexHull

    corners = points[ConvexHull(points).vertices]  # in the order of the outline
    corners = np.roll(corners, -int(corners[:, 0].argmin()), axis=0)
    lowest = int(corners[:, 0].argmax())
    one, other = corners[: lowest + 1], np.concatenate([corners[:1], corners[: lowest - 1 : -1]])
    rows = np.arange(math.ceil(corners[0, 0]), math.floor(corners[lowest, 0]) + 1)
    sides = np.stack([np.interp(rows, side[:, 0], side[:, 1]) for side in (one, other)])
    width = np.floor(sides.max(0) + CLOSE) - np.ceil(sides.min(0) - CLOSE) + 1
    return corners, int(width.sum())
