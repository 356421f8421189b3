"""Whether objects of masks touch, which a network can't learn to part from them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import ndimage

from prediction.measure import ObjectMeasurer

SEEN = 2048  # [px] height and width of the part of a mask that is looked at
LEAST = 30  # [px] area of an object whose shape says something
CONVEX = 0.93  # median solidity of round objects or above: nuclei have 0.96, cells between membranes 0.83 to 0.88
DENTED, LARGE = 0.9, 1.5  # solidity below which an object is taken for several, if it is so many times the median area
ENOUGH = 100  # objects after which one knows whether they are round
LEAST_DENTED = 3  # such objects that there must be
FEW = 0.03  # fraction of such objects: 0.048 of nuclei that touch, 0.015 of the same ones parted


def touching_share(masks: Iterable[np.ndarray]) -> float:
    """Fraction of the objects of masks (H, W) that look like several that touch; 0 if at most `FEW`, or not known."""
    shapes = np.zeros((2, 0))  # area [px] and solidity of each object
    for mask in masks:
        shapes = np.hstack([shapes, _shapes(mask)])
        if shapes.shape[1] > ENOUGH and np.median(shapes[1]) < CONVEX:
            return 0.0
    area, solidity = shapes
    # where most objects are not round, as the cells between membranes, a dent says nothing
    if not len(area) or np.median(solidity) < CONVEX:
        return 0.0
    # two round objects that touch form an 8: larger than usual, and dented
    dented = (solidity < DENTED) & (area > LARGE * np.median(area))
    return float(dented.mean()) if dented.sum() >= LEAST_DENTED and dented.mean() > FEW else 0.0


def _shapes(mask: np.ndarray) -> np.ndarray:
    """Area and solidity (2, N) of the objects of a mask (H, W); those at its border, which are cut, are left out."""
    mask = mask[:SEEN, :SEEN]
    measurer = ObjectMeasurer(1)
    measurer.add(0, ndimage.label(mask)[0], np.zeros((*mask.shape, 1), np.uint8))
    objects = measurer.measures()
    inside = (objects.box[:, :2] > 0).all(1) & (objects.box[:, 2:] < mask.shape).all(1) & (objects.area >= LEAST)
    return np.stack([objects.area[inside], objects.solidity[inside]])
