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
    """Horizontal runs of pixels of one object, (N,) each, by object, then from top to bottom and left to right.

    Attributes
    ----------
    objects : ndarray
        Number of the object.
    rows, first, last : ndarray
        Row, first and last column [px].
    """

    objects: np.ndarray
    rows: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def __getitem__(self, chosen: slice | np.ndarray) -> Runs:
        """Some of the runs."""
        return Runs(self.objects[chosen], self.rows[chosen], self.first[chosen], self.last[chosen])

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
    """Measures of the objects of one image.

    Attributes
    ----------
    number : ndarray
        (N,) number of each object, ascending.
    area : ndarray
        (N,) [px].
    centre : ndarray
        (N, 2) row and column of the centre of mass [px]; the centre of the first pixel is (0, 0).
    box : ndarray
        (N, 4) first row, first column, and the row and column after the last one [px].
    covariance : ndarray
        (N, 3) of the coordinates of the pixels: of rows, of rows and columns, of columns [px²].
    solidity : ndarray
        (N,) area divided by that of the convex hull.
    mean, std : ndarray
        (N, C) of the grey values of each channel.
    """

    number: np.ndarray
    area: np.ndarray
    centre: np.ndarray
    box: np.ndarray
    covariance: np.ndarray
    solidity: np.ndarray
    mean: np.ndarray
    std: np.ndarray

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


class ObjectMeasurer:
    """Measures the objects of an image band by band, in memory that grows with the objects, not with their size.

    Sums of each band are joined as in Chan, Golub and LeVeque 1983, doi 10.1080/00031305.1983.10483115, which keeps
    the precision at any offset of coordinates and grey values. `skimage.measure.regionprops` needs an object's crop
    whole, which may be as large as the image, with the grey values of bands that are gone when the object ends.

    Parameters
    ----------
    num_channel : int
        Channels of the image.
    """

    def __init__(self, num_channel: int) -> None:
        self._area = np.zeros(0, np.int64)
        self._mean = np.zeros((0, 2 + num_channel))  # of row, column and grey values
        self._squares = np.zeros((0, 2 + num_channel))  # sums of squared distances from the mean
        self._mixed = np.zeros(0)  # sum of the products of the distances of row and column
        self._low = np.zeros((0, 2), np.int64)  # first row and column
        self._high = np.zeros((0, 2), np.int64)  # row and column after the last ones
        self._extents: list[Runs] = []  # per row of an object one run, from its first to its last pixel
        self._hulls: dict[int, tuple[np.ndarray, int]] = {}  # vertices of objects that seem to be complete, and area

    def add(self, top: int, objects: np.ndarray, pixels: np.ndarray) -> None:
        """Add the next band: its first row, objects (h, W), and grey values (h, W, C)."""
        tall = max(PART // objects.shape[1], 1)
        for row in range(0, len(objects), tall):
            self._add_part(top + row, objects[row : row + tall], pixels[row : row + tall])
        if self._extents:
            extents = join_runs(self._extents)
            is_open = np.isin(extents.objects, np.unique(objects[-1]))
            self._close(extents[~is_open])
            self._extents = [extents[is_open]]

    def _add_part(self, top: int, objects: np.ndarray, pixels: np.ndarray) -> None:
        inside = np.flatnonzero(objects)
        if not len(inside):
            return
        number = objects.ravel()[inside].astype(np.int64) - 1
        self._grow(int(number.max()) + 1)
        row, column = np.divmod(inside, objects.shape[1])
        values = [row + top, column, *pixels.reshape(-1, pixels.shape[-1])[inside].T]
        self._add_sums(number, [value.astype(np.float64) for value in values])
        extents = _extents_of(runs_of(objects, top))
        np.minimum.at(self._low, extents.objects - 1, np.stack([extents.rows, extents.first], axis=1))
        np.maximum.at(self._high, extents.objects - 1, np.stack([extents.rows, extents.last], axis=1) + 1)
        self._extents.append(extents)

    def _grow(self, num: int) -> None:
        """Make room for the objects up to a number."""
        more = max(num - len(self._area), 0)
        self._area = np.append(self._area, np.zeros(more, np.int64))
        self._mixed = np.append(self._mixed, np.zeros(more))
        self._mean, self._squares = (np.pad(values, ((0, more), (0, 0))) for values in (self._mean, self._squares))
        self._low = np.pad(self._low, ((0, more), (0, 0)), constant_values=np.iinfo(np.int64).max)
        self._high = np.pad(self._high, ((0, more), (0, 0)))

    def _add_sums(self, number: np.ndarray, values: list[np.ndarray]) -> None:
        """Add some pixels: the index of their object, and row, column and grey values."""
        count = np.bincount(number, minlength=len(self._area))
        seen = np.flatnonzero(count)
        new, old = count[seen].astype(np.float64), self._area[seen].astype(np.float64)
        shift = np.empty((len(values), len(seen)))  # from the mean until now to that of the new pixels
        for index, value in enumerate(values):
            mean = np.bincount(number, value, len(count))[seen] / new
            place = np.zeros(len(count))
            place[seen] = mean
            value -= place[number]
            shift[index] = mean - self._mean[seen, index]
            self._squares[seen, index] += np.bincount(number, value**2, len(count))[seen]
        weight = old * new / (old + new)
        self._mixed[seen] += np.bincount(number, values[0] * values[1], len(count))[seen] + weight * shift[0] * shift[1]
        self._squares[seen] += (weight * shift**2).T
        self._mean[seen] += (shift * new / (old + new)).T
        self._area[seen] += count[seen]

    def _close(self, extents: Runs) -> None:
        """Compute the convex hulls of objects that do not reach the next band; a piece that comes later is added."""
        corners = _corners(extents)
        for number, own in extents.by_object():
            points = corners[own].reshape(-1, 2)
            if number in self._hulls:
                points = np.concatenate([points, self._hulls[number][0]])
            self._hulls[number] = _convex_hull(points)

    def measures(self) -> Measures:
        """Measures of all objects."""
        if self._extents:
            self._close(join_runs(self._extents))
            self._extents = []
        present = np.flatnonzero(self._area)
        area, mean = self._area[present], self._mean[present]
        squares = self._squares[present] / area[:, None]
        solidity = area / np.array([self._hulls[index + 1][1] for index in present.tolist()], np.float64)
        covariance = np.stack([squares[:, 0], self._mixed[present] / area, squares[:, 1]], axis=1)
        box, std = np.concatenate([self._low, self._high], axis=1)[present], np.sqrt(squares[:, 2:])
        return Measures(present + 1, area, mean[:, :2], box, covariance, solidity, mean[:, 2:], std)


def _extents_of(runs: Runs) -> Runs:
    """One run for each row of an object: from its first to its last pixel there."""
    change = (np.diff(runs.objects, prepend=-1) != 0) | (np.diff(runs.rows, prepend=-1) != 0)
    first = np.flatnonzero(change)
    last = np.append(first[1:], len(change)) - 1
    return Runs(runs.objects[first], runs.rows[first], runs.first[first], runs.last[last])


def _corners(runs: Runs) -> np.ndarray:
    """Middles (N, 6, 2) of the sides of the outermost pixels of each row, (y, x) [px]: the hull of these is sought."""
    rows, first, last = (values.astype(np.float64) for values in (runs.rows, runs.first, runs.last))
    sides = [(rows, first - 0.5), (rows, last + 0.5)]
    sides += [(rows + shift, end) for shift in (-0.5, 0.5) for end in (first, last)]
    return np.stack([np.stack(side, axis=1) for side in sides], axis=1)


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
