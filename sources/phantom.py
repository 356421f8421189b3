"""Synthetic images with labels: a stack like electron microscopy of nervous tissue, and fluorescent nuclei."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.special import expit

MEMBRANE, CELL = 0, 255  # label values of the ISBI 2012 stack
BACKGROUND, NUCLEUS = 0, 255
Images = np.ndarray | list[np.ndarray]  # (N, H, W), or a list of (H, W) that differ in size


def em_stack(num: int, size: int = 256, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Serial sections of packed cells and their labels, (num, size, size) uint8 each; 0 is membrane and 255 cell.

    Cells are the regions around points that drift from section to section, so that neighbouring sections
    look alike, separated by membranes of varying darkness and width. Organelles, vesicles, texture, uneven
    illumination and noise are in the image only: a network must not mistake their dark rims for membranes.

    Examples
    --------
    >>> images, labels = em_stack(2, size=64)
    >>> images.shape, np.unique(labels).tolist()
    ((2, 64, 64), [0, 255])
    """
    from scipy.spatial import cKDTree  # here, since other images don't need it

    rng = np.random.default_rng(seed)
    spacing = 40.0  # [px] between the centres of cells
    num_cell = int(((size + 4 * spacing) / spacing) ** 2)
    centers = rng.uniform(-2 * spacing, size + 2 * spacing, (num_cell, 2))
    organelles = rng.uniform(0, size, (max(1, size * size // 1300), 2))
    warp = [_smooth(rng, size, 9) * 5 for _ in range(2)]  # bends the straight borders, in all sections alike
    y, x = np.mgrid[:size, :size].astype(np.float64)
    points = np.stack([y + warp[0], x + warp[1]], axis=-1)
    images, labels = [], []
    for _ in range(num):
        owner = cKDTree(centers).query(points)[1]
        border = np.zeros((size, size), bool)
        border[:-1] |= owner[:-1] != owner[1:]
        border[:, :-1] |= owner[:, :-1] != owner[:, 1:]
        depth = distance_transform_edt(~border)  # [px] from the nearest border
        images.append(_image_of_cells(rng, depth, organelles))
        labels.append(np.where(depth > 2.2, CELL, MEMBRANE).astype(np.uint8))
        centers += rng.normal(0, 1.5, centers.shape)
        organelles += rng.normal(0, 2.0, organelles.shape)
    return np.stack(images), np.stack(labels)


def _smooth(rng: np.random.Generator, size: int, sigma: float) -> np.ndarray:
    """Smooth random field of mean 0 and standard deviation 1, (size, size)."""
    field = gaussian_filter(rng.standard_normal((size, size)), sigma, mode="wrap")
    return (field - field.mean()) / max(field.std(), 1e-9)


def _image_of_cells(rng: np.random.Generator, depth: np.ndarray, organelles: np.ndarray) -> np.ndarray:
    """Grey values of one section, uint8."""
    size = len(depth)
    darkness = np.clip(0.42 + 0.13 * _smooth(rng, size, 10), 0.12, 0.6)
    width = np.clip(2.0 + 0.35 * _smooth(rng, size, 8), 1.2, 3.0)
    image = 0.64 + sum(0.035 * _smooth(rng, size, sigma) for sigma in (1.5, 3, 25))
    image -= darkness * np.exp(-((depth / width) ** 2))
    for middle in organelles:
        _add_organelle(rng, image, middle)
    image += 0.05 * _smooth(rng, size, size / 3)  # uneven light
    image = gaussian_filter(image, 0.7) + rng.normal(0, 0.045, image.shape)
    return np.clip(image * 255, 0, 255).round().astype(np.uint8)


def _add_organelle(rng: np.random.Generator, image: np.ndarray, middle: np.ndarray) -> None:
    """Draw a mitochondrion (dark, with a rim and cristae) or a vesicle (bright, with a rim) into the image."""
    top, left = np.maximum(middle.astype(int) - 20, 0)
    image = image[top : top + 40, left : left + 40]  # a view, larger than any organelle
    y, x = np.mgrid[top : top + image.shape[0], left : left + image.shape[1]] - middle[:, None, None]
    angle = rng.uniform(0, np.pi)
    along, across = y * np.sin(angle) + x * np.cos(angle), y * np.cos(angle) - x * np.sin(angle)
    mitochondrion = rng.random() < 0.2
    long = rng.uniform(6, 11) if mitochondrion else rng.uniform(2.0, 3.2)
    short = rng.uniform(4, 6) if mitochondrion else long
    radius = np.hypot(along / long, across / short)  # 1 on the rim
    inside = expit((1 - radius) * 8)
    rim = np.exp(-(((radius - 1) * short / 1.1) ** 2))
    cristae = 0.06 * np.sin(along * 1.6) if mitochondrion else 0.0
    image += inside * (cristae - 0.17 if mitochondrion else 0.06) - 0.2 * rim


def nuclei_images(
    num: int, size: int = 256, seed: int = 0, fraction: float = 0.15
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Bright nuclei on a dark, noisy background (H, W) uint16, and labels (H, W) uint8, 0 and 255; `size` is the mean.

    Nuclei differ in size, shape and brightness and may touch; they cover about `fraction` of the pixels. The
    illumination is uneven, blurred haze from other depths is background, and photons and camera add noise.

    Examples
    --------
    >>> images, labels = nuclei_images(2, size=64)
    >>> images[0].dtype, images[0].shape == labels[0].shape, images[0].shape == images[1].shape
    (dtype('uint16'), True, False)
    """
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for _ in range(num):
        height, width = rng.integers(int(0.7 * size), int(1.3 * size) + 1, 2)
        label, light = np.zeros((height, width), bool), np.zeros((height, width))
        while label.mean() < fraction:
            _add_nucleus(rng, label, light)
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j] - rng.uniform(0, 1, (2, 1, 1))
        haze = gaussian_filter(np.roll(light, rng.integers(20, 100, 2), (0, 1)), 12)
        uneven = 1 - 0.35 * np.hypot(y, x)
        photons = 120 * (gaussian_filter(light, 1.2) + 0.4 * haze + 0.08) * uneven
        counts = 20 * rng.poisson(photons) + 300 + rng.normal(0, 40, light.shape)
        images.append(np.clip(counts, 0, 65535).round().astype(np.uint16))
        labels.append(np.where(label, NUCLEUS, BACKGROUND).astype(np.uint8))
    return images, labels


def _add_nucleus(rng: np.random.Generator, label: np.ndarray, light: np.ndarray) -> None:
    """Draw one nucleus, an ellipse with a wavy rim and mottled interior, into the mask and the light."""
    y, x = np.indices(label.shape) - rng.uniform(0, label.shape)[:, None, None]
    turn = rng.uniform(0, np.pi)
    along, across = y * np.sin(turn) + x * np.cos(turn), y * np.cos(turn) - x * np.sin(turn)
    long = rng.uniform(6, 13)  # [px]
    short = long * rng.uniform(0.6, 1.0)
    angle = np.arctan2(across, along)
    radius = np.hypot(along / long, across / short) * (1 + 0.08 * np.cos(3 * angle + rng.uniform(0, 2 * np.pi)))
    mottled = 1 + 0.25 * np.cos(along * rng.uniform(0.5, 1.0)) * np.cos(across * rng.uniform(0.5, 1.0))
    label |= radius < 1
    np.maximum(light, (radius < 1) * mottled * rng.uniform(0.35, 1.0), out=light)


PHANTOMS: dict[str, Callable[[int, int, int], tuple[Images, Images]]] = {  # of number, size and seed
    "em": em_stack,
    "nuclei": nuclei_images,
    "rare": partial(nuclei_images, fraction=0.02),
}
