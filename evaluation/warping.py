"""Topological errors of a segmentation: cells that are split or merged, whatever their outlines."""

from __future__ import annotations

import functools
from itertools import product

import numpy as np
from scipy import ndimage

from images.statistics import neighbours

OFFSETS = [(dy, dx) for dy, dx in product((-1, 0, 1), repeat=2) if dy or dx]  # to the eight neighbours, row by row


def warping_scores(label: np.ndarray, mask: np.ndarray, valid: np.ndarray | None = None) -> dict[str, float]:
    """Topological errors: the differences that remain when the label may be deformed, but not split or merged.

    Simple points of the label (H, W), pixels whose flip keeps the topology of its 4-connected cells, are flipped where
    it differs from the mask until there are none; another order of flipping may end a few pixels away. `warping_error`
    is the fraction of pixels that still differ, `num_split` and `num_merger` how often these split or merge cells.
    Where `valid` (H, W) is false, the label is not annotated and taken to be as the mask.
    Source: Jain et al. 2010, doi 10.1109/CVPR.2010.5539950, section 3.

    >>> warping_scores(np.array([[1, 1, 1, 0, 1]]), np.array([[1, 0, 1, 1, 1]]))
    {'warping_error': 0.4, 'num_split': 1, 'num_merger': 1}
    """
    if valid is not None:
        label = np.where(valid, label, mask)
    target = np.pad(np.asarray(mask) > 0, 1)
    warped = _warp(np.pad(np.asarray(label) > 0, 1), target)
    lost, gained = warped & ~target, target & ~warped
    splits = _excess_neighbours(ndimage.label(lost, np.ones((3, 3)))[0], ndimage.label(warped & ~lost)[0])
    mergers = _excess_neighbours(ndimage.label(gained)[0], ndimage.label(warped)[0])
    error = np.sum(lost | gained) / (np.size(label) if valid is None else np.sum(valid))
    return {"warping_error": float(error), "num_split": splits, "num_merger": mergers}


def _warp(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Flip simple points of a mask with an empty margin until it equals the target, or there is none."""
    height, width = source.shape
    # Whether a pixel is simple depends on its eight neighbours. Pixels with the same letter are not neighbours of each
    # other, so all wrong pixels of one letter are flipped at once:   a b a b
    #                                                                 c d c d
    wrong, groups = source != target, []
    for top, left in product((0, 1), repeat=2):
        rows, columns = np.nonzero(wrong[top::2, left::2])
        groups.append((2 * rows + top) * width + 2 * columns + left)
    pixels, is_simple, has_flipped = source.ravel().astype(np.uint8), _simple_patterns(), True
    while has_flipped:
        has_flipped = False
        for number, group in enumerate(groups):
            patterns = np.zeros(len(group), np.uint8)
            for bit, (dy, dx) in enumerate(OFFSETS):
                patterns |= pixels[group + (dy * width + dx)] << bit
            flips = is_simple[patterns]
            pixels[group[flips]] ^= 1
            groups[number] = group[~flips]  # what is right is never flipped again
            has_flipped |= bool(flips.any())
    return pixels.reshape(height, width) > 0


@functools.cache
def _simple_patterns() -> np.ndarray:
    """Whether a pixel is simple, by the pattern (256) of its eight neighbours, a bit for each of `OFFSETS`."""
    # simple: touches exactly one 4-connected piece of foreground and one 8-connected piece of background
    is_simple = np.zeros(256, bool)
    cross = ndimage.generate_binary_structure(2, 1)
    for pattern in range(256):
        patch = np.insert(pattern >> np.arange(8) & 1, 4, 0).reshape(3, 3)
        pieces = np.unique(ndimage.label(patch)[0][cross & (patch > 0)])
        patch[1, 1] = 1
        is_simple[pattern] = len(pieces) == 1 and ndimage.label(patch == 0, np.ones((3, 3)))[1] == 1
    return is_simple


def _excess_neighbours(groups: np.ndarray, segments: np.ndarray) -> int:
    """Sum over the groups of pixels of the number of segments that each is 4-adjacent to, minus one."""
    pairs: set[tuple[int, int]] = set()
    for group, segment in neighbours(groups, segments):
        touch = (group > 0) & (segment > 0)
        pairs |= set(zip(group[touch].tolist(), segment[touch].tolist(), strict=True))
    counts = np.bincount([group for group, _ in pairs], minlength=1)
    return int(np.maximum(counts - 1, 0).sum())
