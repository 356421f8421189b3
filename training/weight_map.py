"""The weight map of the U-Net paper: border distances, their cache files and the weights of pixels."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from typing import IO, TYPE_CHECKING

import numpy as np
from scipy import ndimage

from description import DataInfo
from files import atomic_write, flush_folders
from progress import tracked
from samples import IGNORE, SampleFile, check_values
from utils import UserError

if TYPE_CHECKING:  # not at run time: databases are made without torch
    from torch import Tensor

FAR = 50  # [px] largest d1 + d2 that matters: exp(-50^2 / (2 sigma^2)) is 4e-6 for the largest --sigma, 10
RADIUS = FAR // 2  # [px] around the pixels nearest to an object, the region searched for their second nearest object
HASH = 16  # [bytes] of the hash behind the distances in their file
BAND = 2**20  # [px] pixels whose distances are computed at a time


def loss_of(choice: str, num_class: int) -> str:
    """Loss for a value of `--loss`; `auto` uses the weight map for two classes."""
    if choice != "auto":
        return choice
    return "wbce" if num_class == 2 else "bce"


def cache_border_distances(files: list[SampleFile], info: DataInfo) -> None:
    """Compute the border distance of each sample once, and cache it in a file next to the sample."""
    folders = set()
    for file in tracked(files, "weight map"):
        _rename_earlier(file)
        image, label = file.open(info.class_values)
        if label is None:
            return  # the dataset reports it
        if _read_hash(file) == _hash(label):
            continue
        check_values(file.input, image, label, info.num_class, partial=info.is_partial)
        distance = border_distance(label)
        try:
            with atomic_write(file.distance, flush_parent=False) as target:
                _write(target, label, distance)
        except UserError as error:
            if _read_hash(file) and np.array_equal(file.open_distance(), distance):
                continue  # of an earlier version, in a folder that is not writable
            raise UserError(f"{error}; or train with --loss bce, which needs no file there") from error
        folders.add(file.distance.parent)
    flush_folders(*folders)


def save_distance(file: SampleFile, label: np.ndarray) -> None:
    """Compute the border distance of a new sample, given its class indices (H, W), and write it next to the sample."""
    with file.distance.open("wb") as target:
        _write(target, label, border_distance(label))


def _write(target: IO[bytes], label: np.ndarray, distance: np.ndarray) -> None:
    """Write the border distance (H, W) as `.npy`, and behind the array the hash of the label that it is of."""
    np.save(target, distance)
    target.write(_hash(label))


def _hash(label: np.ndarray) -> bytes:
    """Hash of class indices (H, W)."""
    return hashlib.blake2b(np.ascontiguousarray(label, np.uint8).data, digest_size=HASH).digest()


def _read_hash(file: SampleFile) -> bytes:
    """Hash of the label that the distances of a sample are of; other bytes in a file of an earlier version, or none."""
    if not file.distance.is_file():  # nothing to wait for, as `map_npy` does
        return b""
    try:
        file.open_distance()
        with file.distance.open("rb") as cache:
            cache.seek(-HASH, os.SEEK_END)
            return cache.read()
    except (UserError, OSError):  # there is none, or it is of another sample
        return b""


def _rename_earlier(file: SampleFile) -> None:
    """Rename the distances of an earlier version, which pytorch-UNET would read as an input; other files stay."""
    earlier = SampleFile(file.input)  # without the label, its distances have the earlier name
    if file.label is None or not earlier.distance.is_file():
        return
    with suppress(UserError, OSError):  # not of this program, or not writable
        earlier.open_distance()
        earlier.distance.replace(file.distance)


def border_distance(label: np.ndarray) -> np.ndarray:
    """Distance (H, W) [px] to the nearest object plus that to the second nearest, d1 + d2, at most `FAR`.

    The objects are the 4-connected components of each class but 0; the distance of `IGNORE` pixels has no meaning.
    Source: Ronneberger et al. 2015, arXiv 1505.04597, equation 2.

    >>> border_distance(np.array([[1, 0, 0, 1, 1]]))[0, 1:3]  # 1 px from one and 2 px from the other
    array([3., 3.], dtype=float16)
    """
    objects, num = np.zeros(label.shape, np.int32), 0
    for class_index in np.flatnonzero(np.bincount(label.ravel())[1:IGNORE]) + 1:
        of_class, num_of_class = ndimage.label(label == class_index, output=np.int32)
        of_class[of_class > 0] += num
        objects += of_class
        num += num_of_class
    distance = np.empty(label.shape, np.float16)
    num_row = max(2 * FAR, BAND // label.shape[1])
    for top in range(0, label.shape[0], num_row):  # in bands, since 50 bytes per pixel are needed
        first = max(top - FAR, 0)
        band = _band_distance(objects[first : top + num_row + FAR])
        distance[top : top + num_row] = band[top - first :][:num_row]
    return distance


def _band_distance(objects: np.ndarray) -> np.ndarray:
    """d1 + d2 [px] between numbered objects, up to `FAR`."""
    is_present = np.zeros(objects.max() + 1, bool)
    is_present[objects] = True
    is_present[0] = False
    objects = np.cumsum(is_present, dtype=np.int32)[objects]  # renumbered from 1 without gaps
    if objects.max() < 2:
        return np.full(objects.shape, FAR)
    first, index = ndimage.distance_transform_edt(objects == 0, return_indices=True)
    nearest = objects[tuple(index)]
    second = np.full(objects.shape, np.inf)
    for number, box in enumerate(ndimage.find_objects(nearest), 1):
        # where d1 + d2 <= FAR, the second object is at most FAR / 2 from some pixel nearest to the first
        box = tuple(slice(max(side.start - RADIUS, 0), side.stop + RADIUS) for side in box)
        alone = (objects[box] == 0) | (objects[box] == number)
        if not alone.all():
            to_others = ndimage.distance_transform_edt(alone)
            second[box] = np.where(nearest[box] == number, to_others, second[box])
    return np.minimum(first + second, FAR)


def pixel_weight(label: Tensor, distance: Tensor, class_share: list[float] | None, w0: float, sigma: float) -> Tensor:
    """Weight (N, H, W) of each pixel in the loss: class balance, and more where two objects nearly touch.

    w = w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2)), the second term on background only; Ronneberger et al. 2015, eq. 2.
    w_c makes the mean weight over all training pixels 1, given the share of each class; without shares w_c = 1.

    >>> import torch
    >>> pixel_weight(torch.tensor([[[0, 0, 1]]]), torch.tensor([[[0.0, 50.0, 0.0]]]), [0.25, 0.75], 10.0, 5.0)
    tensor([[[12.0000,  2.0000,  0.6667]]])
    """
    import torch

    weight = 1 + torch.where(label == 0, w0 * torch.exp(-(distance**2) / (2 * sigma**2)), 0)
    if class_share is not None:
        balance = 1 / (len(class_share) * torch.tensor(class_share).clamp_min(1e-3))
        weight = weight - 1 + balance.to(label.device, non_blocking=True)[label]
    return weight
