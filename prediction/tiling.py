"""A large image in windows: the overlap-tile strategy of the U-Net paper (arXiv 1505.04597, figure 2), band by band."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from model import STRIDE
from prediction.halo import Sides

Item = TypeVar("Item")
Network = Callable[[np.ndarray, Sides], Tensor]  # window (h, w, C) and its inner sides to (K, h', w')
Read = Callable[[int, int], np.ndarray]  # first and last row to (h, W, C)

LEAST = 64  # [px] sides of a window, at least


class Span(NamedTuple):
    """A window along one axis [px].

    Attributes
    ----------
    start, stop : int
        The part of the image that is this window's own; those of all windows cover the image once.
    first, last : int
        What is computed: more than its own where neighbours are blended.
    low, high : int
        What is read: with the margin, or up to the end of the image.
    inner : (bool, bool)
        Whether there is a margin before `first`, and one after `last`.
    """

    start: int
    stop: int
    first: int
    last: int
    low: int
    high: int
    inner: tuple[bool, bool]


def spans(length: int, tile: int, margin: int, overlap: int = 0) -> list[Span]:
    """Windows along one axis.

    Parameters
    ----------
    length : int
        Of the image [px].
    tile : int
        Length of a window's own part [px], a multiple of the stride and at least twice the overlap.
    margin : int
        What the network sees around what it computes [px], a multiple of the stride.
    overlap : int
        How far a window computes into its neighbours [px], a multiple of the stride.

    Examples
    --------
    >>> [(s.low, s.first, s.start, s.stop, s.last, s.high, s.inner) for s in spans(300, tile=160, margin=96)]
    [(0, 0, 0, 160, 160, 256, (False, True)), (64, 160, 160, 300, 300, 300, (True, False))]
    """
    starts = list(range(0, length, tile))
    if len(starts) > 1 and length - starts[-1] < 2 * overlap:  # too short for two blends
        starts.pop()
    found = []
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        first, last = max(start - overlap, 0), min(stop + overlap, length)
        inner = (first >= margin, last + margin < length)
        low, high = first - margin if inner[0] else 0, last + margin if inner[1] else length
        found.append(Span(start, stop, first, last, low, high, inner))
    return found


def window_shape(height: int, width: int, num_pixel: int, band: float = 0, stride: int = STRIDE) -> tuple[int, int]:
    """Height and width of the windows of an image.

    Windows are four times as wide as high: with a margin of 96 px those of 512 x 2048 px cost 1.23 times the arithmetic
    of the whole image, while squares of 512 px cost 1.40.

    Parameters
    ----------
    height, width : int
        Of the image [px].
    num_pixel : int
        Most pixels in a window; an image that has no more is one window.
    band : float
        Memory that a pixel of a band needs beside its windows, over that of a pixel of a window: a wide image has lower
        windows, so that its bands take no more memory.
    stride : int
        Of the network [px]; the sides are multiples of it, as its poolings need.

    Examples
    --------
    >>> window_shape(512, 512, 2**20), window_shape(20000, 20000, 2**20), window_shape(20000, 1000, 2**20)
    ((512, 512), (512, 2048), (1040, 1008))
    >>> window_shape(20000, 20000, 2**20, band=1 / 80)
    (448, 2048)
    """

    def on_grid(value: float) -> int:
        return max(math.ceil(value / stride) * stride, LEAST)

    if height * width <= num_pixel:
        return on_grid(height), on_grid(width)
    across = min(on_grid(width), on_grid(2 * math.sqrt(num_pixel)))
    return max(int(num_pixel / (across + band * width)) // stride * stride, LEAST), across


def prefetch(items: Iterable[Item]) -> Iterator[Item]:
    """Items of an iterable; while one is used, a thread makes the next."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, iterator, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, iterator, end)
            yield item


def write_in_background(items: Iterable[Item], use: Callable[[Item], None]) -> None:
    """Make the items of an iterable; while one is made, a thread uses the one before."""
    with ThreadPoolExecutor(1) as pool:
        used = pool.submit(lambda: None)
        for item in items:
            used.result()
            used = pool.submit(use, item)
        used.result()


class Bands:
    """Result of a network on a large image, computed by bands: rows of windows over the full width.

    Each pixel has the same real neighbourhood that the whole image would give it. Where the network's normalisation
    takes its statistics from the window (`inorm`, `gnorm`), neighbouring windows differ, and an overlap blends them.

    Parameters
    ----------
    network : callable
        See `Network`; called without gradients.
    read : callable
        See `Read`; called in a thread.
    rows, columns : list of Span
        The windows along both axes.
    """

    def __init__(self, network: Network, read: Read, rows: list[Span], columns: list[Span]) -> None:
        self.network, self.read, self.rows, self.columns = network, read, rows, columns
        self.blends = any(span.first < span.start for span in (*rows, *columns))

    def __len__(self) -> int:
        return len(self.rows)

    def compute(self, numbers: Iterable[int]) -> Generator[tuple[int, np.ndarray], None, None]:
        """Bands of some numbers, in rising order.

        Yields
        ------
        int, ndarray
            The number of the band, and its (K, h, W) float32: rows `rows[number].start` to `.stop` of the image.
        """
        todo = deque(sorted(numbers))
        reach = (-1, 0, 1) if self.blends else (0,)
        needed = sorted({number + step for number in todo for step in reach} & {*range(len(self))})
        done: dict[int, Tensor] = {}
        for number, pixels in prefetch((n, self.read(self.rows[n].low, self.rows[n].high)) for n in needed):
            done[number] = self._band(self.rows[number], pixels)
            while todo and {todo[0] + step for step in reach} & {*range(len(self))} <= done.keys():
                yield todo[0], self._blended(todo.popleft(), done).cpu().numpy()
                done = {n: band for n, band in done.items() if todo and n >= todo[0] + reach[0]}

    @torch.inference_mode()
    def _band(self, row: Span, pixels: np.ndarray) -> Tensor:
        """What is computed of a band, (K, h, W), from its rows (h', W, C)."""
        return _blend((self._window(row, column, pixels) for column in self.columns), self.columns, 2)

    def _window(self, row: Span, column: Span, pixels: np.ndarray) -> Tensor:
        """What is computed of a window, (K, h, w), from the rows of its band."""
        inner = Sides(row.inner[0], column.inner[0], row.inner[1], column.inner[1])
        out = self.network(pixels[:, column.low : column.high], inner)
        top, left = (span.first if span.inner[0] else span.low for span in (row, column))
        return out[:, row.first - top : row.last - top, column.first - left : column.last - left]

    def _blended(self, number: int, done: dict[int, Tensor]) -> Tensor:
        """Own rows of a band, blended with those of its neighbours that reach into it."""
        if not self.blends:
            return done[number]
        near = [n for n in (number - 1, number, number + 1) if n in done]
        rows = [self.rows[n] for n in near]
        own = self.rows[number]
        blended = _blend([done[n] for n in near], rows, 1)
        return blended[:, own.start - rows[0].first : own.stop - rows[0].first]


def _blend(parts: Iterable[Tensor], places: list[Span], axis: int) -> Tensor:
    """Join windows along an axis, one at a time; where two overlap, one fades into the other linearly."""
    origin, total = places[0].first, None
    for number, (part, place) in enumerate(zip(parts, places, strict=True)):
        if total is None:
            shape = list(part.shape)
            shape[axis] = places[-1].last - origin
            total = part.new_zeros(shape)
        weight = part.new_ones(part.shape[axis])
        if number > 0:
            wide = places[number - 1].last - place.first
            weight[:wide] = (torch.arange(wide, device=part.device) + 0.5) / wide
        if number < len(places) - 1:
            wide = place.last - places[number + 1].first
            weight[len(weight) - wide :] = 1 - (torch.arange(wide, device=part.device) + 0.5) / wide
        weight = weight.view(-1, *[1] * (part.ndim - 1 - axis))
        total.narrow(axis, place.first - origin, part.shape[axis]).add_(part * weight)
    return total
