"""Large images in tiles, band by band: the overlap-tile strategy of the U-Net paper (arXiv 1505.04597, figure 2)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")
Network = Callable[[np.ndarray, "Tile", "Tile"], Tensor]  # input (h, w, C), place along y and x -> output (K, h', w')
Read = Callable[[slice], np.ndarray]  # rows -> (h, W, C)

MIN_SIDE = 64  # [px] smallest height and width of a tile


@dataclass(frozen=True)
class Tile:
    """Place of a tile along one axis of an image [px].

    Attributes
    ----------
    core : slice
        Pixels that belong only to this tile; the cores of all tiles cover the image once.
    output : slice
        Pixels that are computed: the core, and the pixels blended with neighbouring tiles.
    from_start, from_end : Window
        What a network reads that pools from the first pixel of the image on, or, in a flipped image, from the last.
    """

    core: slice
    output: slice
    from_start: Window
    from_end: Window

    @property
    def input(self) -> slice:
        """Pixels that are read."""
        windows = (self.from_start.input, self.from_end.input)
        return slice(min(window.start for window in windows), max(window.stop for window in windows))

    def window(self, is_from_end: bool) -> Window:
        """One of the windows, counted from the first pixel that is read."""
        window = self.from_end if is_from_end else self.from_start
        start = self.input.start
        return window._replace(input=slice(window.input.start - start, window.input.stop - start))


class Window(NamedTuple):
    """Pixels of an image that a network reads along one axis, and where the output of a tile lies in its result."""

    input: slice  # the output and its halo, or up to the end of the image
    has_halo: tuple[bool, bool]  # before the output, and after it
    crop: slice  # of the output in the input without its halo


@dataclass(frozen=True)
class TileGrid:
    """Tiles of an image along its height and along its width."""

    rows: list[Tile]
    columns: list[Tile]


@dataclass(frozen=True)
class Band:
    """Some rows of an image over its full width.

    Attributes
    ----------
    rows : slice
        The rows.
    values : ndarray
        Values of these rows, (..., h, W).
    """

    rows: slice
    values: np.ndarray


def tiles_along(length: int, size: int, halo: int, overlap: int = 0, stride: int = 1) -> list[Tile]:
    """Tiles along one axis.

    Parameters
    ----------
    length : int
        Size of the image along the axis [px].
    size : int
        Size of the core of a tile [px], a multiple of the stride and at least twice the overlap.
    halo : int
        Pixels that the network reads beyond its output, a multiple of the stride.
    overlap : int
        Pixels that a tile computes within its neighbours, a multiple of the stride.
    stride : int
        Stride of the network [px], for windows that begin at the last pixel of the image.

    Examples
    --------
    >>> for tile in tiles_along(300, size=160, halo=96, stride=16):
    ...     print(tile.core, tile.from_start.input, tile.from_end.input)
    slice(0, 160, None) slice(0, 256, None) slice(0, 268, None)
    slice(160, 300, None) slice(64, 300, None) slice(60, 300, None)
    """
    starts = list(range(0, length, size))
    if len(starts) > 1 and length - starts[-1] < 2 * overlap:  # too short for two blends
        starts.pop()
    tiles = []
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        output = slice(max(start - overlap, 0), min(stop + overlap, length))
        from_start, from_end = (_window(output, length, halo, stride, shift) for shift in (0, length % stride))
        tiles.append(Tile(slice(start, stop), output, from_start, from_end))
    return tiles


def _window(output: slice, length: int, halo: int, stride: int, shift: int) -> Window:
    """Window around an output whose ends are multiples of the stride plus a shift, or the ends of the image."""
    first = output.start - (output.start - shift) % stride
    last = output.stop + (shift - output.stop) % stride
    has_halo = (first >= halo, last + halo < length)
    read = slice(first - halo if has_halo[0] else 0, last + halo if has_halo[1] else length)
    origin = first if has_halo[0] else 0
    return Window(read, has_halo, slice(output.start - origin, output.stop - origin))


def tile_shape(height: int, width: int, num_pixel: int, band_cost: float = 0, stride: int = 16) -> tuple[int, int]:
    """Height and width of the tiles of an image.

    Tiles are four times as wide as high: with a halo of 96 px those of 512 x 2048 px cost 1.23 times the arithmetic of
    the whole image, while squares of 512 px cost 1.40.

    Parameters
    ----------
    height, width : int
        Size of the image [px].
    num_pixel : int
        Largest number of pixels in a tile; a smaller image is one tile.
    band_cost : float
        Additional memory per pixel of a band, divided by the memory per pixel of a tile: a wide image has lower tiles,
        so that its bands need no more memory.
    stride : int
        Stride of the network [px]; the sides are multiples of it.

    Examples
    --------
    >>> tile_shape(512, 512, 2**20), tile_shape(20000, 20000, 2**20), tile_shape(20000, 1000, 2**20)
    ((512, 512), (512, 2048), (1040, 1008))
    >>> tile_shape(20000, 20000, 2**20, band_cost=1 / 80)
    (448, 2048)
    """

    def round_up(value: float) -> int:
        return max(math.ceil(value / stride) * stride, MIN_SIDE)

    if height * width <= num_pixel:
        return round_up(height), round_up(width)
    across = min(round_up(width), round_up(2 * math.sqrt(num_pixel)))
    return max(int(num_pixel / (across + band_cost * width)) // stride * stride, MIN_SIDE), across


def prefetch(items: Iterable[Item]) -> Iterator[Item]:
    """Iterate over items while a thread computes the next one."""
    iterator = iter(items)

    def next_one() -> list[Item]:
        """The next item in a list, which is empty at the end."""
        return list(islice(iterator, 1))

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next_one)
        while item := future.result():
            future = pool.submit(next_one)
            yield item.pop()


def write_in_background(items: Iterable[Item], use: Callable[[Item], None]) -> None:
    """Compute items one by one while a thread calls `use` with the previous one."""
    with ThreadPoolExecutor(1) as pool:
        used = pool.submit(lambda: None)
        for item in items:
            used.result()
            used = pool.submit(use, item)
        used.result()


class Bands:
    """Result of a network on a large image, computed by bands: rows of tiles over the full width.

    Each pixel is computed with the same neighbourhood as in the whole image. If the normalisation takes its statistics
    from the tile (`inorm`, `gnorm`), neighbouring tiles differ, so they overlap and are blended.

    Parameters
    ----------
    network : callable
        See `Network`; called without gradients.
    read : callable
        See `Read`; called in a thread.
    grid : TileGrid
        The tiles.
    """

    def __init__(self, network: Network, read: Read, grid: TileGrid) -> None:
        self.network, self.read, self.rows, self.columns = network, read, grid.rows, grid.columns
        self.blends = any(tile.output != tile.core for tile in (*grid.rows, *grid.columns))

    def compute(self, numbers: Iterable[int] | None = None) -> Generator[Band, None, None]:
        """Bands (K, h, W) float32 with these numbers, or all bands, from top to bottom."""
        todo = deque(range(len(self.rows)) if numbers is None else sorted(numbers))
        reach = (-1, 0, 1) if self.blends else (0,)
        needed = sorted({number + step for number in todo for step in reach} & {*range(len(self.rows))})
        done: dict[int, Tensor] = {}
        for number, pixels in prefetch((n, self.read(self.rows[n].input)) for n in needed):
            done[number] = self._band(self.rows[number], pixels)
            while todo and {todo[0] + step for step in reach} & {*range(len(self.rows))} <= done.keys():
                yield Band(self.rows[todo[0]].core, self._blended(todo.popleft(), done).cpu().numpy())
                done = {n: band for n, band in done.items() if todo and n >= todo[0] + reach[0]}

    @torch.inference_mode()
    def _band(self, row: Tile, pixels: np.ndarray) -> Tensor:
        """Output of a band (K, h, W) from its input (h', W, C)."""
        return _blend((self._tile(row, column, pixels) for column in self.columns), self.columns, axis=2)

    def _tile(self, row: Tile, column: Tile, pixels: np.ndarray) -> Tensor:
        """Output of a tile (K, h, w) from the input of its band (h', W, C)."""
        return self.network(pixels[:, column.input], row, column)

    def _blended(self, number: int, done: dict[int, Tensor]) -> Tensor:
        """Core of a band, blended with the neighbouring bands that overlap it."""
        if not self.blends:
            return done[number]
        near = [n for n in (number - 1, number, number + 1) if n in done]
        rows = [self.rows[n] for n in near]
        core, top = self.rows[number].core, rows[0].output.start
        return _blend([done[n] for n in near], rows, axis=1)[:, core.start - top : core.stop - top]


def _blend(parts: Iterable[Tensor], tiles: list[Tile], axis: int) -> Tensor:
    """Join the outputs of tiles along an axis, one at a time; overlaps are blended linearly."""
    outputs = [tile.output for tile in tiles]
    origin, total = outputs[0].start, torch.empty(0)  # replaced when type and shape of the first part are known
    for number, (part, place) in enumerate(zip(parts, outputs, strict=True)):
        if number == 0:
            shape = list(part.shape)
            shape[axis] = outputs[-1].stop - origin
            total = part.new_zeros(shape)
        weight = part.new_ones(part.shape[axis])
        if number > 0:
            shared = outputs[number - 1].stop - place.start
            weight[:shared] = _ramp(shared, part.device)
        if number < len(outputs) - 1:
            shared = place.stop - outputs[number + 1].start
            weight[len(weight) - shared :] = 1 - _ramp(shared, part.device)
        weight = weight.view(-1, *[1] * (part.ndim - 1 - axis))
        total.narrow(axis, place.start - origin, part.shape[axis]).add_(part * weight)
    return total


def _ramp(length: int, device: torch.device) -> Tensor:
    """Weights that rise linearly from 0 to 1."""
    return (torch.arange(length, device=device) + 0.5) / length
