"""Scores of a segmentation: pure functions on arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from images.statistics import neighbours

PIECE = 2**20  # [px] computed at a time
NUM_BIN = 127  # of the probability, for precision-recall curves
THRESHOLDS = tuple(k / 10 for k in range(1, 10))  # of the ISBI 2012 challenge
LIMITS = tuple(k / 100 for k in range(50, 100, 5))  # two objects match from here on, for the average precision
LARGE = 2**22  # [px] above, borders are thinned with less memory; a line may be off by one pixel


def confusion_matrix(label: np.ndarray, prediction: np.ndarray, num_class: int) -> np.ndarray:
    """Count the pixels of each pair of classes; the pixel scores below are functions of these counts.

    Parameters
    ----------
    label, prediction : ndarray of int or bool
        Class indices in [0, num_class), of one shape.
    num_class : int
        Number of classes, K.

    Returns
    -------
    ndarray of int64
        (K, K); row: class of the label, column: class of the prediction.

    Raises
    ------
    ValueError
        The shapes differ, or a value is not a class index.

    Examples
    --------
    >>> confusion_matrix(np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 1]]), 2).tolist()
    [[1, 1], [0, 2]]
    """
    if label.shape != prediction.shape:
        raise ValueError(f"label {label.shape} and prediction {prediction.shape} must have one shape")
    for name, classes in (("label", label), ("prediction", prediction)):
        if classes.size and not 0 <= classes.min() <= classes.max() < num_class:
            raise ValueError(f"{name} must hold class indices in [0, {num_class})")
    pairs = label.astype(np.uint16) * np.uint16(num_class) + prediction.astype(np.uint16)
    return np.bincount(pairs.ravel(), minlength=num_class**2).reshape(num_class, num_class)


def dice(confusion: np.ndarray) -> np.ndarray:
    """Dice coefficient of each class, 2 |A and B| / (|A| + |B|), 1 for an absent class; (..., K, K) to (..., K).

    Source: Dice 1945, doi 10.2307/1932409.

    >>> dice(np.array([[1, 1], [0, 2]]))
    array([0.66666667, 0.8       ])
    """
    both, label, prediction = _areas(confusion)
    return _ratio(2 * both, label + prediction)


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class (Jaccard index), |A and B| / |A or B|; as for `dice`.

    >>> iou(np.array([[1, 1], [0, 2]]))
    array([0.5       , 0.66666667])
    """
    both, label, prediction = _areas(confusion)
    return _ratio(both, label + prediction - both)


def pixel_error(confusion: np.ndarray) -> np.ndarray:
    """Fraction of the pixels whose class is wrong, 0 if there is no pixel; (..., K, K) to (...).

    >>> float(pixel_error(np.array([[1, 1], [0, 2]])))
    0.25
    """
    both, label, _ = _areas(confusion)
    return 1.0 - _ratio(both.sum(-1), label.sum(-1))


def _areas(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of each class in the intersection, the label and the prediction, (..., K) each."""
    return np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1), confusion.sum(-2)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, and 1 where both are empty."""
    return np.where(whole > 0, part / np.maximum(whole, 1), 1.0)


def confusion_scores(confusion: np.ndarray, names: list[str]) -> dict[str, float]:
    """Scores of one confusion matrix (K, K): `pixel_error`, and `dice_NAME` and `iou_NAME` of each class."""
    scores = {"pixel_error": float(pixel_error(confusion))}
    for score, values in (("dice", dice(confusion)), ("iou", iou(confusion))):
        scores |= {f"{score}_{name}": float(value) for name, value in zip(names, values, strict=True)}
    return scores


def mean_scores(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each score over the images that have it.

    >>> mean_scores([{"dice": 1.0, "loss": 2.0}, {"dice": 0.5}])
    {'dice': 0.75, 'loss': 2.0}
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def threshold_counts(inside: np.ndarray, probability: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Pixels outside and inside the foreground (2, 127) whose probability (H, W) lies in each of 127 equal bins.

    The most that a precision-recall curve of TensorBoard has; the last bin is of probability 1 alone.

    >>> threshold_counts(np.array([[False, True]]), np.array([[0.0, 1.0]]))[:, [0, -1]].tolist()
    [[1, 0], [0, 1]]
    """
    bins = (probability * (NUM_BIN - 1)).astype(np.uint8) + NUM_BIN * inside.astype(np.uint8)
    chosen = bins.ravel() if valid is None else bins[valid]
    return np.bincount(chosen, minlength=2 * NUM_BIN).reshape(2, NUM_BIN)


def number_segments(label: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Numbers (H, W) of the 4-connected components of a label: 0 is background, -1 is not annotated.

    >>> number_segments(np.array([[1, 0, 1, 1]]), np.array([[True, True, True, False]])).tolist()
    [[1, 0, 2, -1]]
    """
    segments = ndimage.label(_inside(label, valid))[0]
    if valid is not None:
        segments[~valid] = -1
    return segments


def _inside(mask: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """Annotated part of a mask (H, W)."""
    return mask if valid is None else np.logical_and(mask, valid)


class Contingency(NamedTuple):
    """Pixels shared by true and proposed segments, within the foreground of the truth; see `contingency`."""

    joint: np.ndarray  # pixels of each pair of segments that overlap, p_ij
    truth: np.ndarray  # pixels of each true segment
    proposal: np.ndarray  # pixels of each proposed segment
    num_unassigned: int  # pixels in no proposed segment (on its borders); each counts as a segment of its own
    num_pixel: int  # of the annotated image, background included


def contingency(truth: np.ndarray, proposal: np.ndarray) -> Contingency:
    """Contingency table of two (H, W) images of segment numbers, where the truth is no border (0) nor unknown (-1).

    >>> table = contingency(np.array([[1, 1, 1, 2, 0]]), np.array([[1, 1, 0, 1, 1]]))
    >>> table.joint.tolist(), table.truth.tolist(), table.proposal.tolist(), table.num_unassigned
    ([2.0, 1.0], [3.0, 1.0], [3.0], 1)
    """
    true, proposed, count = _pairs(truth, proposal)
    num_pixel = int(count[true >= 0].sum())
    true, proposed, count = (part[true > 0] for part in (true, proposed, count))
    inside = proposed > 0
    truth_area = np.bincount(true, count)
    proposal_area = np.bincount(proposed[inside], count[inside])
    return Contingency(
        joint=count[inside],
        truth=truth_area[truth_area > 0],
        proposal=proposal_area[proposal_area > 0],
        num_unassigned=int(count[~inside].sum()),
        num_pixel=num_pixel,
    )


def _pairs(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Overlapping pairs of numbers of two (H, W) images, sorted, and their pixel counts; (P,) each."""
    stride = int(other.max(initial=0)) + 1
    # bands of about a million pixels, so that the memory needed does not grow with the image
    tall = max(2**20 // max(one.shape[-1], 1), 1)
    found: np.ndarray = np.zeros(0, np.int64)
    counts: np.ndarray = np.zeros(0, np.float64)
    for top in range(0, len(one), tall):
        keys = one[top : top + tall].astype(np.int64) * stride + other[top : top + tall]  # one integer per pair
        keys, count = _count_values(keys)
        found, place = np.unique(np.concatenate([found, keys]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, count]))
    return found // stride, found % stride, counts


def _count_values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values that occur, sorted, and how often each; as `np.unique`, but without sorting if they lie close together."""
    low = values.min()
    if values.max() - low >= 4 * values.size:
        return np.unique(values, return_counts=True)
    counts = np.bincount((values - low).ravel())
    found = np.flatnonzero(counts)
    return found + low, counts[found]


def v_rand(table: Contingency) -> float:
    """Foreground-restricted Rand score, the F-score of pairs of pixels, in [0, 1]; thin the borders first.

    Source: Arganda-Carreras et al. 2015, doi 10.3389/fnana.2015.00142, equation 3, and the code of the challenge, which
    adds (border pixels / all pixels) to both sums.

    >>> v_rand(contingency(np.array([[1, 1, 2, 2]]), np.array([[1, 1, 1, 1]])))  # P = 8 / 8, R = 8 / 16
    0.6666666666666666
    """
    border = table.num_unassigned / table.num_pixel
    joint = np.sum(table.joint**2) + border
    return _f_score(joint, np.sum(table.truth**2), np.sum(table.proposal**2) + border)


def v_info(table: Contingency) -> float:
    """Foreground-restricted information score, the F-score of mutual information, in [0, 1]; equation 6 of that source.

    >>> round(v_info(contingency(np.array([[1, 1, 2, 2]]), np.array([[1, 1, 2, 3]]))), 6)  # 2 log 2 / (2.5 log 2)
    0.8
    """
    total = table.truth.sum()
    if total == 0:
        return 1.0
    # each unassigned pixel is a segment of one pixel: -(1 / total) log(1 / total) of entropy
    single = table.num_unassigned / total * np.log(total)
    truth = _entropy(table.truth / total)
    proposal = _entropy(table.proposal / total) + single
    joint = _entropy(table.joint / total) + single
    entropy = truth + proposal
    return float(np.clip(2 * (entropy - joint) / entropy, 0, 1)) if entropy > 0 else 1.0


def _entropy(fraction: np.ndarray) -> float:
    """Entropy of a distribution [nat]."""
    return -np.sum(fraction * np.log(fraction))


def _f_score(joint: float, truth: float, proposal: float) -> float:
    """Harmonic mean of joint / truth and joint / proposal; 1 where there is no truth."""
    if truth == 0:
        return 1.0
    return float(2 * joint / (truth + proposal))


def thin_borders(mask: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Number the components of a mask (H, W) and grow them until the borders (0) between them are one pixel wide.

    Components and growth are 4-connected as in the code of the challenge, which floods a plateau in another order. They
    keep to the pixels that are annotated, `valid` (H, W): a segment that leaves them and comes back is two, as in the
    label.
    """
    from skimage.segmentation import watershed

    mask = _inside(mask, valid)
    if mask.size > LARGE:
        return _grow(mask, valid)
    segments = ndimage.label(mask)[0]
    if not mask.any() or (mask if valid is None else mask | ~valid).all():  # nothing to grow
        return segments
    return watershed(~mask, segments, connectivity=1, mask=valid, watershed_line=True)


def _grow(mask: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """Components of a mask (H, W), grown like a watershed with lines in 8 bytes per pixel instead of 80."""
    padded = np.pad(mask, 1)
    numbers = ndimage.label(padded)[0]
    edge = ndimage.binary_dilation(padded) & ~padded
    if valid is not None:
        numbers[1:-1, 1:-1][~valid] = -1
        edge[1:-1, 1:-1] &= valid
    for rim in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        # -1 marks the rim, the lines and what is not annotated, so that no neighbour needs a bounds check
        numbers[rim], edge[rim] = -1, False
    del padded
    width, grown = numbers.shape[1], numbers.ravel()  # (H + 2, W + 2) -> ((H + 2) * (W + 2),)
    index = np.int32 if numbers.size < 2**31 else np.int64
    offsets = np.array([-width, -1, 1, width], index)  # to the four neighbours
    is_next = edge.ravel()  # pixels of the next front
    while len(front := _taken(is_next, index)):
        # All pixels at one distance are flooded in two halves, like the fields of a chessboard: pixels of one half are
        # not neighbours of each other, so each sees the result of the other half and no two segments ever touch.
        for parity in (0, 1):
            for piece in _pieces(front):
                half = piece[(piece // width + piece % width) % 2 == parity]
                around = grown[half[:, None] + offsets]  # (P, 4)
                lowest = np.where(around > 0, around, np.iinfo(np.int32).max).min(1)
                grown[half] = np.where(lowest == around.max(1), lowest, -1)  # two different segments: a line
        for piece in _pieces(front):
            around = piece[grown[piece] > 0][:, None] + offsets  # (P, 4)
            is_next[around[grown[around] == 0]] = True
    return np.maximum(numbers, 0, out=numbers)[1:-1, 1:-1]


def _taken(marked: np.ndarray, index: type[np.signedinteger]) -> np.ndarray:
    """Positions of the marks (P,), which are cleared."""
    places = [np.flatnonzero(piece).astype(index) + index(k * PIECE) for k, piece in enumerate(_pieces(marked))]
    marked[:] = False
    return np.concatenate(places)


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array in pieces of a million values, so that what is computed of one takes little memory."""
    yield from (array[first : first + PIECE] for first in range(0, len(array), PIECE))


def mask_scores(
    label: np.ndarray, mask: np.ndarray, objects: np.ndarray | None = None, valid: np.ndarray | None = None
) -> dict[str, float]:
    """`v_rand` and `v_info` of one mask (H, W) after thinning, its `object_scores` and its `warping_scores`.

    Segments are 4-connected components of 1; the objects too, unless numbers (H, W) of the objects found are given.
    `valid` (H, W) of bool are the pixels that are annotated; None: all.
    """
    truth = number_segments(label, valid)
    table = contingency(truth, thin_borders(mask > 0, valid))
    scores = {"v_rand": v_rand(table), "v_info": v_info(table)}
    scores |= object_scores(truth, ndimage.label(mask)[0] if objects is None else objects)
    del truth, objects  # 8 bytes per pixel that the next scores need themselves
    return scores | warping_scores(label, mask, valid)


def challenge_scores(
    label: np.ndarray,
    probability: np.ndarray,
    thresholds: tuple[float, ...] = THRESHOLDS,
    valid: np.ndarray | None = None,
    mapped: Callable[..., Iterable[dict[str, Any]]] = map,
) -> dict[str, np.ndarray]:
    """Scores of the ISBI 2012 challenge of one image at each threshold.

    The score of a stack is the best over the thresholds of the mean over the images; for the Rand error it is
    `rand_error` of the sum over the images.

    Parameters
    ----------
    label : ndarray of int or bool
        (H, W), 1 inside the cells and 0 on membranes.
    probability : ndarray of float
        (H, W) probability of cell in [0, 1].
    thresholds : tuple of float
        A pixel is cell if its probability is greater.
    valid : ndarray of bool, optional
        (H, W) pixels that are annotated; default: all.
    mapped : callable
        Calls a function for each threshold, as `map` does; that of an executor uses several threads.

    Returns
    -------
    dict of str to ndarray
        `v_rand` and `v_info` after thinning, and `pixel_error`, (T,) each in [0, 1]; `rand_counts` (T, 3), the pairs of
        pixels in one segment in both truth and proposal, in the truth, and in the proposal.
        Source: Arganda-Carreras et al. 2015, doi 10.3389/fnana.2015.00142.
    """
    truth = number_segments(label, valid)

    def scores_at(threshold: float) -> dict[str, Any]:
        """Scores of the mask of one threshold."""
        mask = probability > threshold
        thinned = contingency(truth, thin_borders(mask, valid))
        wrong = mask != (label > 0)
        plain = contingency(truth, ndimage.label(_inside(mask, valid))[0])
        single = plain.num_unassigned  # unthinned borders: each pixel of them is a pair with itself
        joint, proposal = np.sum(plain.joint**2) + single, np.sum(plain.proposal**2) + single
        return {
            "v_rand": v_rand(thinned),
            "v_info": v_info(thinned),
            "pixel_error": np.mean(wrong if valid is None else wrong[valid]),
            "rand_counts": [joint, np.sum(plain.truth**2), proposal],
        }

    rows = list(mapped(scores_at, thresholds))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def rand_error(counts: np.ndarray) -> float:
    """Foreground-restricted Rand error without thinning, the first score of the challenge: 1 - maximal F-score.

    The argument is `rand_counts` (T, 3) of `challenge_scores`, summed over the images.
    """
    return 1.0 - max(_f_score(*row) for row in counts)


def object_scores(truth: np.ndarray, proposal: np.ndarray) -> dict[str, float]:
    """Detection scores: F1 of the objects, mean overlap of the matched ones, and average precision.

    Two objects match if their intersection over union is at least 0.5; for the average precision the limit rises from
    0.5 to 0.95. An object has at most one match: of two halves of an object, each at exactly 0.5, only one counts.

    Parameters
    ----------
    truth, proposal : ndarray of int
        (H, W) object numbers; 0 is background, and -1 in the truth is not annotated. For masks, pass the 4-connected
        components.

    Returns
    -------
    dict of str to float
        `object_f1`, 2 TP / (2 TP + FP + FN), and `matched_iou`, the mean over the matches; the average precision
        TP / (TP + FP + FN) as a mean over the limits 0.5, 0.55, ... 0.95, `ap`, and of one limit, `ap_50` and `ap_75`.
        All in [0, 1], and 1 if neither image has an object. Empty if no object could be judged.
        Sources: Caicedo et al. 2019, doi 10.1038/s41592-019-0612-7; for the average precision, which is no area under a
        curve as in COCO, Schmidt et al. 2018, doi 10.1007/978-3-030-00934-2_30.

    Notes
    -----
    Only annotated pixels are compared. True objects that touch pixels without annotation may be cut, so they don't
    count. Found objects without a match don't count if more than half of them lies there or in such objects.

    Examples
    --------
    >>> scores = object_scores(np.array([[1, 1, 0, 2, 2]]), np.array([[1, 1, 1, 0, 2]]))
    >>> scores["object_f1"], scores["matched_iou"], scores["ap_50"], scores["ap_75"]
    (1.0, 0.5833333333333333, 1.0, 0.0)
    """
    overlaps = _overlaps(truth, proposal)
    num_match, num_object = np.transpose([overlaps.counts(limit) for limit in LIMITS])
    if overlaps.num_cut and not num_object[0]:
        return {}
    precision = _ratio(num_match, num_object - num_match)  # TP / (TP + FP + FN); 1 without any object
    matched = overlaps.iou[overlaps.matches(LIMITS[0])]
    return {
        "object_f1": float(_ratio(2 * num_match, num_object)[0]),
        "matched_iou": float(matched.mean()) if len(matched) else float(num_object[0] == 0),
        "ap": float(precision.mean()),
        "ap_50": float(precision[LIMITS.index(0.5)]),
        "ap_75": float(precision[LIMITS.index(0.75)]),
    }


class _Overlaps(NamedTuple):
    """Pairs of a true and a found object that overlap, and the objects that count; see `object_scores`."""

    iou: np.ndarray  # of each pair
    truth: np.ndarray  # number of the true object of each pair, ascending
    proposal: np.ndarray  # number of the found object of each pair
    counts_alone: np.ndarray  # whether a found object counts without a match, by its number
    num_truth: int  # true objects that are not cut
    num_cut: int

    def matches(self, limit: float) -> np.ndarray:
        """Indices of the pairs that reach a limit of at least 0.5, each object in one of them."""
        # Only two halves of one object, each at exactly 0.5, share it: none of them overlaps another object.
        pairs = np.flatnonzero(self.iou >= limit)
        for numbers in (self.truth, self.proposal):
            pairs = pairs[np.unique(numbers[pairs], return_index=True)[1]]
        return pairs

    def counts(self, limit: float) -> tuple[int, int]:
        """Number of matches at a limit, TP, and of the objects of both images, 2 TP + FP + FN."""
        matched = self.proposal[self.matches(limit)]
        counts = self.counts_alone.copy()
        counts[matched] = True
        return len(matched), self.num_truth + int(counts.sum())


def _overlaps(truth: np.ndarray, proposal: np.ndarray) -> _Overlaps:
    """Overlaps of true and found objects; the arguments are those of `object_scores`."""
    true, proposed, count = _pairs(truth, proposal)
    valid = true >= 0
    cut = np.zeros(0, truth.dtype) if valid.all() else _cut_objects(truth)
    area = np.bincount(true[valid], count[valid], minlength=1)
    proposed_area = np.bincount(proposed[valid], count[valid], minlength=int(proposed.max(initial=0)) + 1)
    outside = np.bincount(proposed, count * (~valid | np.isin(true, cut)))
    counts_alone = (proposed_area > 0) & (2 * outside <= np.bincount(proposed, count))
    counts_alone[0] = False  # the background
    both = (true > 0) & (proposed > 0) & ~np.isin(true, cut)
    true, proposed, joint = true[both], proposed[both], count[both]
    iou = joint / (area[true] + proposed_area[proposed] - joint)
    return _Overlaps(iou, true, proposed, counts_alone, int(np.sum(area[1:] > 0)) - len(cut), len(cut))


def _cut_objects(truth: np.ndarray) -> np.ndarray:
    """Numbers of the objects that are 4-adjacent to a pixel without annotation (-1)."""
    return np.unique(np.concatenate([one[(one > 0) & (beside < 0)] for one, beside in neighbours(truth, truth)]))


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
    around = np.ones((3, 3))
    splits = _excess_neighbours(ndimage.label(lost, around)[0], ndimage.label(warped & ~lost)[0])
    mergers = _excess_neighbours(ndimage.label(gained)[0], ndimage.label(warped)[0])
    error = np.sum(lost | gained) / (np.size(label) if valid is None else np.sum(valid))
    return {"warping_error": float(error), "num_split": splits, "num_merger": mergers}


def _warp(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Flip simple points of a mask with an empty rim until it equals the target, or there is none."""
    height, width = source.shape
    offsets = [dy * width + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    # Whether a pixel is simple depends on its eight neighbours. Those with the same parity of row and column are not
    # neighbours of each other, so that each of the four groups of wrong pixels can be flipped at once.
    wrong, groups = source != target, []
    for top, left in ((0, 0), (0, 1), (1, 0), (1, 1)):
        rows, columns = np.nonzero(wrong[top::2, left::2])
        groups.append((2 * rows + top) * width + 2 * columns + left)
    pixels, simple, flipped = source.ravel().astype(np.uint8), _simple_points(), True
    while flipped:
        flipped = False
        for number, group in enumerate(groups):
            codes = np.zeros(len(group), np.uint8)
            for bit, offset in enumerate(offsets):
                codes |= pixels[group + offset] << bit
            flips = simple[codes]
            pixels[group[flips]] ^= 1
            groups[number] = group[~flips]  # what is right is never flipped again
            flipped |= bool(flips.any())
    return pixels.reshape(height, width) > 0


@functools.cache
def _simple_points() -> np.ndarray:
    """Whether a pixel is simple, by the pattern (256) of its eight neighbours, row by row from the lowest bit."""
    # simple: touches exactly one 4-connected piece of foreground and one 8-connected piece of background
    simple = np.zeros(256, bool)
    cross = ndimage.generate_binary_structure(2, 1)
    for code in range(256):
        patch = np.insert(code >> np.arange(8) & 1, 4, 0).reshape(3, 3)
        pieces = np.unique(ndimage.label(patch)[0][cross & (patch > 0)])
        patch[1, 1] = 1
        simple[code] = len(pieces) == 1 and ndimage.label(patch == 0, np.ones((3, 3)))[1] == 1
    return simple


def _excess_neighbours(groups: np.ndarray, segments: np.ndarray) -> int:
    """Sum over the groups of pixels of the number of segments that each is 4-adjacent to, minus one."""
    pairs: set[tuple[int, int]] = set()
    for group, beside in neighbours(groups, segments):
        touch = (group > 0) & (beside > 0)
        pairs |= set(zip(group[touch].tolist(), beside[touch].tolist(), strict=True))
    counts = np.bincount([group for group, _ in pairs], minlength=1)
    return int(np.maximum(counts - 1, 0).sum())
