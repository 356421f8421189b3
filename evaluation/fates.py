"""What became of the objects of a label and of those found: matched, missed, added, split or merged."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from evaluation.metrics import LIMITS, overlaps
from evaluation.pictures import row_bands

ADDED, MISSED, SPLIT, MERGED, MATCHED = range(1, 6)  # in the order of `pictures.FATES`


def object_fates(truth: np.ndarray, proposal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fate (N + 1,) uint8 of each true and of each proposed object by its number; 0: it does not count.

    They match and count as in `metrics.object_scores`. A missed object is split if at least two proposed ones lie
    mainly, with more than half of their pixels, in it; an added one is merged if two true ones lie mainly in it.

    >>> of_truth, of_proposal = object_fates(np.array([[1, 1, 1, 1, 0, 2]]), np.array([[1, 1, 0, 2, 0, 3]]))
    >>> of_truth.tolist(), of_proposal.tolist()
    ([0, 5, 5], [0, 5, 1, 5])
    """
    pairs = overlaps(truth, proposal)
    of_truth = np.where(pairs.truth_area > 0, np.uint8(MISSED), np.uint8(0))
    of_proposal = np.where(pairs.counts_alone, np.uint8(ADDED), np.uint8(0))
    main_part = 2 * pairs.joint > pairs.proposal_area[pairs.proposal]
    pieces = np.bincount(pairs.truth[main_part], minlength=len(of_truth))
    of_truth[(pieces > 1) & (of_truth > 0)] = SPLIT
    main_part = 2 * pairs.joint > pairs.truth_area[pairs.truth]
    pieces = np.bincount(pairs.proposal[main_part], minlength=len(of_proposal))
    of_proposal[(pieces > 1) & (of_proposal > 0)] = MERGED
    matched = pairs.matches(LIMITS[0])
    of_truth[pairs.truth[matched]] = of_proposal[pairs.proposal[matched]] = MATCHED
    return of_truth, of_proposal


class ObjectMap:
    """Map of the fates of the objects of an image, and their counts."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.picture = np.zeros(shape, np.uint8)  # (H, W), indices of `FATES` + 1
        self.counts = dict.fromkeys(("matched", "missed", "added", "split", "merged"), 0)

    def add(self, truth: np.ndarray, proposal: np.ndarray) -> None:
        """Add the objects of a class, numbered in two images (H, W) as for `object_fates`."""
        of_truth, of_proposal = object_fates(truth, proposal)
        for name, fates, codes in (
            ("matched", of_truth, [MATCHED]),
            ("missed", of_truth, [MISSED, SPLIT]),
            ("added", of_proposal, [ADDED, MERGED]),
            ("split", of_truth, [SPLIT]),
            ("merged", of_proposal, [MERGED]),
        ):
            self.counts[name] += int(np.isin(fates, codes).sum())
        of_truth[of_truth == MATCHED] = 0  # a match is drawn as it was found
        for rows in row_bands(len(truth)):
            drawn = np.maximum(of_truth[np.maximum(truth[rows], 0)], of_proposal[proposal[rows]])
            np.maximum(self.picture[rows], drawn, out=self.picture[rows])


def total(counts: list[dict[str, int]]) -> dict[str, int]:
    """Sum of the counts of all images; empty if none has any."""
    return {name: sum(each[name] for each in counts) for name in counts[0]} if counts else {}


def counts_text(counts: Mapping[str, int]) -> str:
    """Counts in words; empty without any.

    >>> counts_text({"matched": 8, "missed": 2, "added": 1, "split": 1, "merged": 0})
    '8 matched, 2 missed (1 split), 1 added (0 merged)'
    """
    text = "{matched} matched, {missed} missed ({split} split), {added} added ({merged} merged)"
    return text.format_map(counts) if counts else ""
