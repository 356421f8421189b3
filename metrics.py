"""Scores of a segmentation: pure functions on arrays."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def confusion_matrix(label: Tensor | np.ndarray, prediction: Tensor | np.ndarray, num_class: int) -> Tensor:
    """Count the pixels of each pair of classes in each image.

    Parameters
    ----------
    label, prediction : Tensor or ndarray of int or bool
        (N, H, W) class indices in [0, num_class).
    num_class : int
        Number of classes, K.

    Returns
    -------
    Tensor of int64
        (N, K, K) on the device of the label; row: class of the label, column: class of the prediction.

    Raises
    ------
    ValueError
        The shapes differ, or (looked at on a CPU only, where it costs no wait) a value is no class index.

    Examples
    --------
    >>> confusion_matrix(np.array([[[0, 0, 1, 1]]]), np.array([[[0, 1, 1, 1]]]), 2).tolist()
    [[[1, 1], [0, 2]]]
    """
    label, prediction = torch.as_tensor(label).long(), torch.as_tensor(prediction).long()
    if label.shape != prediction.shape:
        raise ValueError(f"label {tuple(label.shape)} and prediction {tuple(prediction.shape)} must have one shape")
    for name, classes in (("label", label), ("prediction", prediction)):
        if classes.device.type == "cpu" and ((classes < 0) | (classes >= num_class)).any():
            raise ValueError(f"{name} must hold class indices in [0, {num_class})")
    pairs = (label * num_class + prediction).flatten(1)  # (N, H, W) -> (N, H * W)
    counts = pairs.new_zeros(len(pairs), num_class**2)
    return counts.scatter_add_(1, pairs, torch.ones_like(pairs)).view(-1, num_class, num_class)


def dice(confusion: np.ndarray) -> np.ndarray:
    """Dice coefficient of each class, 2 |A and B| / (|A| + |B|).

    Parameters
    ----------
    confusion : ndarray of int
        (..., K, K), see `confusion_matrix`.

    Returns
    -------
    ndarray of float64
        (..., K) in [0, 1]; 1 for a class that neither label nor prediction holds.
        Source: Dice 1945, doi 10.2307/1932409.

    Examples
    --------
    >>> dice(np.array([[1, 1], [0, 2]]))
    array([0.66666667, 0.8       ])
    """
    both, label, prediction = _areas(confusion)
    return _ratio(2 * both, label + prediction)


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, |A and B| / |A or B| (the Jaccard index).

    Parameters
    ----------
    confusion : ndarray of int
        (..., K, K), see `confusion_matrix`.

    Returns
    -------
    ndarray of float64
        (..., K) in [0, 1]; 1 for a class that neither label nor prediction holds.

    Examples
    --------
    >>> iou(np.array([[1, 1], [0, 2]]))
    array([0.5       , 0.66666667])
    """
    both, label, prediction = _areas(confusion)
    return _ratio(both, label + prediction - both)


def pixel_error(confusion: np.ndarray) -> np.ndarray:
    """Fraction of the pixels whose class is wrong.

    Parameters
    ----------
    confusion : ndarray of int
        (..., K, K), see `confusion_matrix`.

    Returns
    -------
    ndarray of float64
        (...) in [0, 1]; 0 where there is no pixel.

    Examples
    --------
    >>> float(pixel_error(np.array([[1, 1], [0, 2]])))
    0.25
    """
    both, label, _ = _areas(confusion)
    return 1.0 - _ratio(both.sum(-1), label.sum(-1))


def majority_confusion(confusion: np.ndarray, majority: int) -> np.ndarray:
    """Confusion matrix of the answer that every pixel is of one class: the baseline beside a score.

    Parameters
    ----------
    confusion : ndarray of int
        (..., K, K), see `confusion_matrix`; only its labels count.
    majority : int
        The class that is always said.

    Examples
    --------
    >>> majority_confusion(np.array([[1, 1], [0, 2]]), 1)
    array([[0, 2],
           [0, 2]])
    """
    answer = np.zeros_like(confusion)
    answer[..., majority] = confusion.sum(-1)
    return answer


def confusion_scores(confusion: np.ndarray, names: list[str]) -> dict[str, float]:
    """Scores of one confusion matrix by name: `pixel_error`, and `dice_NAME` and `iou_NAME` of each class.

    Parameters
    ----------
    confusion : ndarray of int
        (K, K), see `confusion_matrix`.
    names : list of str
        Name of each class.
    """
    scores = {"pixel_error": float(pixel_error(confusion))}
    for score, values in (("dice", dice(confusion)), ("iou", iou(confusion))):
        scores |= {f"{score}_{name}": float(value) for name, value in zip(names, values, strict=True)}
    return scores


def mean_scores(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each score over the images that have it.

    Examples
    --------
    >>> mean_scores([{"dice": 1.0, "loss": 2.0}, {"dice": 0.5}])
    {'dice': 0.75, 'loss': 2.0}
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def _areas(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of each class in both, in the label, in the prediction: (..., K) each."""
    return np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1), confusion.sum(-2)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, and 1 where both are empty."""
    return np.where(whole > 0, part / np.maximum(whole, 1), 1.0)
