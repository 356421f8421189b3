"""Whether objects of masks touch, which a network can't learn to part from them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import ndimage

from prediction.measure import ObjectMeasurer

SEEN = 2048  # [px] height and width of the part of a mask that is looked at
LEAST = 30  # [px] area of an object whose shape says something
CONVEX = (
    0.93  # median solidity above which the objects are round: nuclei have 0.96, cells between membranes 0.83 to 0.88
)
DENTED, LARGE = 0.9, 1.5  # solidity below which an object is taken for several, if it is so many times the median area
ENOUGH = 100  # objects after which one knows whether they are round
LEAST_DENTED = 3  # such objects that there must be
FEW = 0.03  # fraction of such objects: 0.048 of nuclei that touch, 0.015 of the same ones parted


def touching_share(masks: Iterable[np.ndarray]) -> float:
    """Fraction of the objects of masks that look like several that touch.

    Most objects are round then, and some are larger than usual and dented: two nuclei that touch form an 8. Where most
    are not round, as the cells between membranes, a dent says nothing.

    Parameters
    ----------
    masks : iterable of ndarray of bool
        (H, W) foreground of each label image. Objects at its border, which are cut, are left out.

    Returns
    -------
    float
        0 if the shapes of the objects don't tell, or if there are at most `FEW` of them.
    """
    areas, solidities = [np.zeros(0)], [np.zeros(0)]
    for area, solidity in map(_measure, masks):
        areas, solidities = [*areas, area], [*solidities, solidity]
        if sum(map(len, areas)) > ENOUGH and np.median(np.concatenate(solidities)) < CONVEX:
            return 0.0
    area, solidity = np.concatenate(areas), np.concatenate(solidities)
    if not len(area) or np.median(solidity) < CONVEX:
        return 0.0
    dented = (solidity < DENTED) & (area > LARGE * np.median(area))
    return float(dented.mean()) if dented.sum() >= LEAST_DENTED and dented.mean() > FEW else 0.0


def _measure(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area and solidity (N,) of the objects of a mask (H, W)."""
    mask = mask[:SEEN, :SEEN]
    measurer = ObjectMeasurer(1)
    measurer.add(0, ndimage.label(mask)[0], np.zeros((*mask.shape, 1), np.uint8))
    found = measurer.measures()
    whole = (found.box[:, :2] > 0).all(1) & (found.box[:, 2:] < mask.shape).all(1) & (found.area >= LEAST)
    return found.area[whole], found.solidity[whole]
