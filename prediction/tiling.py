"""Large images in tiles, band by band: the overlap-tile strategy of the U-Net paper (arXiv 1505.04597, figure 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from images.memory import release_memory

Item = TypeVar("Item")
Network = Callable[[np.ndarray, "Tile", "Tile"], Tensor]  # input (h, w, C), its tile along y and x -> (K, h', w')
Read = Callable[[slice], np.ndarray]  # rows -> (h, W, C)

MIN_SIDE = 64  # [px] smallest height and width of a tile


@dataclass(frozen=True)
class Tile:
    """Pixels of a tile along one axis of an image."""

    interior: slice  # pixels that belong only to this tile; the interiors of all tiles cover the image once
    output: slice  # pixels that are computed: the interior, and those blended with adjacent tiles
    from_start: Window  # what a network reads that pools from the first pixel of the image on
    from_end: Window  # the same in a flipped image, from its last pixel on

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

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.rows[-1].interior.stop, self.columns[-1].interior.stop


@dataclass(frozen=True)
class Band:
    """Some rows of an image over its full width."""

    rows: slice
    values: np.ndarray  # (..., h, W)


def tiles_along(length: int, size: int, halo: int, overlap: int = 0, stride: int = 1) -> list[Tile]:
    """Tiles along an axis of `length` px, with an interior of `size` px and `overlap` px computed in adjacent tiles.

    Size, halo and overlap are multiples of the network's stride; the size is at least twice the overlap.

    >>> for tile in tiles_along(300, size=160, halo=96, stride=16):
    ...     print(tile.interior, tile.from_start.input, tile.from_end.input)
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
    """Height and width of the tiles of an image, of at most `num_pixel` px and multiples of the stride.

    Tiles are four times as wide as high: with a halo of 96 px those of 512 x 2048 px cost 1.23 times the arithmetic of
    the whole image, while squares of 512 px cost 1.40. `band_cost` is the additional memory per pixel of a band,
    divided by that per pixel of a tile: a wide image has lower tiles, so that its bands need no more memory.

    >>> tile_shape(512, 512, 2**20), tile_shape(20000, 20000, 2**20), tile_shape(20000, 1000, 2**20)
    ((512, 512), (512, 2048), (1040, 1008))
    >>> tile_shape(20000, 20000, 2**20, band_cost=1 / 80)
    (448, 2048)
    """

    def round_up(value: float) -> int:
        return max(math.ceil(value / stride) * stride, MIN_SIDE)

    if height * width <= num_pixel:
        return round_up(height), round_up(width)
    tile_width = min(round_up(width), round_up(2 * math.sqrt(num_pixel)))
    return max(int(num_pixel / (tile_width + band_cost * width)) // stride * stride, MIN_SIDE), tile_width


def prefetch(items: Iterable[Item]) -> Iterator[Item]:
    """Iterate over items while a thread computes the next one."""
    iterator = iter(items)

    def next_one() -> list[Item]:
        return list(islice(iterator, 1))  # empty at the end

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
    from the tile (`inorm`, `gnorm`), adjacent tiles differ, so they overlap and are blended. `read` is called in a
    thread, `network` without gradients.
    """

    def __init__(self, network: Network, read: Read, grid: TileGrid) -> None:
        self.network, self.read, self.rows, self.columns = network, read, grid.rows, grid.columns

    def compute(self, numbers: Iterable[int] | None = None) -> Generator[Band, None, None]:
        """Bands (K, h, W) float32 with these numbers, or all bands, from top to bottom."""
        numbers = range(len(self.rows)) if numbers is None else sorted(numbers)
        if len(self.rows) > 1:
            release_memory()
        has_overlap = any(tile.output != tile.interior for tile in (*self.rows, *self.columns))
        if has_overlap:
            yield from self._blended(numbers)
            return
        for number, output in self._outputs(numbers):
            yield Band(self.rows[number].interior, output.cpu().numpy())
            del output  # before the next one is computed

    def _blended(self, numbers: Iterable[int]) -> Generator[Band, None, None]:
        """Bands blended with the ones above and below: the last, this and the next output are in memory."""
        adjacent = {n: range(max(n - 1, 0), min(n + 2, len(self.rows))) for n in numbers}
        outputs = self._outputs(sorted({*chain(*adjacent.values())}))
        near: dict[int, Tensor] = {}
        for number, needed in adjacent.items():
            near = {n: output for n, output in near.items() if n in needed}
            near |= islice(outputs, len(needed) - len(near))
            rows, interior = [self.rows[n] for n in needed], self.rows[number].interior
            top = interior.start - rows[0].output.start
            height = interior.stop - interior.start
            yield Band(interior, _blend(near.values(), rows, axis=1)[:, top : top + height].cpu().numpy())

    def _outputs(self, numbers: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Number and output (K, h, W) of some bands."""
        for number, pixels in prefetch((n, self.read(self.rows[n].input)) for n in numbers):
            row = self.rows[number]
            tiles = (self.network(pixels[:, column.input], row, column) for column in self.columns)
            yield number, _blend(tiles, self.columns, axis=2)


@torch.inference_mode()
def _blend(parts: Iterable[Tensor], tiles: list[Tile], axis: int) -> Tensor:
    """Join the outputs of tiles along an axis, one at a time; overlaps are blended linearly.

    Weights where the outputs of two tiles overlap by two pixels:

        1  1  0.75  0.25
              0.25  0.75  1  1
    """
    outputs = [tile.output for tile in tiles]
    shared = [0, *(one.stop - other.start for one, other in pairwise(outputs)), 0]  # [px] before and after each tile
    start, total = outputs[0].start, torch.empty(0)  # replaced when type and shape of the first part are known
    for part, output, before, after in zip(parts, outputs, shared[:-1], shared[1:], strict=True):
        if output is outputs[0]:
            shape = list(part.shape)
            shape[axis] = outputs[-1].stop - start
            total = part.new_zeros(shape)
        length = part.shape[axis]
        weight = part.new_ones(length)
        weight[:before] = _ramp(before, part.device)
        weight[length - after :] = 1 - _ramp(after, part.device)
        weight = weight.view(-1, *[1] * (part.ndim - 1 - axis))
        total.narrow(axis, output.start - start, length).add_(part * weight)
    return total


def _ramp(length: int, device: torch.device) -> Tensor:
    """Weights that rise linearly from 0 to 1."""
    return (torch.arange(length, device=device) + 0.5) / length
