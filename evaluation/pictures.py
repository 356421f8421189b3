"""Result pictures of inputs, labels and outputs, and their file names."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np

Pictures = dict[str, np.ndarray]  # kind -> (H, W) or (H, W, 3) uint8
KINDS = ("input", "label", "output")
NOT_ANNOTATED = 128  # grey of pixels without annotation; the palette has no grey but black


def image_name(number: int) -> str:
    """Name of an image by its number in the test."""
    return f"{number:04d}"


def picture_name(image: str, kind: str) -> str:
    """File name of a picture.

    >>> picture_name(image_name(7), "output")
    '0007-output.png'
    """
    return f"{image}-{kind}.png"


def palette(num_class: int) -> np.ndarray:
    """Colours of the classes, (num_class, 3) uint8: black, seven that colour-blind readers can tell apart, then others.

    Source of the first eight: Wong 2011, doi 10.1038/nmeth.1618; the hues of the others advance by the golden ratio.

    >>> palette(2).tolist()
    [[0, 0, 0], [230, 159, 0]]
    """
    wong = ["000000", "e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7"]
    colours = [tuple(bytes.fromhex(colour)) for colour in wong]
    for k in range(len(wong), num_class):
        rgb = colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.5 + 0.5 * (k % 2), 0.95)
        colours.append(tuple(round(255 * value) for value in rgb))
    return np.array(colours[:num_class], np.uint8)


def label_picture(label: np.ndarray, num_class: int, known: np.ndarray | None = None) -> np.ndarray:
    """Picture of class indices (H, W): 0 and 255 for two classes, colours (H, W, 3) for more.

    Grey, where `known` (H, W) is false: those pixels are not annotated.

    >>> label_picture(np.array([[0, 1]]), 2).tolist()
    [[0, 255]]
    """
    if known is not None:
        picture = label_picture(np.where(known, label, 0), num_class)
        picture[~known] = NOT_ANNOTATED
        return picture
    return (label * 255).astype(np.uint8) if num_class == 2 else palette(num_class)[label]


def probability_picture(probability: np.ndarray) -> np.ndarray:
    """Picture (H, W) of the probability of class 1: 0 becomes 0 and 1 becomes 255."""
    return np.round(probability * 255).astype(np.uint8)


def wrong_pixels(inside: np.ndarray, probability: np.ndarray, known: np.ndarray | None = None) -> list[int]:
    """Number of wrong pixels for each of 256 thresholds: those above it are foreground.

    Parameters
    ----------
    inside : ndarray of bool
        (H, W) foreground of the label.
    probability : ndarray of uint8
        (H, W) picture of the probability of the foreground.
    known : ndarray of bool, optional
        (H, W) pixels that are annotated; default: all.

    Examples
    --------
    >>> wrong_pixels(np.array([[False, True]]), np.array([[1, 3]], np.uint8))[:5]
    [1, 0, 0, 1, 1]
    """
    counts = np.zeros((2, 256), np.int64)  # pixels outside, and inside, of each value
    for row in range(len(inside)):  # in little memory
        chosen = np.s_[:] if known is None else known[row]
        values = probability[row][chosen].astype(np.int64)
        counts += np.bincount(values + 256 * inside[row][chosen], minlength=512).reshape(2, 256)
    added = counts[0].sum() - np.cumsum(counts[0])
    return (np.cumsum(counts[1]) + added).tolist()


def input_picture(pixels: np.ndarray, value_range: list[float]) -> np.ndarray:
    """Picture of an input (H, W, C): its three channels (H, W, 3), else the first one (H, W).

    `value_range` are the values that become 0 and 255, the same for all images, so that no contrast is stretched.
    """
    low, high = value_range
    picture = np.clip((pixels - low) / ((high - low) or 1) * 255, 0, 255).round().astype(np.uint8)
    return picture if picture.shape[-1] == 3 else picture[..., 0]


def save_images(folder: Path, number: int, pictures: Pictures) -> None:
    """Write the pictures of one image as `0000-input.png`, `0000-label.png`, `0000-output.png`."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for kind, picture in pictures.items():
        Image.fromarray(picture).save(folder / picture_name(image_name(number), kind))
