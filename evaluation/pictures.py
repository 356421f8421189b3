"""Result pictures of inputs, labels and outputs, and their file names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from description import MAX_CLASS
from images.drawing import palette

Colour = tuple[int, int, int]
Pictures = dict[str, np.ndarray]  # kind -> (H, W) or (H, W, 3) uint8
KINDS = ("input", "label", "output")
OBJECTS = "objects"  # kind of the map of objects, in the colours of `FATES`; only of images that have any
PICTURES = rf"\d+-({'|'.join([*KINDS, OBJECTS])})\.png"  # names of pictures, see `picture_name`
NOT_ANNOTATED = 128  # grey of pixels without annotation; the palette has no grey but black
# what only the label has (missed), only the output has (added), or both with other classes (confused), and the outlines
# of label and output: colours that colour-blind readers can tell apart, of several classes also from those of `palette`
COLOURS = {"label": (86, 180, 233), "output": (230, 159, 0)}  # sky blue and orange
COLOURS_OF_SEVERAL = {"label": (255, 255, 255), "output": (255, 42, 212), "confused": (182, 255, 0)}
# what became of objects, see fates.py, from what is drawn below to what is drawn above, in other colours of `palette`
FATES: dict[str, Colour] = {
    "added": (213, 94, 0),
    "missed": (0, 114, 178),
    "split": (240, 228, 66),
    "merged": (204, 121, 167),
    "matched": (0, 158, 115),
}
DIMMED = 3  # part of its brightness that an input keeps below a map of errors
BAND = 512  # [px] rows of an image that are drawn or counted at a time


def row_bands(height: int) -> list[slice]:
    """Rows of an image, some at a time, for what needs much memory for each pixel."""
    return [slice(top, top + BAND) for top in range(0, height, BAND)]


def image_name(number: int) -> str:
    """Name of an image by its number in the test."""
    return f"{number:04d}"


def picture_name(image: str, kind: str) -> str:
    """File name of a picture.

    >>> picture_name(image_name(7), "output")
    '0007-output.png'
    """
    return f"{image}-{kind}.png"


def label_picture(label: np.ndarray, num_class: int, valid: np.ndarray | None = None) -> np.ndarray:
    """Picture of class indices (H, W): 0 and 255 for two classes, colours (H, W, 3) for more.

    Grey, where `valid` (H, W) is false: those pixels are not annotated.

    >>> label_picture(np.array([[0, 1]]), 2).tolist()
    [[0, 255]]
    """
    if valid is not None:
        picture = label_picture(np.where(valid, label, 0), num_class)
        picture[~valid] = NOT_ANNOTATED
        return picture
    return label.astype(np.uint8) * np.uint8(255) if num_class == 2 else palette(num_class)[label]


def probability_picture(probability: np.ndarray) -> np.ndarray:
    """Picture (H, W) of the probability of class 1: 0 becomes 0 and 1 becomes 255."""
    values = probability * 255
    return np.round(values, out=values).astype(np.uint8)


def classes_of(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class indices (H, W) of a picture of a label or an output, and which of its pixels show a class.

    Reverses `label_picture`; an output (H, W) of two classes is class 1 where its probability is above 0.5.

    >>> classes, valid = classes_of(label_picture(np.array([[0, 1, 2]]), 3))
    >>> classes.tolist(), valid.tolist()
    ([[0, 1, 2]], [[True, True, True]])
    """
    if picture.ndim == 2:
        return (picture >= NOT_ANNOTATED).astype(np.uint8), picture != NOT_ANNOTATED
    classes, valid = np.zeros(picture.shape[:2], np.uint8), np.zeros(picture.shape[:2], bool)
    for k, colour in enumerate(palette(MAX_CLASS)):
        here = (picture == colour).all(-1)
        classes[here], valid = k, valid | here
    return classes, valid


def greyed_out(picture: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """Picture (H, W, 3) of a picture (H, W) or (H, W, 3), blended with grey where `valid` (H, W) is false."""
    rgb = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, -1)
    return rgb if valid is None else np.where(valid[..., None], rgb, rgb // 4 + NOT_ANNOTATED * 3 // 4)


def error_picture(
    picture: np.ndarray,
    label: np.ndarray,
    output: np.ndarray,
    background: int = 0,
    valid: np.ndarray | None = None,
    colours: dict[str, Colour] = COLOURS,
) -> np.ndarray:
    """Map (H, W, 3) of the wrong pixels of an output, over the dimmed picture of the input; both hold class indices.

    Pixels that are not the background are missed or added or, with the colours `COLOURS_OF_SEVERAL`, have another
    class. Those where `valid` is false are not annotated: grey.

    >>> error_picture(np.array([[9, 9]], np.uint8), np.array([[0, 1]]), np.array([[0, 0]])).tolist()
    [[[3, 3, 3], [86, 180, 233]]]
    """
    errors = greyed_out(picture, None) // DIMMED
    in_label, in_output = label != background, output != background
    errors[in_label & ~in_output] = colours["label"]
    errors[in_output & ~in_label] = colours["output"]
    if "confused" in colours:
        errors[in_label & in_output & (label != output)] = colours["confused"]
    return errors if valid is None else np.where(valid[..., None], errors, greyed_out(picture, valid))


def wrong_pixels(inside: np.ndarray, probability: np.ndarray, valid: np.ndarray | None = None) -> list[int]:
    """Number of wrong pixels for each of 256 thresholds: those of a picture (H, W) above it are foreground.

    >>> wrong_pixels(np.array([[False, True]]), np.array([[1, 3]], np.uint8))[:5]
    [1, 0, 0, 1, 1]
    """
    counts = np.zeros((2, 256), np.int64)  # pixels outside, and inside the foreground of the label, of each value
    for rows in row_bands(len(inside)):
        annotated = np.s_[:] if valid is None else valid[rows]
        values = probability[rows][annotated].astype(np.int64) + 256 * inside[rows][annotated]
        counts += np.bincount(values.ravel(), minlength=512).reshape(2, 256)
    missed, added = np.cumsum(counts[1]), counts[0].sum() - np.cumsum(counts[0])
    return (missed + added).tolist()


def save_images(folder: Path, number: int, pictures: Pictures) -> None:
    """Write the pictures of one image as `0000-input.png`, `0000-label.png`, `0000-output.png`, `0000-objects.png`."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for kind, picture in pictures.items():
        image, options = Image.fromarray(picture), dict[str, Any]()
        if kind == OBJECTS:
            image.putpalette(bytes(np.ravel([(0, 0, 0), *FATES.values()]).tolist()))
            options = {"transparency": 0, "bits": 4}
        image.save(folder / picture_name(image_name(number), kind), **options)
