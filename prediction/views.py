"""The eight flips and quarter turns of a tile, the pixels of it that a network reads in each, and their mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model import UNet, class_probability
from prediction.halo import Sides, crop_sides, forward_tile
from prediction.tiling import Tile, Window, tiles_along

SMALL = 10_000  # [px] of images whose views are computed several at a time: calls take longer than sums there


class View(NamedTuple):
    """A flip of left and right, or none, and quarter turns counter-clockwise after it."""

    is_flipped: bool = False
    quarters: int = 0

    def of(self, x: Tensor) -> Tensor:
        """Image (N, C, H, W) as it is seen."""
        x = x.flip(-1) if self.is_flipped else x
        return torch.rot90(x, self.quarters, (-2, -1)) if self.quarters else x

    def back(self, x: Tensor) -> Tensor:
        """Image (N, C, H, W) turned back; reverses `of`."""
        x = torch.rot90(x, -self.quarters, (-2, -1)) if self.quarters else x
        return x.flip(-1) if self.is_flipped else x

    def of_sides(self, sides: Sides) -> Sides:
        """Sides with a halo as they are seen."""
        return (sides.flipped() if self.is_flipped else sides).turned(self.quarters)

    @property
    def corner(self) -> tuple[bool, bool]:
        """Whether the corner that is seen at the top left is at the bottom of the image, and at its right.

        >>> [View(False, quarters).corner for quarters in range(4)]
        [(False, False), (False, True), (True, True), (True, False)]
        """
        return self.quarters in (2, 3), (self.quarters in (1, 2)) != self.is_flipped


UNTURNED = View()
VIEWS = [View(is_flipped, quarters) for is_flipped in (False, True) for quarters in range(4)]


class TilePlace(NamedTuple):
    """Where a tile lies in its image."""

    rows: Tile
    columns: Tile
    unused: int = 0  # [px] of its halo that the network does not need

    @classmethod
    def of_image(cls, height: int, width: int) -> TilePlace:
        """An image that is a single tile [px]."""
        return cls(tiles_along(height, height, halo=height)[0], tiles_along(width, width, halo=width)[0])

    @property
    def is_whole(self) -> bool:
        """Whether the tile is the image, so that all views of the same height and width read alike."""
        return not any((*self.rows.from_start.has_halo, *self.columns.from_start.has_halo))

    def seen(self, x: Tensor, view: View = UNTURNED) -> tuple[Tensor, Sides]:
        """What a network sees of the tile (N, C, H, W) in a view, and on which of its sides there is a halo.

        It pools from the top left of what it sees on, so each corner of the image has a window of its own.
        """
        rows, columns = self._windows(view)
        sides = Sides(rows.has_halo[0], columns.has_halo[0], rows.has_halo[1], columns.has_halo[1])
        part = crop_sides(x[..., rows.input, columns.input], sides, self.unused)
        return view.of(part), view.of_sides(sides)

    def output(self, result: Tensor, view: View = UNTURNED) -> Tensor:
        """Result for the output of the tile, turned back."""
        rows, columns = self._windows(view)
        return view.back(result)[..., rows.crop, columns.crop]

    def _windows(self, view: View) -> tuple[Window, Window]:
        bottom, right = view.corner
        return self.rows.window(bottom), self.columns.window(right)


def augmented_logits(net: UNet, x: Tensor, tile: TilePlace) -> Tensor:
    """Float32 logits (N, K, H, W) of a tile with the mean probability of its eight flips and quarter turns.

    Each view is padded to multiples of the stride at its own bottom and right, so that a flipped or turned image has
    the same mean.
    """

    def probability(part: Tensor, sides: Sides) -> Tensor:
        return class_probability(forward_tile(net, part, sides).float())  # 16 bits would round the mean

    total = torch.zeros(())
    is_small = tile.is_whole and x[0, 0].numel() <= SMALL
    for views in (VIEWS[::2], VIEWS[1::2]) if is_small else ([view] for view in VIEWS):  # of one height and width
        parts, sides = zip(*(tile.seen(x, view) for view in views), strict=True)
        found = probability(torch.cat(parts), sides[0]).chunk(len(views))
        for view, result in zip(views, found, strict=True):
            total = total + tile.output(result, view)
    logits = torch.log((total / 8).clamp_min(torch.finfo(total.dtype).tiny))
    return logits if net.fc.out_channels > 1 else logits[:, 1:] - logits[:, :1]
