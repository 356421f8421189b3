"""Label images that number their objects: which number is background, and the gap that parts objects that touch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from scipy import ndimage

GAP = 2  # [px] between two objects that touched: one of each


def part_objects(numbers: np.ndarray) -> np.ndarray:
    """Foreground (H, W) of an image (H, W) that numbers its objects; pixels where two touch are background.

    Of an object that is so thin that nothing of it would be left, the pixels stay that touch no other that has stayed.

    Examples
    --------
    >>> part_objects(np.array([[0, 7, 7, 7, 2, 2, 0, 2]])).astype(int).tolist()
    [[0, 1, 1, 0, 0, 1, 0, 1]]
    >>> part_objects(np.array([[5, 5, 6, 6, 7, 7]])).astype(int).tolist()
    [[1, 0, 1, 1, 0, 1]]
    """
    inside = numbers > 0
    lowest = ndimage.minimum_filter(np.where(inside, numbers, numbers.max()), 3)
    foreground = inside & (lowest == ndimage.maximum_filter(numbers, 3))
    values, index = np.unique(numbers, return_inverse=True)
    index = index.reshape(numbers.shape)  # of each pixel's number among all numbers of the image
    is_lost = np.bincount(index[foreground], minlength=len(values)) == 0
    for k, box in enumerate(ndimage.find_objects(index + 1)):
        if is_lost[k] and values[k] > 0 and box is not None:
            around = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)
            near = ndimage.maximum_filter(foreground[around], 3)
            foreground[around] |= (index[around] == k) & ~near
    return foreground


def border_number(images: Iterable[np.ndarray]) -> float | None:
    """Number of more than half of the pixels at the borders of images (H, W), which is the background's, if any."""
    counts: Counter[float] = Counter()
    for numbers in images:
        border = np.concatenate([numbers[0], numbers[-1], numbers[1:-1, 0], numbers[1:-1, -1]])
        counts.update(dict(zip(*(each.tolist() for each in np.unique(border, return_counts=True)), strict=True)))
    number, count = counts.most_common(1)[0]
    return float(number) if 2 * count > counts.total() else None
