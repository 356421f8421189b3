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

from description import MAX_CLASS
from images.readers import Frame, read_palette
from samples import IGNORE
from utils import UserError, echo, name_hint, nearest


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

    def is_unknown(self, ignored: float) -> np.ndarray:
        """Whether any of the masks has the value of pixels that are not annotated, (H, W)."""
        unknown = np.zeros(self.frames[0].open().shape[:2], bool)
        for frame in self.frames:
            unknown |= frame.read()[..., 0] == ignored
        return unknown


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
        Function of a label image that returns its class indices (H, W); `IGNORE` where it is not annotated.
    ignore : int, float, list of int or None
        Label value of pixels that are not annotated, which is no class; None: all pixels are annotated.
    """

    values: list
    names: list[str]
    indices: Callable[[Label], np.ndarray]
    ignore: float | list[int] | None = None

    def starting_with(self, index: int) -> Classes:
        """The same classes with class `index` moved to the front."""
        order = [index, *(k for k in range(len(self.values)) if k != index)]
        rank = np.full(IGNORE + 1, IGNORE)
        rank[: len(order)] = np.argsort(order)
        values, names = ([of[k] for k in order] for of in (self.values, self.names))
        return Classes(values, names, lambda label: rank[np.asarray(self.indices(label), np.intp)], self.ignore)


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


def find_classes(
    labels: Sequence[Label], threshold: float | None, objects: bool, ignore: str = "", background: str = ""
) -> Classes:
    """Classes of label images, in the order of their values, and named after them.

    Parameters
    ----------
    labels : sequence of Frame or Masks
        The label images.
    threshold : float or None
        Make two classes, grey values up to the threshold and above it; None: each value is a class.
    objects : bool
        The labels number the objects: make two classes, background and object.
    ignore : str
        Label value of pixels that are not annotated, for a colour as `r,g,b`; empty: all pixels are annotated.
    background : str
        Of labels that number the objects: number that is background besides 0; empty: none.

    Raises
    ------
    UserError
        There is only one class, or too many; the labels are colours, which a flag can't use; or none has the value of
        pixels that are not annotated.
    """
    if objects and threshold is not None:
        raise UserError(f"--objects on --threshold {threshold:g}: each makes two classes: leave one out")
    if objects:
        return _classes_of_objects(labels, _grey_ignored(ignore, "--objects on"), background)
    if threshold is not None:
        return _classes_by_threshold(labels, threshold, _grey_ignored(ignore, f"--threshold {threshold:g}"))
    return _classes_of_values(labels, ignore)


def _classes_of_values(labels: Sequence[Label], ignore: str) -> Classes:
    """One class for each value or colour of the labels, but that of pixels that are not annotated."""
    read = _reader(labels)
    colours = [_is_colour_label(label, read(label)) for label in labels]  # of all labels, since each may be refused
    colour = any(colours)
    ignored = _ignored(ignore, colour)
    counts: Counter[float] = Counter()
    seen: list[set[float]] = []
    for label in tqdm(labels, desc="labels", disable=None, leave=False):
        found, numbers = np.unique(label_keys(read(label), colour), return_counts=True)
        counts.update(dict(zip(found.tolist(), numbers.tolist(), strict=True)))
        seen.append(set(found.tolist()))
        if len(counts.keys() - {ignored}) > MAX_CLASS:
            _refuse_labels(label, counts, colour)
    keys = _annotated(labels[0], counts, ignore, colour)
    if not colour:
        _check_one_bit(labels, [values - {ignored} for values in seen])
        _hint_at_objects(labels, keys, read)
    if ignored is None:
        _hint_at_ignore(seen, colour, is_class=len(keys) == 2)
    values = [_value(key, colour) for key in keys]

    def indices(label: Label) -> np.ndarray:
        found = label_keys(read(label), colour)
        places = np.searchsorted(keys, found).astype(np.uint8)
        return places if ignored is None else np.where(found == ignored, np.uint8(IGNORE), places)

    return Classes(
        values, [_name(value) for value in values], indices, None if ignored is None else _value(ignored, colour)
    )


def _annotated(label: Label, counts: Counter[float], ignore: str, colour: bool) -> list[float]:
    """Values of the annotated pixels of all labels, in order; at least two, else the labels are refused."""
    ignored = _ignored(ignore, colour)
    keys = sorted(counts.keys() - {ignored})
    if ignored is not None and ignored not in counts:
        raise UserError(f"--ignore {ignore}: no label has that value: choose from {_shown_values(keys, colour)}")
    if not keys:
        raise UserError(f"--ignore {ignore}: all label pixels have that value: nothing is annotated")
    if len(keys) == 1:
        what = "all labels have" if ignored is None else f"without --ignore {ignore} all labels have"
        raise UserError(
            f"{label.path}: {what} the same value {_shown_values(keys, colour)}: annotate at least two classes"
        )
    return keys


def _ignored(ignore: str, colour: bool) -> float | None:
    """Number of the ignored value as of `label_keys`, NaN for a text that is no such value; None for an empty text."""
    numbers = _numbers(ignore)
    if not ignore:
        return None
    if not colour:
        return numbers[0] if len(numbers) == 1 else np.nan
    is_rgb = len(numbers) == 3 and all(number in range(256) for number in numbers)
    return int.from_bytes(bytes(map(int, numbers))) if is_rgb else np.nan


def _grey_ignored(ignore: str, flag: str) -> float | None:
    """Ignored value of labels that are grey, as a flag demands; None for an empty text."""
    ignored = _ignored(ignore, colour=False)
    if ignored is not None and ignored != ignored:
        raise UserError(f"--ignore {ignore}: the labels of {flag} are grey: give one number")
    return ignored


def _classes_of_objects(labels: Sequence[Label], ignored: float | None, background: str) -> Classes:
    """Background and object, from labels that number the objects; `background` is a number besides 0, or empty."""
    if ignored == 0:
        raise UserError("--ignore 0 --objects on: 0 is the background: give what is not annotated another value")
    low, high = _value_range(labels, "--objects on", ignored)
    if not high > 0:
        raise UserError(f"--objects on: {_one_class(low, high)}: a value above 0 is needed")
    ground = float(background or 0)
    if ground not in (0, ignored) and not low <= ground <= high:
        raise UserError(f"--background {background}: the numbers go from {low:g} to {high:g}: choose one of them")
    if not background:
        _hint_at_background(labels, ignored)

    def indices(label: Label) -> np.ndarray:
        pixels, unknown = _read_grey(label, ignored)
        numbers = pixels[..., 0]
        foreground = objects_to_foreground(np.where(unknown | (numbers == ground), 0, numbers))  # 0 erodes no object
        return np.where(unknown, np.uint8(IGNORE), foreground)

    names = ["background", "object"]
    return Classes(names, names, indices, None if ignored is None else _value(ignored, colour=False))


def _hint_at_background(labels: Sequence[Label], ignored: float | None) -> None:
    """Ask about a number that most of the annotated pixels have: some programs number the background, too, as 1."""
    counts: Counter[float] = Counter()
    for label in labels[:20]:
        if isinstance(label, Masks):
            return
        pixels, unknown = _read_grey(label, ignored)
        found, num = np.unique(pixels[~unknown][:, 0], return_counts=True)
        counts.update(dict(zip(found.tolist(), num.tolist(), strict=True)))
    number, count = counts.most_common(1)[0] if counts else (0, 0)
    if number and 2 * count > counts.total():
        what = f"hint: {count / counts.total():.0%} of the pixels have the number {number:g}: is that the background?"
        echo(f"{what} if so, add --background {number:g}")


def _classes_by_threshold(labels: Sequence[Label], threshold: float, ignored: float | None) -> Classes:
    """Two classes: label values up to a threshold, and above it."""
    low, high = _value_range(labels, f"--threshold {threshold:g}", ignored)
    if not low <= threshold < high:
        raise UserError(f"--threshold {threshold:g}: {_one_class(low, high)}: choose a threshold between them")

    def indices(label: Label) -> np.ndarray:
        pixels, unknown = _read_grey(label, ignored)
        return np.where(unknown, np.uint8(IGNORE), pixels[..., 0] > threshold)

    names = [f"<= {threshold:g}", f"> {threshold:g}"]
    return Classes(names, names, indices, None if ignored is None else _value(ignored, colour=False))


def _read_grey(label: Label, ignored: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Grey values or numbers (H, W, C) of a label, and whether its pixels are not annotated (H, W)."""
    pixels = label.read()
    if ignored is None:
        return pixels, np.zeros(pixels.shape[:2], bool)
    return pixels, label.is_unknown(ignored) if isinstance(label, Masks) else pixels[..., 0] == ignored


def _value_range(labels: Sequence[Label], flag: str, ignored: float | None) -> tuple[float, float]:
    """Lowest and highest value of the annotated pixels of labels, which must be grey for this flag."""
    low, high, num_unknown = np.inf, -np.inf, 0
    ranges: list[set[float]] = []
    for label in tqdm(labels, desc="labels", disable=None, leave=False):
        pixels, unknown = _read_grey(label, ignored)
        if _is_colour_label(label, pixels):
            raise UserError(f"{flag}: the labels are colours: leave it out, or give grey labels")
        num_unknown += int(np.count_nonzero(unknown))
        if not unknown.all():
            known = pixels[~unknown] if ignored is not None else pixels
            ranges.append({float(known.min()), float(known.max())})
            low, high = min(low, *ranges[-1]), max(high, *ranges[-1])
    if ignored is not None and not num_unknown:
        what = f"the label values go from {low:g} to {high:g}"
        raise UserError(f"--ignore {ignored:g}: no label has that value: {what}: give one of them, or leave it out")
    if low > high:
        raise UserError(f"--ignore {ignored:g}: all label pixels have that value: nothing is annotated")
    if ignored is None:
        _hint_at_ignore(ranges, colour=False, is_class=True)
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
    values = [*map(_typed, classes.values)]
    by_name = dict(zip(classes.names, values, strict=True))
    hint = name_hint(by_name.get(nearest(text, by_name), text), values)
    raise UserError(f"{flag} {text}: no class has that value: {hint}choose from {'; '.join(values)}")


def _numbers(text: str) -> list[float]:
    """Comma-separated numbers; empty if the text is something else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return []


def is_number(text: str) -> bool:
    """Whether a text is one number."""
    return len(_numbers(text)) == 1


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
    echo(f"warning: {len(keys)} classes, each one component per image: if the labels number objects, add --objects on")


def _hint_at_ignore(seen: list[set[float]], colour: bool, *, is_class: bool) -> None:
    """Ask about pages of one value, which a class may need, if these are at least half of the pages, but not all."""
    blank = Counter(next(iter(values)) for values in seen if len(values) == 1)
    key, number = blank.most_common(1)[0] if blank else (0.0, 0)
    if 2 * number < len(seen) or number == len(seen):
        return
    value = _typed(_value(key, colour))
    what = f"hint: {number} of {len(seen)} label images have the value {value} everywhere: are they not annotated?"
    if is_class:  # without it, one class would be left
        echo(f"{what} if so, leave them out, or give them another value, such as 128, and add --ignore 128")
    else:
        echo(f"{what} if so, add --ignore {value}")


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
                echo(f"warning: {label}: the palette differs from earlier files: the classes are colours, not indices")
                return _read_colours
    if all(red == green == blue for red, green, blue in palette.values()):
        return _read_colours
    echo("the labels have a palette: its indices are the classes")
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
    """Whether a label image is in colour; refuses one that holds no values of classes."""
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        what = f"NaN or infinity in {(~np.isfinite(pixels)).sum()} pixels, which is no class"
        raise UserError(f"{label}: {what}: give these a value that no class has, such as 128, and add --ignore 128")
    colour = is_colour(pixels)
    if pixels.shape[2] not in (1, 3) or (colour and pixels.dtype != np.uint8):
        what = f"{pixels.shape[2]} channels of {pixels.dtype.name}"
        raise UserError(f"{label}: {what}: labels must be grey or 8-bit colours")
    return colour


def _rgb(key: float) -> list[int]:
    return list(int(key).to_bytes(3))


def _value(key: float, colour: bool) -> Any:
    """Label value of a number as of `label_keys`: an [r, g, b] colour, or a grey value, 1 and not 1.0."""
    return _rgb(key) if colour else int(key) if key == int(key) else key


def _typed(value: Any) -> str:
    """Label value as it is given to a flag."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _shown_values(keys: Sequence[float], colour: bool) -> str:
    return "; ".join(_typed(_value(key, colour)) for key in keys)


def _name(value: Any) -> str:
    """Default name of a class: its value, or its colour as in HTML."""
    return "#" + bytes(value).hex() if isinstance(value, list) else str(value)
