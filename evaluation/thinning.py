"""Thin the borders between segments to lines of one pixel, as the ISBI 2012 challenge does before it compares them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

PIECE = 2**18  # [px] of the front computed at a time
LAST = np.iinfo(np.int32).max  # above all numbers of segments
EMPTY, LINE, CLOSED = 0, -1, -2  # states of a pixel in no segment: not reached yet, a border, never to be flooded


def thin_borders(mask: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Number the components of a mask (H, W) and grow them until the borders (0) between them are one pixel wide.

    Components and growth are 4-connected as in the code of the challenge, which floods a plateau in another order. They
    keep to the annotated pixels, `valid` (H, W): a segment that leaves them and comes back is two, as in the label.

    In each step the front, all empty pixels next to a segment, joins the segments; a pixel between two becomes a line.
    If pixels that meet (second row) were flooded at once, two segments would touch: so first those of even index are,
    then those of odd index, which see what the even ones became. It takes 8 bytes per pixel.

        1 * . . * 2    segments 1 and 2, and the front *
        1 1 * * 2 2    the next front
        1 1 1 * 2 2    its even half is flooded
        1 1 1 | 2 2    its odd half, too: a line

    >>> thin_borders(np.array([[1, 0, 0, 0, 0, 1]]) > 0).tolist()
    [[1, 1, 1, 0, 2, 2]]
    """
    mask = mask if valid is None else mask & valid
    height, width = mask.shape
    inner = np.s_[1:-1, 1 : width + 1]
    # A closed margin, so that no neighbour needs a bounds check. Its right side makes the width odd: then even and odd
    # indices of the flat image lie like the fields of a chessboard, and no pixel is 4-adjacent to one of its half.
    states = np.full((height + 2, width + 3 - width % 2), CLOSED, np.int32)
    ndimage.label(mask, output=states[inner])
    if valid is not None:
        states[inner][~valid] = CLOSED
    is_front = np.zeros(states.shape, bool)
    is_front[inner] = ndimage.binary_dilation(mask, mask=valid) & ~mask
    flat, is_front, row = states.ravel(), is_front.ravel(), states.shape[1]
    offsets = np.array([-row, -1, 1, row])  # to the four neighbours
    while len(front := np.flatnonzero(is_front)):
        is_front[front] = False
        for half in (0, 1):
            for pixels in _pieces(front):
                pixels = pixels[pixels % 2 == half]
                around = flat[pixels[:, None] + offsets]  # (P, 4) states, at least one is a segment
                lowest = np.where(around > 0, around, LAST).min(1)
                flat[pixels] = np.where(lowest == around.max(1), lowest, LINE)
        for pixels in _pieces(front):
            around = pixels[flat[pixels] > 0][:, None] + offsets
            is_front[around[flat[around] == EMPTY]] = True
    return np.maximum(states, 0, out=states)[inner]


def _pieces(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """An array in pieces, since what is computed takes a hundred bytes for each of its values."""
    yield from (pixels[first : first + PIECE] for first in range(0, len(pixels), PIECE))
