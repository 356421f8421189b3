"""Result pictures of inputs, labels and outputs, and their file names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from description import MAX_CLASS
from images.drawing import palette

Colour = tuple[int, int, int]
Pictures = dict[str, np.ndarray]  # kind -> (H, W) or (H, W, 3) uint8
KINDS = ("input", "label", "output")
PICTURES = rf"\d+-({'|'.join(KINDS)})\.png"  # names of pictures, see `picture_name`
NOT_ANNOTATED = 128  # grey of pixels without annotation; the palette has no grey but black
# what only the label has (missed), only the output has (added), or both with other classes (confused), and the outlines
# of label and output: colours that colour-blind readers can tell apart, of several classes also from those of `palette`
COLOURS = {"label": (86, 180, 233), "output": (230, 159, 0)}  # sky blue and orange
COLOURS_OF_SEVERAL = {
    "label": (255, 255, 255),
    "output": (255, 42, 212),
    "confused": (182, 255, 0),
}  # white, pink, lime
DIMMED = 3  # part of its brightness that an input keeps below a map of errors


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
    return (label * 255).astype(np.uint8) if num_class == 2 else palette(num_class)[label]


def probability_picture(probability: np.ndarray) -> np.ndarray:
    """Picture (H, W) of the probability of class 1: 0 becomes 0 and 1 becomes 255."""
    return np.round(probability * 255).astype(np.uint8)


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


def veiled(picture: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
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
    """Map (H, W, 3) of the wrong pixels, over the dimmed input.

    Parameters
    ----------
    picture : ndarray of uint8
        (H, W) or (H, W, 3) picture of the input.
    label, output : ndarray of uint8
        (H, W) class indices.
    background : int
        Class of the background. Of the other classes pixels are missed or added, or have one of them for another.
    valid : ndarray of bool, optional
        (H, W) pixels that are annotated, the others are veiled; default: all.
    colours : dict
        `COLOURS`, or `COLOURS_OF_SEVERAL` for more than two classes.

    Examples
    --------
    >>> error_picture(np.array([[9, 9]], np.uint8), np.array([[0, 1]]), np.array([[0, 0]])).tolist()
    [[[3, 3, 3], [86, 180, 233]]]
    """
    shown = veiled(picture, None) // DIMMED
    inside, found = label != background, output != background
    shown[inside & ~found] = colours["label"]
    shown[found & ~inside] = colours["output"]
    if "confused" in colours:
        shown[inside & found & (label != output)] = colours["confused"]
    return shown if valid is None else np.where(valid[..., None], shown, veiled(picture, valid))


def wrong_pixels(inside: np.ndarray, probability: np.ndarray, valid: np.ndarray | None = None) -> list[int]:
    """Number of wrong pixels for each of 256 thresholds: those above it are foreground.

    Parameters
    ----------
    inside : ndarray of bool
        (H, W) foreground of the label.
    probability : ndarray of uint8
        (H, W) picture of the probability of the foreground.
    valid : ndarray of bool, optional
        (H, W) pixels that are annotated; default: all.

    Examples
    --------
    >>> wrong_pixels(np.array([[False, True]]), np.array([[1, 3]], np.uint8))[:5]
    [1, 0, 0, 1, 1]
    """
    counts = np.zeros((2, 256), np.int64)  # pixels outside, and inside, of each value
    for row in range(len(inside)):  # in little memory
        chosen = np.s_[:] if valid is None else valid[row]
        values = probability[row][chosen].astype(np.int64)
        counts += np.bincount(values + 256 * inside[row][chosen], minlength=512).reshape(2, 256)
    added = counts[0].sum() - np.cumsum(counts[0])
    return (np.cumsum(counts[1]) + added).tolist()


def save_images(folder: Path, number: int, pictures: Pictures) -> None:
    """Write the pictures of one image as `0000-input.png`, `0000-label.png`, `0000-output.png`."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for kind, picture in pictures.items():
        Image.fromarray(picture).save(folder / picture_name(image_name(number), kind))
