"""Label images: which classes their values or colours are, and which class a pixel has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from dataset import MAX_CLASS
from images import Frame
from utils import UserError


class Classes(NamedTuple):
    """How label pixels become class indices.

    Attributes
    ----------
    values : list
        Of each class: a grey value, an [r, g, b] colour, or words where a flag makes the classes.
    indices : callable
        From a label image (H, W, C) to class indices (H, W).
    """

    values: list
    indices: Callable[[np.ndarray], np.ndarray]


def label_keys(label: np.ndarray, colour: bool) -> np.ndarray:
    """One number a pixel, (H, W) of a label image (H, W, C): its grey value, or its colour as 0xRRGGBB.

    Examples
    --------
    >>> label_keys(np.uint8([[[255, 0, 1]]]), colour=True).tolist() == [[0xFF0001]]
    True
    """
    if not colour:
        return label[..., 0]
    return (np.broadcast_to(label, (*label.shape[:2], 3)).astype(np.int64) * [1 << 16, 1 << 8, 1]).sum(-1)


def part_objects(numbers: np.ndarray) -> np.ndarray:
    """Classes (H, W) of a label image (H, W) that numbers its objects: 0, and where two touch, is background.

    Examples
    --------
    >>> part_objects(np.array([[0, 7, 7, 7, 2, 2, 0, 2]])).astype(int)
    array([[0, 1, 1, 0, 0, 1, 0, 1]])
    """
    inside = numbers > 0
    lowest = ndimage.minimum_filter(np.where(inside, numbers, numbers.max()), 3)
    return inside & (lowest == ndimage.maximum_filter(numbers, 3))


def find_classes(frames: list[Frame], threshold: float, objects: bool) -> Classes:
    """Classes of label images.

    Parameters
    ----------
    frames : list of Frame
        The label images.
    threshold : float
        Makes two classes of grey values, over it or not; NaN: the values are the classes.
    objects : bool
        Make two classes of labels that number the objects.

    Raises
    ------
    UserError
        There is one class alone, or more than can be meant; or the labels are colours and can't be compared.
    """
    colour = any(_is_colour(frame) for frame in frames)
    if objects or not np.isnan(threshold):
        return _two_classes(threshold, objects, colour)
    counts: Counter = Counter()
    for frame in tqdm(frames, desc="labels", disable=None, leave=False):
        keys, numbers = np.unique(label_keys(frame.read(), colour), return_counts=True)
        counts.update(dict(zip(keys.tolist(), numbers.tolist(), strict=True)))
        if len(counts) > MAX_CLASS or any(key != key for key in counts):
            _refuse_labels(frame, counts, colour)
    keys = sorted(counts)
    if len(keys) == 1:
        raise UserError(f"{frames[0].path}: all labels have the one value {keys[0]}: annotate at least two classes")
    values = [_rgb(key) if colour else int(key) if key == int(key) else key for key in keys]  # 1, not 1.0
    return Classes(values, lambda label: np.searchsorted(keys, label_keys(label, colour)))


def _two_classes(threshold: float, objects: bool, colour: bool) -> Classes:
    """Classes of labels whose values are not the classes."""
    if objects and not np.isnan(threshold):
        raise UserError(f"--objects on --threshold {threshold:g}: each makes two classes: leave one out")
    if colour:
        what = "--objects on" if objects else f"--threshold {threshold:g}"
        raise UserError(f"{what}: the labels are colours: leave it out, or give grey labels")
    if objects:
        return Classes(["background", "object"], lambda label: part_objects(label[..., 0]))
    return Classes([f"<= {threshold:g}", f"> {threshold:g}"], lambda label: label[..., 0] > threshold)


def _refuse_labels(frame: Frame, counts: Counter, colour: bool) -> NoReturn:
    total = sum(counts.values())
    frequent = ", ".join(f"{_rgb(key) if colour else key} ({n / total:.1%})" for key, n in counts.most_common(8))
    raise UserError(
        f"{frame}: {len(counts)} distinct label values, at most {MAX_CLASS} classes are allowed; the most frequent are"
        f" {frequent}: save the labels without compression loss or interpolation, make two classes by --threshold T,"
        " or, if they number the objects, by --objects on"
    )


def _is_colour(frame: Frame) -> bool:
    """Whether a label image has three channels that differ."""
    label = frame.read()
    colour = label.shape[2] == 3 and (label != label[..., :1]).any()
    if label.shape[2] not in (1, 3) or (colour and label.dtype != np.uint8):
        raise UserError(f"{frame}: {label.shape[2]} channels of {label.dtype}: labels must be grey or 8-bit colours")
    return bool(colour)


def _rgb(key: int) -> list[int]:
    return [key >> 16, key >> 8 & 255, key & 255]
