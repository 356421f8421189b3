"""Pictures of images, labels and outputs, and the names of their files."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np

Pictures = dict[str, np.ndarray]  # kind -> (H, W) or (H, W, 3) uint8
KINDS = ("input", "label", "output")


def image_name(number: int) -> str:
    """Name of an image of a test, from 0000."""
    return f"{number:04d}"


def picture_name(image: str, kind: str) -> str:
    """File of a picture of an image.

    Examples
    --------
    >>> picture_name(image_name(7), "output")
    '0007-output.png'
    """
    return f"{image}-{kind}.png"


def palette(num_class: int) -> np.ndarray:
    """Fixed colours of the classes, (num_class, 3) uint8; class 0 is black, the next seven are told apart by all.

    Source of the first eight: Wong 2011, doi 10.1038/nmeth.1618; further hues go by the golden ratio.

    Examples
    --------
    >>> palette(2).tolist()
    [[0, 0, 0], [230, 159, 0]]
    """
    wong = ["000000", "e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7"]
    colours = [tuple(bytes.fromhex(colour)) for colour in wong]
    for k in range(len(wong), num_class):
        rgb = colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.5 + 0.5 * (k % 2), 0.95)
        colours.append(tuple(round(255 * value) for value in rgb))
    return np.array(colours[:num_class], np.uint8)


def label_picture(label: np.ndarray, num_class: int) -> np.ndarray:
    """Picture of class indices (H, W): 0 and 255 for two classes, colours (H, W, 3) for more.

    Examples
    --------
    >>> label_picture(np.array([[0, 1]]), 2).tolist()
    [[0, 255]]
    """
    return (label * 255).astype(np.uint8) if num_class == 2 else palette(num_class)[label]


def probability_picture(probability: np.ndarray) -> np.ndarray:
    """Picture of the probability of class 1, (H, W): 0 is 0 and 1 is 255."""
    return np.round(probability * 255).astype(np.uint8)


def input_picture(pixels: np.ndarray, value_range: list[float]) -> np.ndarray:
    """Picture of grey values: (H, W, C) to (H, W), or to (H, W, 3) for three channels.

    Parameters
    ----------
    pixels : ndarray
        Grey values; of two or more than three channels the first is shown.
    value_range : list of float
        Grey values that become 0 and 255; the same for all images, so that no contrast is stretched.
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
