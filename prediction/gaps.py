"""The gap that training labels have between objects that touch, and predicted objects that grow back over it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from prediction.objects import TILE_HEIGHT, Plane
from prediction.tiling import Band

RADIUS = 2  # [px] at which another object is near: the gap takes one pixel of each
SIDES = ndimage.generate_binary_structure(2, 1)


def grown(objects: np.ndarray) -> np.ndarray:
    """Objects (H, W), each with the background pixels that touch it and lie within two pixels of another one.

    Labels that number objects which touch lose a pixel of each on their common border, so that a network can part them.

    Examples
    --------
    >>> grown(np.array([[1, 1, 0, 0, 2, 2, 0, 0, 0]])).tolist()
    [[1, 1, 1, 2, 2, 2, 0, 0, 0]]
    """
    others = np.where(objects > 0, objects, objects.max(initial=0) + 1)  # the background is no minimum
    low, high = ndimage.minimum_filter(others, 3), ndimage.maximum_filter(objects, 3)
    is_near = ndimage.minimum_filter(others, 2 * RADIUS + 1) != ndimage.maximum_filter(objects, 2 * RADIUS + 1)
    at_side = ndimage.maximum_filter(objects, footprint=SIDES)
    number = np.where((low == high) | (at_side == 0), high, at_side)  # of several, one that shares a side
    return np.where((objects == 0) & is_near, number, objects)


def grow_bands(objects: Plane, tile_height: int = TILE_HEIGHT) -> Iterator[Band]:
    """Objects of `grown`, band by band, of an image (H, W) that is read by rows."""
    height = objects.shape[0]
    for top in range(0, height, tile_height):
        first, last = max(top - RADIUS, 0), min(top + tile_height + RADIUS, height)
        values = grown(np.asarray(objects[first:last]))
        band = slice(top, min(top + tile_height, height))
        yield Band(band, values[top - first : band.stop - first])
