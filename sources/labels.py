"""Label images: their classes, and the class of each pixel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from dataset import MAX_CLASS
from images.frames import Frame, read_palette
from utils import UserError, say


@dataclass(frozen=True)
class Masks:
    """Label image that consists of one mask per object.

    Attributes
    ----------
    frames : tuple of Frame
        The masks, which are nonzero on their object.
    """

    frames: tuple[Frame, ...]

    def __str__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        """Folder of the masks."""
        return self.frames[0].path.parent

    def read(self) -> np.ndarray:
        """Number of the object at each pixel (H, W, 1), from 1; 0 is background."""
        numbers = np.zeros((*self.frames[0].open().shape[:2], 1), np.uint32)
        for number, frame in enumerate(self.frames, 1):
            inside = frame.read().any(-1, keepdims=True)
            if inside.shape != numbers.shape:
                sizes = f"{inside.shape[:2]}, {self.frames[0]} {numbers.shape[:2]}"
                raise UserError(f"{frame} has (height, width) {sizes}: the masks of an image must agree")
            numbers[inside] = number
        return numbers


Label = Frame | Masks


class Classes(NamedTuple):
    """Classes, and how label pixels become class indices.

    Attributes
    ----------
    values : list
        Each class's grey value, palette index or [r, g, b] colour; its name if a flag defines the classes.
    names : list of str
        Name of each class.
    indices : callable
        Function of a label image that returns its class indices (H, W).
    """

    values: list
    names: list[str]
    indices: Callable[[Label], np.ndarray]

    def starting_with(self, index: int) -> Classes:
        """The same classes with class `index` moved to the front."""
        order = [index, *(k for k in range(len(self.values)) if k != index)]
        rank = np.argsort(order)
        values, names = ([of[k] for k in order] for of in (self.values, self.names))
        return Classes(values, names, lambda label: rank[np.asarray(self.indices(label), np.intp)])


def label_keys(label: np.ndarray, colour: bool) -> np.ndarray:
    """One number (H, W) per pixel of a label image (H, W, C): its grey value, or its colour as 0xRRGGBB.

    Examples
    --------
    >>> label_keys(np.uint8([[[255, 0, 1]]]), colour=True).tolist() == [[0xFF0001]]
    True
    """
    if not colour:
        return label[..., 0]
    return (np.broadcast_to(label, (*label.shape[:2], 3)).astype(np.int64) * [1 << 16, 1 << 8, 1]).sum(-1)


def objects_to_foreground(numbers: np.ndarray) -> np.ndarray:
    """Foreground (H, W) of a label image (H, W) that numbers its objects; pixels where two touch are background.

    Examples
    --------
    >>> objects_to_foreground(np.array([[0, 7, 7, 7, 2, 2, 0, 2]])).astype(int)
    array([[0, 1, 1, 0, 0, 1, 0, 1]])
    """
    inside = numbers > 0
    lowest = ndimage.minimum_filter(np.where(inside, numbers, numbers.max()), 3)
    return inside & (lowest == ndimage.maximum_filter(numbers, 3))


def find_classes(labels: Sequence[Label], threshold: float | None, objects: bool) -> Classes:
    """Classes of label images, in the order of their values, and named after them.

    Parameters
    ----------
    labels : sequence of Frame or Masks
        The label images.
    threshold : float or None
        Make two classes, grey values up to the threshold and above it; None: each value is a class.
    objects : bool
        The labels number the objects: make two classes, background and object.

    Raises
    ------
    UserError
        There is only one class, or too many; or the labels are colours, which a flag can't use.
    """
    if objects and threshold is not None:
        raise UserError(f"--objects on --threshold {threshold:g}: each makes two classes: leave one out")
    if objects:
        return _classes_of_objects(labels)
    return _classes_of_values(labels) if threshold is None else _classes_by_threshold(labels, threshold)


def _classes_of_values(labels: Sequence[Label]) -> Classes:
    """One class for each value or colour of the labels."""
    read = _reader(labels)
    colours = [_is_colour_label(label, read(label)) for label in labels]  # of all labels, since each may be refused
    colour = any(colours)
    counts: Counter[float] = Counter()
    seen: list[set[float]] = []
    for label in tqdm(labels, desc="labels", disable=None, leave=False):
        found, numbers = np.unique(label_keys(read(label), colour), return_counts=True)
        counts.update(dict(zip(found.tolist(), numbers.tolist(), strict=True)))
        seen.append(set(found.tolist()))
        if len(counts) > MAX_CLASS or any(key != key for key in counts):
            _refuse_labels(label, counts, colour)
    keys = sorted(counts)
    if len(keys) == 1:
        raise UserError(f"{labels[0].path}: all labels have the same value {keys[0]}: annotate at least two classes")
    if not colour:
        _check_one_bit(labels, seen)
        _hint_at_objects(labels, keys, read)
    values = [_rgb(key) if colour else int(key) if key == int(key) else key for key in keys]  # 1, not 1.0
    return Classes(
        values, [_name(value) for value in values], lambda label: np.searchsorted(keys, label_keys(read(label), colour))
    )


def _classes_of_objects(labels: Sequence[Label]) -> Classes:
    """Background and object, from labels that number the objects."""
    low, high = _value_range(labels, "--objects on")
    if not high > 0:
        raise UserError(f"--objects on: {_one_class(low, high)}: a value above 0 is needed")
    names = ["background", "object"]
    return Classes(names, names, lambda label: objects_to_foreground(label.read()[..., 0]))


def _classes_by_threshold(labels: Sequence[Label], threshold: float) -> Classes:
    """Two classes: label values up to a threshold, and above it."""
    low, high = _value_range(labels, f"--threshold {threshold:g}")
    if not low <= threshold < high:
        raise UserError(f"--threshold {threshold:g}: {_one_class(low, high)}: choose a threshold between them")
    names = [f"<= {threshold:g}", f"> {threshold:g}"]
    return Classes(names, names, lambda label: label.read()[..., 0] > threshold)


def _value_range(labels: Sequence[Label], flag: str) -> tuple[float, float]:
    """Lowest and highest value of the labels, which must be grey for this flag."""
    low, high = np.inf, -np.inf
    for label in tqdm(labels, desc="labels", disable=None, leave=False):
        pixels = label.read()
        if _is_colour_label(label, pixels):
            raise UserError(f"{flag}: the labels are colours: leave it out, or give grey labels")
        low, high = min(low, pixels.min()), max(high, pixels.max())
    return low, high


def _one_class(low: float, high: float) -> str:
    return f"the label values go from {low:g} to {high:g}, which is one class"


def choose_background(classes: Classes, background: str, foreground: str) -> Classes:
    """Classes in the order that makes the background class 0, and with two classes the foreground class 1.

    Parameters
    ----------
    classes : Classes
        As found in the labels.
    background, foreground : str
        Label value of a class, for a colour as `r,g,b`; empty: keep the order.

    Raises
    ------
    UserError
        No class has that value, or a foreground is given for more than two classes.
    """
    if foreground and len(classes.values) != 2:
        raise UserError(f"--foreground {foreground}: there are {len(classes.values)} classes, not 2: use --background")
    first = 0
    if foreground:
        first = 1 - _index_of(classes, "--foreground", foreground)
    if background:
        given = _index_of(classes, "--background", background)
        if foreground and given != first:
            raise UserError(f"--foreground {foreground}: that is the background: leave one out")
        first = given
    return classes.starting_with(first)


def _index_of(classes: Classes, flag: str, text: str) -> int:
    """Index of the class whose value a flag gives."""
    for index, value in enumerate(classes.values):
        numbers = value if isinstance(value, list) else [value]
        if text.strip() == str(value) or _numbers(text) == numbers:
            return index
    shown = "; ".join(",".join(map(str, value)) if isinstance(value, list) else str(value) for value in classes.values)
    raise UserError(f"{flag} {text}: no class has that value: choose from {shown}")


def _numbers(text: str) -> list[float]:
    """Comma-separated numbers; empty if the text is something else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return []


def _refuse_labels(label: Label, counts: Counter[float], colour: bool) -> NoReturn:
    total = sum(counts.values())
    frequent = ", ".join(f"{_rgb(key) if colour else key} ({n / total:.1%})" for key, n in counts.most_common(8))
    raise UserError(
        f"{label}: {len(counts)} distinct label values, at most {MAX_CLASS} classes are allowed; the most frequent are"
        f" {frequent}: save the labels in a lossless format and without interpolation, make two classes by"
        " --threshold T, or, if they number the objects, by --objects on"
    )


def _check_one_bit(labels: Sequence[Label], seen: list[set[float]]) -> None:
    """Refuse a mix of masks with values 0 and 1 and masks with 0 and 255, which would become three classes."""
    if set().union(*seen) == {0, 1, 255} and not any({1, 255} <= values for values in seen):
        one, other = (next(label for label, values in zip(labels, seen, strict=True) if v in values) for v in (1, 255))
        raise UserError(f"{one} has the values 0 and 1, {other} 0 and 255: save all masks in the same way")


def _hint_at_objects(labels: Sequence[Label], keys: list[float], read: Callable[[Label], np.ndarray]) -> None:
    """Warn if the values seem to number objects: no gaps from 0 on, and each is one component in every image."""
    if len(keys) < 4 or keys != list(range(len(keys))):
        return
    for label in labels[:20]:
        numbers = read(label)[..., 0]
        if any(ndimage.label(numbers == key, np.ones((3, 3)))[1] > 1 for key in keys[1:]):
            return
    say(f"warning: {len(keys)} classes, each one component per image: if the labels number objects, add --objects on")


def _reader(labels: Sequence[Label]) -> Callable[[Label], np.ndarray]:
    """Reader of label images: palette indices if all have the same palette with colours, else values or colours."""
    palette: dict[int, tuple] = {}
    for label in labels:
        found = _palette(label)
        if found is None:
            return _read_colours
        for index in np.unique(found[0]).tolist():
            colour = tuple(found[1][index].tolist())
            if palette.setdefault(index, colour) != colour:
                say(f"warning: {label}: the palette differs from earlier files: the classes are colours, not indices")
                return _read_colours
    if all(red == green == blue for red, green, blue in palette.values()):
        return _read_colours
    say("the labels have a palette: its indices are the classes")
    return _read_indices


def _palette(label: Label) -> tuple[np.ndarray, np.ndarray] | None:
    """Indices (H, W) and colours (N, 3) of a label stored with a palette; None for others."""
    return read_palette(label) if isinstance(label, Frame) else None


def _read_colours(label: Label) -> np.ndarray:
    """Label image (H, W, C) of grey values or colours."""
    found = _palette(label)
    return label.read() if found is None else found[1][found[0]]


def _read_indices(label: Label) -> np.ndarray:
    """Label image (H, W, C) of grey values or indices of a palette."""
    found = _palette(label)
    return label.read() if found is None else found[0][..., None]


def is_colour(image: np.ndarray) -> bool:
    """Whether an image (H, W, C) has three different channels."""
    return bool(image.shape[2] == 3 and (image != image[..., :1]).any())


def _is_colour_label(label: Label, pixels: np.ndarray) -> bool:
    """Whether a label image is in colour."""
    colour = is_colour(pixels)
    if pixels.shape[2] not in (1, 3) or (colour and pixels.dtype != np.uint8):
        what = f"{pixels.shape[2]} channels of {pixels.dtype.name}"
        raise UserError(f"{label}: {what}: labels must be grey or 8-bit colours")
    return colour


def _rgb(key: float) -> list[int]:
    return list(int(key).to_bytes(3))


def _name(value: Any) -> str:
    """Default name of a class: its value, or its colour as in HTML."""
    return "#" + bytes(value).hex() if isinstance(value, list) else str(value)
