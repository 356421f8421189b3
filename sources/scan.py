"""What label images hold: a number for each pixel, its grey value or colour, and how often each of them occurs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from description import MAX_CLASS
from images.readers import Frame, read_palette
from progress import tracked
from utils import UserError, echo

FULL = (1, 255, 65535)  # values of the foreground in masks of 1, 8 and 16 bits
Reader = Callable[[Any], np.ndarray]  # of a number (H, W) for each pixel of a label image


class Scan(NamedTuple):
    """What label images hold; pixels are keys as of `label_keys`."""

    labels: list[Frame]
    ignored: float | None  # key of pixels that are not annotated
    colour: bool
    read: Reader  # of keys
    counts: Counter[float]  # number of pixels of each key, in all labels up to the first with which they are too many
    keys_of_labels: list[set[float]]  # keys in each of these labels
    indices: bool = False  # the keys are indices of a palette

    @property
    def keys(self) -> list[float]:
        """Keys of the annotated pixels, in order: the classes."""
        return sorted(self.counts.keys() - {self.ignored})


def scan(labels: list[Frame], ignore: str, *, colour: bool = False) -> Scan:
    """Read all labels, and count their values or colours; `colour`: colours, even if all of them are grey."""
    as_indices = not colour and _have_one_palette(labels)
    # of all labels, since each may be refused
    colour |= sum(is_colour_label(label, _read_pixels(label, as_indices)) for label in labels) > 0

    def read(label: Frame) -> np.ndarray:
        return label_keys(_read_pixels(label, as_indices), colour)

    scanned = Scan(labels, ignored_key(ignore, colour), colour, read, Counter(), [], as_indices)
    for label in tracked(labels, "labels"):
        counts = count_keys(read(label))
        scanned.counts.update(counts)
        scanned.keys_of_labels.append({*counts})
        if len(scanned.keys) > MAX_CLASS:
            break
    return scanned


def in_alpha(scanned: Scan) -> Scan:
    """Masks whose colours are the same everywhere, but not their transparency: that is the label."""
    if len(scanned.counts) != 1:
        return scanned
    alpha = [read_alpha(label) for label in scanned.labels]
    counts = [count_keys(pixels) for pixels in alpha if pixels is not None]
    if len(counts) < len(alpha) or len({key for of_label in counts for key in of_label}) != 2:
        return scanned
    echo("note: the masks lie in the alpha channel of the labels: that is read")
    keys = [{float(key) for key in of_label} for of_label in counts]
    total = sum((Counter(of_label) for of_label in counts), Counter[float]())
    return scanned._replace(colour=False, read=read_alpha, counts=total, keys_of_labels=keys)


def read_alpha(label: Frame) -> Any:
    """Transparency (H, W) of a picture; None for others."""
    from PIL import Image

    with suppress(OSError), Image.open(label.path) as image:
        return np.asarray(image.getchannel("A")) if "A" in image.getbands() else None


def as_one_kind(scanned: Scan) -> Scan:
    """Masks that were saved differently, such as 0 and 1 beside 0 and 255, with one key for their foreground."""
    of_labels = [keys - {scanned.ignored} for keys in scanned.keys_of_labels]
    ground = scanned.keys[0] if scanned.keys else 0
    bright = {key for key in scanned.keys if key != ground}
    white = 0xFFFFFF if scanned.colour else None
    are_masks = ground == 0 and all(len(keys) <= 2 and (0 in keys or len(keys) < 2) for keys in of_labels)
    is_full = white in bright or all(key in FULL or abs(key - 1) < 1e-5 for key in bright)
    if len(bright) < 2 or not are_masks or not is_full:
        return scanned
    value, read = max(bright), scanned.read
    counts = Counter({0: scanned.counts[0], value: sum(scanned.counts[key] for key in bright)})
    if scanned.ignored is not None:
        counts[scanned.ignored] = scanned.counts[scanned.ignored]
    values = ", ".join(typed(value_of(key, scanned.colour)) for key in sorted(bright))
    echo(f"note: masks of one kind, saved with {values}: all are the foreground, {value_of(value, scanned.colour)}")

    def merged(label: Frame) -> np.ndarray:
        keys = read(label)
        return np.where(np.isin(keys, list(bright)), value, keys)

    kept = [{value if key in bright else key for key in keys} for keys in scanned.keys_of_labels]
    return scanned._replace(read=merged, counts=counts, keys_of_labels=kept)


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


def count_keys(keys: np.ndarray) -> dict[float, int]:
    """Number of pixels of each key."""
    values, numbers = np.unique(keys, return_counts=True)
    return dict(zip(values.tolist(), numbers.tolist(), strict=True))


def _read_pixels(label: Frame, as_indices: bool) -> np.ndarray:
    """Label image (H, W, C) of grey values or colours, or of the indices of a palette."""
    palette = read_palette(label)
    if palette is None:
        return label.read()
    indices, colours = palette
    return indices[..., None] if as_indices else colours[indices]


def _have_one_palette(labels: list[Frame]) -> bool:
    """Whether all labels have the same palette with colours, so that its indices are the classes."""
    colours: dict[int, tuple] = {}
    for label in labels:
        palette = read_palette(label)
        if palette is None:
            return False
        for index in np.unique(palette[0]).tolist():
            colour = tuple(palette[1][index].tolist())
            if colours.setdefault(index, colour) != colour:
                echo(f"warning: {label}: the palette differs from earlier files: the classes are colours, not indices")
                return False
    if all(red == green == blue for red, green, blue in colours.values()):
        return False
    echo("the labels have a palette: its indices are the classes")
    return True


def ignored_key(ignore: str, colour: bool) -> float | None:
    """Key of the value of `--ignore`, NaN for a text that is no such value; None for an empty text."""
    if not ignore:
        return None
    numbers = numbers_in(ignore)
    if colour and len(numbers) == 3 and all(number in range(256) for number in numbers):
        return int.from_bytes(bytes(map(int, numbers)))
    return numbers[0] if len(numbers) == 1 and not colour else np.nan


def numbers_in(text: str) -> list[float]:
    """Comma-separated numbers; empty if the text is something else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return []


def value_of(key: float | None, colour: bool) -> Any:
    """Label value of a key: an [r, g, b] colour, or a grey value, 1 and not 1.0; None if there is none."""
    if key is None:
        return None
    if colour:
        return list(int(key).to_bytes(3))
    return int(key) if key == int(key) else key


def key_of(value: Any, colour: bool) -> float:
    """Key of a label value, the reverse of `value_of`; NaN if there is none."""
    if isinstance(value, list):
        return int.from_bytes(bytes(map(int, value))) if colour else np.nan
    return value * 0x010101 if colour and value in range(256) else np.nan if colour else value


def typed(value: Any) -> str:
    """Label value as it is typed after a flag."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def is_colour(image: np.ndarray) -> bool:
    """Whether an image (H, W, C) has three different channels."""
    return bool(image.shape[2] == 3 and (image != image[..., :1]).any())


def is_colour_label(label: object, pixels: np.ndarray) -> bool:
    """Whether a label image is in colour; refuses one that holds no values of classes."""
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        what = f"NaN or infinity in {(~np.isfinite(pixels)).sum()} pixels, which is no class"
        raise UserError(f"{label}: {what}: give these a value that no class has, such as 128, and add --ignore 128")
    colour = is_colour(pixels)
    if pixels.shape[2] not in (1, 3) or (colour and pixels.dtype != np.uint8):
        what = f"{pixels.shape[2]} channels of {pixels.dtype.name}"
        raise UserError(f"{label}: {what}: labels must be grey or 8-bit colours")
    return colour
