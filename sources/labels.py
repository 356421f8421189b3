"""Label images: their classes, and the class of each pixel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from description import MAX_CLASS, DataInfo
from images.readers import Frame
from progress import tracked
from samples import IGNORE
from sources.numbered import GAP, border_number, part_objects
from sources.scan import (
    FULL,
    Reader,
    Scan,
    as_one_kind,
    ignored_key,
    in_alpha,
    is_colour_label,
    key_of,
    numbers_in,
    scan,
    typed,
    value_of,
)
from utils import UserError, echo, name_hint, nearest

NUM_HINT = 20  # label images that are read for a hint


class Masks(NamedTuple):
    """Label image that consists of one mask per object."""

    frames: tuple[Frame, ...]  # nonzero on their object

    def __str__(self) -> str:
        return str(self.frames[0].path.parent)

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


class Reading(NamedTuple):
    """How labels are read, besides the values of the classes; kept in `dataset.json` for labels that are added."""

    threshold: float | None = None  # values above it are class 1
    objects: bool = False  # the labels number the objects
    background: float = 0  # number of the background, which is no object
    indices: bool = False  # of a palette


class Classes(NamedTuple):
    """Classes, and how label pixels become class indices."""

    values: list  # each class's grey value, palette index or [r, g, b] colour; its name if a flag defines the classes
    names: list[str]
    indices: Reader  # of class indices; `IGNORE` where a pixel is not annotated
    ignore: float | list[int] | None = None  # label value that is not annotated; None: all pixels are annotated
    gap: int = 0  # [px] between objects that touch, of labels that number objects
    left: dict[str, np.ndarray] | None = None  # numbered objects of each label that was read, and those that are left
    reading: Reading = Reading()


def find_classes(labels: list[Label], threshold: float | None, objects: bool, ignore: str, background: str) -> Classes:
    """Classes of label images by the flags of these names, in the order of their values, and named after them."""
    if objects and threshold is not None:
        raise UserError(f"--objects on --threshold {threshold:g}: each makes two classes: leave one out")
    if objects:
        return _classes_of_objects(labels, ignore, background)
    if threshold is not None:
        return _classes_by_threshold(labels, threshold, ignore)
    frames = [label for label in labels if isinstance(label, Frame)]  # `Masks` number objects
    scanned = as_one_kind(in_alpha(scan(frames, ignore)))
    check(scanned, ignore)
    values = [value_of(key, scanned.colour) for key in scanned.keys]
    names = ["#" + bytes(value).hex() if scanned.colour else str(value) for value in values]  # as in HTML
    indices = make_indices(scanned.read, scanned.keys, scanned.ignored)
    ignored = value_of(scanned.ignored, scanned.colour)
    return Classes(values, names, indices, ignored, reading=Reading(indices=scanned.indices))


def check(scanned: Scan, ignore: str) -> None:
    """Refuse labels that make no classes, and warn of those that look as if they meant something else."""
    keys = scanned.keys
    if len(keys) > MAX_CLASS:
        shares = [(value_of(key, scanned.colour), num) for key, num in scanned.counts.most_common(8)]
        frequent = ", ".join(f"{value} ({num / scanned.counts.total():.1%})" for value, num in shares)
        raise UserError(
            f"{scanned.labels[len(scanned.keys_of_labels) - 1]}: {len(scanned.counts)} distinct label values, at most"
            f" {MAX_CLASS} classes are allowed; the most frequent are {frequent}: save the labels in a lossless format"
            " and without interpolation, make two classes by --threshold T, or, if they number the objects, by"
            " --objects on"
        )
    values = "; ".join(typed(value_of(key, scanned.colour)) for key in keys)
    if ignore and scanned.ignored not in scanned.counts:
        raise UserError(f"--ignore {ignore}: no label has that value: choose from {values}")
    if not keys:
        raise UserError(f"--ignore {ignore}: all label pixels have that value: nothing is annotated")
    if len(keys) == 1:
        what = f"without --ignore {ignore} all labels have" if ignore else "all labels have"
        raise UserError(f"{scanned.labels[0].path}: {what} the same value {values}: annotate at least two classes")
    if not scanned.colour:
        _check_numbered(scanned)
        _hint_at_objects(scanned)
    if not ignore:
        _hint_at_ignore(scanned.keys_of_labels, scanned.colour, is_class=len(keys) == 2)


def make_indices(read: Reader, keys: list[float], ignored: float | None) -> Reader:
    """Reader of the index of each pixel among the keys."""

    def indices(label: Label) -> np.ndarray:
        pixels = read(label)
        classes = np.searchsorted(keys, pixels).astype(np.uint8)
        return classes if ignored is None else np.where(pixels == ignored, np.uint8(IGNORE), classes)

    return indices


def _check_numbered(scanned: Scan) -> None:
    """Refuse label images that number objects among masks of two values: their numbers would become classes."""
    pairs = [*zip(scanned.labels, (keys - {scanned.ignored} for keys in scanned.keys_of_labels), strict=True)]
    masks = [label for label, keys in pairs if len(keys) == 2 and keys & {*FULL}]
    numbered = [label for label, keys in pairs if len(keys) > 3 and sorted(keys) == list(range(len(keys)))]
    if masks and numbered:
        what = f"{numbered[0]}: it seems to number objects, where {masks[0]} has two values"
        raise UserError(f"{what}: number the objects in all labels, and add --objects on, or make it a mask, too")


def _hint_at_objects(scanned: Scan) -> None:
    """Warn if the values seem to number objects: no gaps from 0 on, and each is one component in every image."""
    keys = scanned.keys
    if len(keys) < 4 or keys != list(range(len(keys))):
        return
    for numbers in map(scanned.read, scanned.labels[:NUM_HINT]):
        if any(ndimage.label(numbers == key, np.ones((3, 3)))[1] > 1 for key in keys[1:]):
            return
    echo(f"warning: {len(keys)} classes, each one component per image: if the labels number objects, add --objects on")


def _hint_at_ignore(keys_of_labels: list[set[float]], colour: bool, *, is_class: bool) -> None:
    """Ask about labels of one value, which a class may need, if these are at least half of all, but not all."""
    blank = Counter(next(iter(keys)) for keys in keys_of_labels if len(keys) == 1)
    key, number = blank.most_common(1)[0] if blank else (0.0, 0)
    if 2 * number < len(keys_of_labels) or number == len(keys_of_labels):
        return
    value = typed(value_of(key, colour))
    what = f"hint: {number} of {len(keys_of_labels)} label images have the value {value} everywhere"
    advice = f"add --ignore {value}"
    if is_class:  # without it, one class would be left
        advice = "leave them out, or give them another value, such as 128, and add --ignore 128"
    echo(f"{what}: are they not annotated? if so, {advice}")


def _classes_of_objects(labels: list[Label], ignore: str, background: str) -> Classes:
    """Background and object, from labels that number the objects; `background` is a number besides 0, or empty."""
    ignored = ignored_key(ignore, colour=False)
    if ignored == 0:
        raise UserError("--ignore 0 --objects on: 0 is the background: give what is not annotated another value")
    low, high = _value_range(labels, "--objects on", ignore)
    if not high > 0:
        what = f"the label values go from {low:g} to {high:g}, which is one class"
        raise UserError(f"--objects on: {what}: a value above 0 is needed")
    ground = float(background or 0)
    if ground not in (0, ignored) and not low <= ground <= high:
        raise UserError(f"--background {background}: the numbers go from {low:g} to {high:g}: choose one of them")
    if not background and isinstance(labels[0], Frame):
        read = _read_some(labels, ignored)
        ground = border_number(np.where(valid, pixels[..., 0], 0) for pixels, valid in read) or 0.0
        if ground:
            what = f"the number {ground:g} is background, since most pixels at the borders of the images have it"
            echo(f"note: {what}; if it is an object: --background 0")
    return _read_objects(ground, ignored)


def _read_objects(ground: float, ignored: float | None) -> Classes:
    """Background and object, of labels whose background has this number."""
    left: dict[str, np.ndarray] = {}  # of each label image, the objects that are numbered, and those that are left

    def indices(label: Label) -> np.ndarray:
        pixels, valid = _read_grey(label, ignored)
        numbers = np.where(valid & (pixels[..., 0] != ground), pixels[..., 0], 0)  # 0 erodes no object
        foreground = part_objects(numbers)
        left[str(label)] = np.array([len(np.unique(part[part > 0])) for part in (numbers, numbers * foreground)])
        return np.where(valid, foreground, np.uint8(IGNORE))

    names, reading = ["background", "object"], Reading(objects=True, background=ground)
    return Classes(names, names, indices, value_of(ignored, colour=False), GAP, left, reading)


def _read_some(labels: list[Label], ignored: float | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers and annotated pixels of a few label images."""
    return (_read_grey(label, ignored) for label in labels[:NUM_HINT])


def _classes_by_threshold(labels: list[Label], threshold: float, ignore: str) -> Classes:
    """Two classes: label values up to a threshold, and above it."""
    ignored = ignored_key(ignore, colour=False)
    low, high = _value_range(labels, f"--threshold {threshold:g}", ignore)
    if not low <= threshold < high:
        what = f"the label values go from {low:g} to {high:g}, which is one class"
        raise UserError(f"--threshold {threshold:g}: {what}: choose a threshold between them")

    return _read_by_threshold(threshold, ignored)


def _read_by_threshold(threshold: float, ignored: float | None) -> Classes:
    """Two classes of grey labels."""

    def indices(label: Label) -> np.ndarray:
        pixels, valid = _read_grey(label, ignored)
        return np.where(valid, pixels[..., 0] > threshold, np.uint8(IGNORE))

    names, reading = [f"<= {threshold:g}", f"> {threshold:g}"], Reading(threshold)
    return Classes(names, names, indices, value_of(ignored, colour=False), reading=reading)


def _read_grey(label: Label, ignored: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Grey values or numbers (H, W, C) of a label, and which of its pixels (H, W) are annotated."""
    pixels = label.read()
    valid = np.ones(pixels.shape[:2], bool)
    if ignored is not None:
        for mask in map(Frame.read, label.frames) if isinstance(label, Masks) else [pixels]:
            valid &= mask[..., 0] != ignored
    return pixels, valid


def _value_range(labels: list[Label], flag: str, ignore: str) -> tuple[float, float]:
    """Lowest and highest value of the annotated pixels of labels, which must be grey for this flag."""
    ignored = ignored_key(ignore, colour=False)
    if ignored is not None and np.isnan(ignored):
        raise UserError(f"--ignore {ignore}: the labels of {flag} are grey: give one number")
    ranges: list[tuple[float, float]] = []  # of the labels with annotated pixels
    has_ignored = False
    for label in tracked(labels, "labels"):
        pixels, valid = _read_grey(label, ignored)
        if is_colour_label(label, pixels):
            raise UserError(f"{flag}: the labels are colours: leave it out, or give grey labels")
        has_ignored |= not valid.all()
        values = pixels[valid]
        if values.size:
            ranges.append((float(values.min()), float(values.max())))
    if not ranges:
        raise UserError(f"--ignore {ignore}: all label pixels have that value: nothing is annotated")
    low, high = min(map(min, ranges)), max(map(max, ranges))
    if ignore and not has_ignored:
        what = f"the label values go from {low:g} to {high:g}"
        raise UserError(f"--ignore {ignore}: no label has that value: {what}: give one of them, or leave it out")
    if not ignore:
        _hint_at_ignore([set(limits) for limits in ranges], colour=False, is_class=True)
    return low, high


def choose_background(classes: Classes, background: str, foreground: str) -> Classes:
    """Classes with these label values, `r,g,b` for a colour, as class 0 and class 1; empty texts change nothing."""
    if foreground and len(classes.values) != 2:
        raise UserError(f"--foreground {foreground}: there are {len(classes.values)} classes, not 2: use --background")
    first = 1 - _index_of(classes, "--foreground", foreground) if foreground else 0
    if background:
        index = _index_of(classes, "--background", background)
        if foreground and index != first:
            raise UserError(f"--foreground {foreground}: that is the background: leave one out")
        first = index
    return _ordered(classes, [first, *(k for k in range(len(classes.values)) if k != first)])


def _ordered(classes: Classes, order: list[int]) -> Classes:
    """Classes in another order."""
    rank = np.full(IGNORE + 1, IGNORE)
    rank[order] = range(len(order))
    values, names = ([of[k] for k in order] for of in (classes.values, classes.names))
    indices = classes.indices
    return classes._replace(values=values, names=names, indices=lambda label: rank[np.asarray(indices(label), np.intp)])


def fit_classes(labels: list[Label], info: DataInfo, reading: Reading, ignore: str) -> Classes:
    """Classes of a database, and their indices of the pixels of labels that are added to it."""
    grey = reading.objects or reading.threshold is not None
    for label in labels:
        if isinstance(label, Masks) and not reading.objects:
            raise UserError(f"{label}: one mask per object, which the labels of the database are not: join them")
        if grey and is_colour_label(label, label.read()):
            raise UserError(f"{label}: colours, where the labels of the database are grey: save it as grey values")
    ignored = ignored_key(ignore, colour=False)
    if reading.objects:
        classes = _read_objects(reading.background, ignored)
    elif reading.threshold is not None:
        classes = _read_by_threshold(reading.threshold, ignored)
    else:
        frames = [label for label in labels if isinstance(label, Frame)]
        classes = _fit_values(frames, info.class_values, ignore, reading)
    order = [classes.values.index(value) for value in info.class_values]
    return _ordered(classes, order)._replace(names=info.class_names)


def _fit_values(labels: list[Frame], values: list, ignore: str, reading: Reading) -> Classes:
    """Classes with these values, in ascending order; refuses labels with others, but masks of one kind.

    Masks are not known by their values where the database has indices of a palette, of which 0 may be any class.
    """
    scanned = in_alpha(scan(labels, ignore, colour=any(isinstance(value, list) for value in values)))
    keys = sorted(key_of(value, scanned.colour) for value in values)
    if np.isnan(keys).any():
        kind = "colours" if scanned.colour else "grey values"
        raise UserError(
            f"{labels[0]}: {kind}; the classes of the database are {'; '.join(map(typed, values))}: save it so"
        )
    # as if a label of the database were among them
    counts = scanned.counts + Counter(dict.fromkeys(keys, 1))
    scanned = scanned._replace(counts=counts, keys_of_labels=[*scanned.keys_of_labels, {*keys}])
    scanned = scanned if reading.indices else as_one_kind(scanned)
    if len(scanned.keys) != len(keys):
        for label, keys_of_label in zip(labels, scanned.keys_of_labels, strict=False):
            others = [typed(value_of(key, scanned.colour)) for key in sorted(keys_of_label - {*keys, scanned.ignored})]
            if others:
                what = f"{label}: label value {'; '.join(others[:8])}{' ...' if len(others) > 8 else ''}"
                raise UserError(f"{what}: the classes of the database are {'; '.join(map(typed, values))}: repair it")
    ascending = sorted(values, key=lambda value: key_of(value, scanned.colour))
    indices = make_indices(scanned.read, scanned.keys, scanned.ignored)
    ignored = value_of(scanned.ignored, scanned.colour)
    return Classes(ascending, [*map(str, ascending)], indices, ignored, reading=reading)


def _index_of(classes: Classes, flag: str, text: str) -> int:
    """Index of the class whose value a flag names."""
    for index, value in enumerate(classes.values):
        numbers = value if isinstance(value, list) else [value]
        if text.strip() == str(value) or numbers_in(text) == numbers:
            return index
    values = [*map(typed, classes.values)]
    by_name = dict(zip(classes.names, values, strict=True))
    hint = name_hint(by_name.get(nearest(text, by_name), text), values)
    raise UserError(f"{flag} {text}: no class has that value: {hint}choose from {'; '.join(values)}")
