"""Result pictures of inputs, labels and outputs, and their file names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from images.drawing import palette

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


def save_images(folder: Path, number: int, pictures: Pictures) -> None:
    """Write the pictures of one image as `0000-input.png`, `0000-label.png`, `0000-output.png`."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for kind, picture in pictures.items():
        Image.fromarray(picture).save(folder / picture_name(image_name(number), kind))
