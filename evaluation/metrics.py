"""Scores of a segmentation: pure functions on arrays."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from evaluation.thinning import thin_borders
from evaluation.warping import warping_scores
from images.statistics import neighbours

NUM_BIN = 127  # of the probability, for precision-recall curves
THRESHOLDS = tuple(k / 10 for k in range(1, 10))  # of the ISBI 2012 challenge
LIMITS = tuple(k / 100 for k in range(50, 100, 5))  # two objects match from here on, for the average precision
BAND = 2**20  # [px] counted at a time, so that the memory needed does not grow with the image


def confusion_matrix(label: np.ndarray, prediction: np.ndarray, num_class: int) -> np.ndarray:
    """Pixels (K, K) of each pair of classes in [0, K); row: class of the label, column: class of the prediction.

    >>> confusion_matrix(np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 1]]), 2).tolist()
    [[1, 1], [0, 2]]
    """
    pairs = label.astype(np.uint16) * np.uint16(num_class) + prediction.astype(np.uint16)
    return np.bincount(pairs.ravel(), minlength=num_class**2).reshape(num_class, num_class)


def dice(confusion: np.ndarray) -> np.ndarray:
    """Dice coefficient of each class, 2 |A and B| / (|A| + |B|), (..., K, K) to (..., K); NaN if it is in neither.

    Source: Dice 1945, doi 10.2307/1932409.

    >>> dice(np.array([[1, 1], [0, 2]]))
    array([0.66666667, 0.8       ])
    """
    both, label, prediction = _areas(confusion)
    return _ratio(2 * both, label + prediction, np.nan)


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class (Jaccard index), |A and B| / |A or B|; as for `dice`.

    >>> iou(np.array([[1, 1], [0, 2]]))
    array([0.5       , 0.66666667])
    """
    both, label, prediction = _areas(confusion)
    return _ratio(both, label + prediction - both, np.nan)


def pixel_error(confusion: np.ndarray) -> np.ndarray:
    """Fraction of the pixels whose class is wrong, 0 if there is no pixel; (..., K, K) to (...).

    >>> float(pixel_error(np.array([[1, 1], [0, 2]])))
    0.25
    """
    both, label, _ = _areas(confusion)
    return 1.0 - _ratio(both.sum(-1), label.sum(-1), 1.0)


def _areas(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of each class in the intersection, the label and the prediction, (..., K) each."""
    return np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1), confusion.sum(-2)


def _ratio(part: np.ndarray, whole: np.ndarray, of_empty: float) -> np.ndarray:
    """Return part / whole, and another value where both are empty."""
    return np.where(whole > 0, part / np.maximum(whole, 1), of_empty)


def confusion_scores(confusion: np.ndarray, names: list[str]) -> dict[str, float]:
    """Scores of one confusion matrix (K, K): `pixel_error`, `dice_NAME` and `iou_NAME` of each class that occurs."""
    scores = {"pixel_error": float(pixel_error(confusion))}
    for score, values in (("dice", dice(confusion)), ("iou", iou(confusion))):
        named = zip(names, values.tolist(), strict=True)
        scores |= {f"{score}_{name}": value for name, value in named if not np.isnan(value)}
    return scores


def mean_scores(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each score over the images that have it.

    >>> mean_scores([{"dice": 1.0, "loss": 2.0}, {"dice": 0.5}])
    {'dice': 0.75, 'loss': 2.0}
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def fewer_images(rows: list[dict[str, float]]) -> dict[str, int]:
    """Number of images that a mean of `mean_scores` is over, where it is less than all that have any score.

    >>> fewer_images([{"dice": 1.0, "v_rand": 0.5}, {"dice": 0.5}, {}])
    {'v_rand': 1}
    """
    counts = Counter(name for row in rows for name in row)
    return {name: count for name, count in counts.items() if count < sum(map(bool, rows))}


def threshold_counts(inside: np.ndarray, probability: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Pixels outside and inside the foreground (2, 127) whose probability (H, W) lies in each of 127 equal bins.

    The most that a precision-recall curve of TensorBoard has; the last bin is of probability 1 alone.

    >>> threshold_counts(np.array([[False, True]]), np.array([[0.0, 1.0]]))[:, [0, -1]].tolist()
    [[1, 0], [0, 1]]
    """
    bins = (probability * (NUM_BIN - 1)).astype(np.uint8) + NUM_BIN * inside.astype(np.uint8)
    bins = bins.ravel() if valid is None else bins[valid]
    return np.bincount(bins, minlength=2 * NUM_BIN).reshape(2, NUM_BIN)


def number_segments(label: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Numbers (H, W) of the 4-connected components of a label: 0 is background, -1 is not annotated.

    >>> number_segments(np.array([[1, 0, 1, 1]]), np.array([[True, True, True, False]])).tolist()
    [[1, 0, 2, -1]]
    """
    if valid is None:
        return ndimage.label(label)[0]
    segments = ndimage.label(np.logical_and(label, valid))[0]
    segments[~valid] = -1
    return segments


class Contingency(NamedTuple):
    """Pixels shared by true and proposed segments, within the foreground of the truth; see `contingency`."""

    joint: np.ndarray  # pixels of each pair of segments that overlap, p_ij
    truth: np.ndarray  # pixels of each true segment
    proposal: np.ndarray  # pixels of each proposed segment
    num_unassigned: int  # pixels in no proposed segment (on its borders); each counts as a segment of its own
    num_pixel: int  # of the annotated image, background included
    num_proposed: int  # annotated pixels in any proposed segment, within the foreground or not

    @property
    def square_sums(self) -> tuple[float, float, float]:
        """Pairs of pixels in one segment of both images, of the truth, and of the proposal; none unassigned."""
        return np.sum(self.joint**2), np.sum(self.truth**2), np.sum(self.proposal**2)


def contingency(truth: np.ndarray, proposal: np.ndarray) -> Contingency:
    """Contingency table of two (H, W) images of segment numbers, where the truth is no border (0) nor unknown (-1).

    >>> table = contingency(np.array([[1, 1, 1, 2, 0]]), np.array([[1, 1, 0, 1, 1]]))
    >>> table.joint.tolist(), table.truth.tolist(), table.proposal.tolist(), table.num_unassigned
    ([2.0, 1.0], [3.0, 1.0], [3.0], 1)
    """
    true, proposed, count = _overlapping_pairs(truth, proposal)
    num_pixel, num_proposed = int(count[true >= 0].sum()), int(count[(true >= 0) & (proposed > 0)].sum())
    true, proposed, count = (part[true > 0] for part in (true, proposed, count))
    assigned = proposed > 0
    truth_area, proposal_area = np.bincount(true, count), np.bincount(proposed[assigned], count[assigned])
    return Contingency(
        joint=count[assigned],
        truth=truth_area[truth_area > 0],
        proposal=proposal_area[proposal_area > 0],
        num_unassigned=int(count[~assigned].sum()),
        num_pixel=num_pixel,
        num_proposed=num_proposed,
    )


def _overlapping_pairs(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of numbers of two (H, W) images that overlap, sorted, and the pixels of each pair; (P,) each."""
    stride = int(other.max(initial=0)) + 1  # makes one integer of a pair
    pairs: np.ndarray = np.zeros(0, np.int64)
    counts: np.ndarray = np.zeros(0)
    height = max(BAND // max(one.shape[1], 1), 1)
    for top in range(0, len(one), height):
        rows = np.s_[top : top + height]
        more, more_counts = _count_values(one[rows].astype(np.int64) * stride + other[rows])
        pairs, position = np.unique(np.concatenate([pairs, more]), return_inverse=True)
        counts = np.bincount(position, np.concatenate([counts, more_counts]))
    return pairs // stride, pairs % stride, counts


def _count_values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values that occur, sorted, and how often each; as `np.unique`, but without sorting if they lie close together."""
    low = values.min()
    if values.max() - low >= 4 * values.size:
        return np.unique(values, return_counts=True)
    counts = np.bincount((values - low).ravel())
    occurring = np.flatnonzero(counts)
    return occurring + low, counts[occurring]


def v_rand(table: Contingency) -> float:
    """Foreground-restricted Rand score, the F-score of pairs of pixels, in [0, 1]; thin the borders first.

    Source: Arganda-Carreras et al. 2015, doi 10.3389/fnana.2015.00142, equation 3, and the code of the challenge, which
    adds (border pixels / all pixels) to both sums. Without a true segment it is 0, and NaN without a proposed one, too.

    >>> v_rand(contingency(np.array([[1, 1, 2, 2]]), np.array([[1, 1, 1, 1]])))  # P = 8 / 8, R = 8 / 16
    0.6666666666666666
    """
    joint, truth, proposal = table.square_sums
    if truth == 0:
        return _score_of_nothing(table)
    border = table.num_unassigned / table.num_pixel
    return _f_score(joint + border, truth, proposal + border)


def v_info(table: Contingency) -> float:
    """Foreground-restricted information score, the F-score of mutual information, in [0, 1]; equation 6 of that source.

    Without a true segment as `v_rand`.

    >>> round(v_info(contingency(np.array([[1, 1, 2, 2]]), np.array([[1, 1, 2, 3]]))), 6)  # 2 log 2 / (2.5 log 2)
    0.8
    """
    total = table.truth.sum()
    if total == 0:
        return _score_of_nothing(table)
    # each unassigned pixel is a segment of one pixel: -(1 / total) log(1 / total) of entropy
    single = table.num_unassigned / total * np.log(total)
    truth = _entropy(table.truth / total)
    proposal = _entropy(table.proposal / total) + single
    joint = _entropy(table.joint / total) + single
    entropy = truth + proposal
    return float(np.clip(2 * (entropy - joint) / entropy, 0, 1)) if entropy > 0 else 1.0


def _score_of_nothing(table: Contingency) -> float:
    """Score of an image without a true segment: 0, since all that is proposed is wrong; NaN if nothing is."""
    return 0.0 if table.num_proposed else math.nan


def _entropy(fraction: np.ndarray) -> float:
    """Entropy of a distribution [nat]."""
    return -np.sum(fraction * np.log(fraction))


def _f_score(joint: float, truth: float, proposal: float) -> float:
    """Harmonic mean of joint / truth and joint / proposal; NaN where there is no truth."""
    return float(2 * joint / (truth + proposal)) if truth > 0 else math.nan


def mask_scores(
    label: np.ndarray,
    mask: np.ndarray,
    objects: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    true_objects: np.ndarray | None = None,
) -> dict[str, float]:
    """`v_rand` and `v_info` of one mask (H, W) after thinning, its `object_scores` and its `warping_scores`.

    Segments are 4-connected components of 1; the objects too, unless their numbers (H, W) are passed. Where neither
    label nor mask has a segment, there are warping scores alone.
    `valid` (H, W) of bool are the pixels that are annotated; None: all.
    """
    truth = number_segments(label, valid)
    table = contingency(truth, thin_borders(mask > 0, valid))
    pairs = {"v_rand": v_rand(table), "v_info": v_info(table)}
    scores = {name: value for name, value in pairs.items() if not math.isnan(value)}
    true_objects = truth if true_objects is None else true_objects
    scores |= object_scores(true_objects, ndimage.label(mask)[0] if objects is None else objects)
    del truth, objects, true_objects  # 8 bytes per pixel that the next scores need themselves
    return scores | warping_scores(label, mask, valid)


def challenge_scores(
    label: np.ndarray,
    probability: np.ndarray,
    thresholds: tuple[float, ...] = THRESHOLDS,
    valid: np.ndarray | None = None,
    mapped: Callable[..., Iterable[dict[str, Any]]] = map,
) -> dict[str, np.ndarray]:
    """Scores of the ISBI 2012 challenge of one image, a cell where the probability (H, W) is above each threshold.

    `v_rand` and `v_info` after thinning, NaN where neither label nor mask has a segment, and `pixel_error`, (T,) each
    in [0, 1]; `rand_counts` (T, 3), the pairs of pixels in one segment in both truth and proposal, in the truth, and in
    the proposal. The score of a stack is the best over the thresholds of the mean over the images, or `rand_error`.
    `mapped` calls a function for each threshold, as `map` does; that of an executor uses several threads.
    Source: Arganda-Carreras et al. 2015, doi 10.3389/fnana.2015.00142.
    """
    truth = number_segments(label, valid)

    def scores_at(threshold: float) -> dict[str, Any]:
        mask = probability > threshold
        wrong = mask != (label > 0)
        thinned = contingency(truth, thin_borders(mask, valid))
        unthinned = contingency(truth, number_segments(mask, valid))
        joint, in_truth, in_proposal = unthinned.square_sums
        single = unthinned.num_unassigned  # each pixel of an unthinned border is a pair with itself
        return {
            "v_rand": v_rand(thinned),
            "v_info": v_info(thinned),
            "pixel_error": np.mean(wrong if valid is None else wrong[valid]),
            "rand_counts": [joint + single, in_truth, in_proposal + single],
        }

    # one mask lies within the other, so those of as many pixels are the same and scored once
    areas = [np.count_nonzero(probability > threshold) for threshold in thresholds]
    _, first, number = np.unique(areas, return_index=True, return_inverse=True)
    rows = list(mapped(scores_at, [thresholds[k] for k in first]))
    return {name: np.array([rows[k][name] for k in number]) for name in rows[0]}


def rand_error(counts: np.ndarray) -> float:
    """Foreground-restricted Rand error without thinning, the first score of the challenge: 1 - maximal F-score.

    The argument is `rand_counts` (T, 3) of `challenge_scores`, summed over the images; NaN if none has foreground.
    """
    return 1.0 - max(_f_score(*row) for row in counts)


def object_scores(truth: np.ndarray, proposal: np.ndarray) -> dict[str, float]:
    """Scores in [0, 1] of the objects numbered in two images (H, W); -1 in the truth is not annotated.

    Two objects match if their intersection over union is at least 0.5; for the average precision the limit rises from
    0.5 to 0.95. `object_f1` is 2 TP / (2 TP + FP + FN), `matched_iou` the mean over the matches, `ap` the mean over the
    limits 0.5, 0.55, ... 0.95 of TP / (TP + FP + FN), `ap_50` and `ap_75` that of one limit.
    Only annotated pixels are compared. True objects that touch pixels without annotation may be cut, so they don't
    count. Proposed objects without a match don't count if more than half of them lies there or in such objects. Without
    any object that could be judged, in either image, there is no score.
    Sources: Caicedo et al. 2019, doi 10.1038/s41592-019-0612-7; for the average precision, which is no area under a
    curve as in COCO, Schmidt et al. 2018, doi 10.1007/978-3-030-00934-2_30.

    >>> scores = object_scores(np.array([[1, 1, 0, 2, 2]]), np.array([[1, 1, 1, 0, 2]]))
    >>> scores["object_f1"], scores["matched_iou"], scores["ap_50"], scores["ap_75"]
    (1.0, 0.5833333333333333, 1.0, 0.0)
    """
    pairs = overlaps(truth, proposal)
    num_match, num_object = np.transpose([pairs.counts(limit) for limit in LIMITS])
    if not num_object[0]:
        return {}
    precision = num_match / (num_object - num_match)  # TP / (TP + FP + FN)
    matched = pairs.iou[pairs.matches(LIMITS[0])]
    return {
        "object_f1": float(2 * num_match[0] / num_object[0]),
        "matched_iou": float(matched.mean()) if len(matched) else 0.0,
        "ap": float(precision.mean()),
        "ap_50": float(precision[LIMITS.index(0.5)]),
        "ap_75": float(precision[LIMITS.index(0.75)]),
    }


class Overlaps(NamedTuple):
    """Pairs of a true and a proposed object that overlap, and the objects that count; see `object_scores`."""

    joint: np.ndarray  # annotated pixels of each pair
    truth: np.ndarray  # number of the true object of each pair, ascending
    proposal: np.ndarray  # number of the proposed object of each pair
    truth_area: np.ndarray  # (N + 1,) annotated pixels by the number; 0 for the background and objects that are cut
    proposal_area: np.ndarray  # (N + 1,)
    counts_alone: np.ndarray  # (N + 1,) whether a proposed object counts without a match

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union of each pair."""
        return self.joint / (self.truth_area[self.truth] + self.proposal_area[self.proposal] - self.joint)

    def matches(self, limit: float) -> np.ndarray:
        """Indices of the pairs that reach a limit of at least 0.5, each object in one of them."""
        # Only two halves of one object, each at exactly 0.5, share it: none of them overlaps another object.
        pairs = np.flatnonzero(self.iou >= limit)
        for numbers in (self.truth, self.proposal):
            pairs = pairs[np.unique(numbers[pairs], return_index=True)[1]]
        return pairs

    def keeping(self, kept: np.ndarray) -> Overlaps:
        """The same without some proposed objects; `kept` is a bool for each number, (N + 1,)."""
        pairs = kept[self.proposal]
        chosen = {name: getattr(self, name)[pairs] for name in ("joint", "truth", "proposal")}
        return self._replace(**chosen, counts_alone=self.counts_alone & kept)

    def counts(self, limit: float) -> tuple[int, int]:
        """Number of matches at a limit, TP, and of the objects of both images, 2 TP + FP + FN."""
        matched = self.proposal[self.matches(limit)]
        counts = self.counts_alone.copy()
        counts[matched] = True
        return len(matched), int(np.count_nonzero(self.truth_area) + counts.sum())


def overlaps(truth: np.ndarray, proposal: np.ndarray) -> Overlaps:
    """Overlaps of true and proposed objects; the arguments are those of `object_scores`."""
    true, proposed, count = _overlapping_pairs(truth, proposal)
    valid = true >= 0
    cut = np.zeros(0, np.int64)  # numbers of the true objects that are 4-adjacent to a pixel without annotation
    if not valid.all():
        adjacent = neighbours(truth, truth)
        cut = np.unique(np.concatenate([one[(one > 0) & (other < 0)] for one, other in adjacent]))
    is_cut = np.isin(true, cut)
    area = np.bincount(true[valid], count[valid], minlength=1)
    area[0] = area[cut] = 0
    proposed_area = np.bincount(proposed[valid], count[valid], minlength=int(proposed.max(initial=0)) + 1)
    # alone, a proposed object counts if at least half of it is annotated and lies outside of cut objects
    outside = np.bincount(proposed, count * (~valid | is_cut))
    counts_alone = (proposed_area > 0) & (2 * outside <= np.bincount(proposed, count))
    counts_alone[0] = False  # the background
    both = (true > 0) & (proposed > 0) & ~is_cut
    return Overlaps(count[both], true[both], proposed[both], area, proposed_area, counts_alone)
