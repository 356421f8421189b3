"""The weight map of the U-Net paper: border distances, their cache files and the weights of pixels."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from description import DataInfo
from files import atomic_write
from samples import IGNORE, SampleFile, check_values
from utils import UserError

if TYPE_CHECKING:  # not at run time: databases are made without torch
    from torch import Tensor

FAR = 50  # [px] largest d1 + d2 that matters: exp(-50^2 / (2 sigma^2)) is 4e-6 for the largest --sigma, 10
REACH = FAR // 2  # [px] around the pixels nearest to an object, the region searched for their second nearest object
HASH = 16  # [bytes] of the hashes behind the distances in their file
BAND = 2**20  # [px] pixels whose distances are computed at a time


def loss_of(choice: str, num_class: int) -> str:
    """Loss for a value of `--loss`; `auto` uses the weight map for two classes."""
    if choice != "auto":
        return choice
    return "wbce" if num_class == 2 else "bce"


def cache_border_distances(files: list[SampleFile], info: DataInfo) -> None:
    """Compute the border distance of each sample once, and cache it in a file next to the sample.

    Raises
    ------
    UserError
        A label does not hold class indices, or the folder is not writable.
    """
    for file in tqdm(files, desc="weight map", disable=None, leave=False):
        _rename_earlier(file)
        made_of = _read_origin(file)
        if made_of and made_of.classes == _hash_classes(file, info.class_values) and _is_of_time(file):
            continue
        image, label = file.open(info.class_values)
        if label is None:
            return  # the dataset reports it
        check_values(file.input, image, label, info.num_class, partial=info.is_partial)
        if made_of and made_of == _origin(file, label, info.class_values):  # of a database that was copied
            _set_time(file)
            continue
        distance = border_distance(label)
        try:
            with atomic_write(file.distance) as target:
                _write_distance(target, file, label, distance, info.class_values)
        except UserError as error:
            if made_of and np.array_equal(file.open_distance(), distance):
                continue  # of an earlier version, in a folder that is not writable
            raise UserError(f"{error}; or train with --loss bce, which needs no file there") from error
        _set_time(file)


def save_distance(file: SampleFile, label: np.ndarray, class_values: list) -> None:
    """Compute the border distance of a sample that is on the disk, and write it beside it.

    Parameters
    ----------
    file : SampleFile
        The sample.
    label : ndarray
        (H, W) its class indices.
    class_values : list
        As in `DataInfo`.
    """
    with file.distance.open("wb") as target:
        _write_distance(target, file, label, border_distance(label), class_values)
    _set_time(file)


class _Origin(NamedTuple):
    """What the border distance in a file was computed from, as hashes; in the file of an earlier version anything."""

    classes: bytes  # the values that the classes have in a label file
    label: bytes  # the class indices, which tell that a copied label is the same


def _origin(file: SampleFile, label: np.ndarray, class_values: list) -> _Origin:
    """What the border distance of a sample is computed from."""
    return _Origin(_hash_classes(file, class_values), _hash(np.ascontiguousarray(label, np.uint8).data))


def _hash_classes(file: SampleFile, class_values: list) -> bytes:
    """Hash of the values of the classes; samples that hold class indices need none."""
    return _hash(repr(class_values if file.label else None).encode())


def _hash(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=HASH).digest()


def _write_distance(
    target: IO[bytes], file: SampleFile, label: np.ndarray, distance: np.ndarray, class_values: list
) -> None:
    """Write the border distance (H, W) of a sample as `.npy`, and behind the array what it was computed from."""
    np.save(target, distance)
    target.write(b"".join(_origin(file, label, class_values)))


def _read_origin(file: SampleFile) -> _Origin | None:
    """What the distances in the file of a sample were computed from; None without a valid file."""
    if not file.distance.is_file():
        return None
    try:
        file.open_distance()
        with file.distance.open("rb") as cache:
            cache.seek(-2 * HASH, os.SEEK_END)
            return _Origin(cache.read(HASH), cache.read(HASH))
    except (UserError, OSError):
        return None


def _time_of(file: SampleFile) -> int:
    """Time [ns] of the distances of a label: between its time stamp and that of the last change of its entry.

    The second one tells a file that took the place of the label with an older or with the same time stamp. Both stand
    in the time of the distance file, and not in the file, so that the same images give the same database.
    """
    status = (file.label or file.input).stat()
    return (status.st_mtime_ns + status.st_ctime_ns) // 2 // 1000 * 1000  # some file systems keep microseconds


def _is_of_time(file: SampleFile) -> bool:
    """Whether the label is not changed since its distances were computed."""
    return file.distance.stat().st_mtime_ns == _time_of(file)


def _set_time(file: SampleFile) -> None:
    """Note in the time of the distance file which label it is of; where that is not possible, labels are compared."""
    with suppress(OSError):
        os.utime(file.distance, ns=(_time_of(file), _time_of(file)))


def _rename_earlier(file: SampleFile) -> None:
    """Give the distances of an earlier version the name that pytorch-UNET does not read; other files stay."""
    earlier = file.earlier_distance
    if earlier == file.distance or not earlier.is_file():
        return
    try:
        SampleFile(file.input).open_distance()
    except UserError:
        return  # of somebody else
    with suppress(OSError):  # not writable
        earlier.replace(file.distance)


def border_distance(label: np.ndarray) -> np.ndarray:
    """Distance to the nearest object plus distance to the second nearest, d1 + d2 of the paper's weight map.

    Parameters
    ----------
    label : ndarray of int
        (H, W) class indices. The objects are the 4-connected components of each class but 0. Pixels of `IGNORE` belong
        to no object; their own distance is finite and without meaning.

    Returns
    -------
    ndarray of float16
        (H, W) [px]; exact up to `FAR`, the largest value.
        Source: Ronneberger et al. 2015, arXiv 1505.04597, equation 2.

    Examples
    --------
    >>> border_distance(np.array([[1, 0, 0, 1, 1]]))[0, 1:3]  # 1 px from one and 2 px from the other
    array([3., 3.], dtype=float16)
    """
    objects = _number_objects(label)
    distance = np.empty(label.shape, np.float16)
    num_row = max(2 * FAR, BAND // label.shape[1])
    for top in range(0, label.shape[0], num_row):  # in bands, since 50 bytes per pixel are needed
        first = max(top - FAR, 0)
        band = _band_distance(objects[first : top + num_row + FAR])
        distance[top : top + num_row] = band[top - first :][:num_row]
    return distance


def _band_distance(objects: np.ndarray) -> np.ndarray:
    """d1 + d2 [px] between numbered objects, up to `FAR`."""
    is_present = np.zeros(objects.max() + 1, np.int32)
    is_present[np.ravel(objects)] = 1
    is_present[0] = 0
    objects = np.cumsum(is_present, dtype=np.int32)[objects] * (objects > 0)  # renumbered from 1 without gaps
    if objects.max() < 2:
        return np.full(objects.shape, FAR)
    first, index = ndimage.distance_transform_edt(objects == 0, return_indices=True)
    nearest = objects[tuple(index)]
    second = np.full(objects.shape, np.inf)
    for number, box in enumerate(ndimage.find_objects(nearest), 1):
        # where d1 + d2 <= FAR, the second object is at most FAR / 2 from some pixel nearest to the first
        box = tuple(slice(max(side.start - REACH, 0), side.stop + REACH) for side in box)
        alone = (objects[box] == 0) | (objects[box] == number)
        if not alone.all():
            to_others = ndimage.distance_transform_edt(alone)
            second[box] = np.where(nearest[box] == number, to_others, second[box])
    return np.minimum(first + second, FAR)


def _number_objects(label: np.ndarray) -> np.ndarray:
    """4-connected components of each class but 0, numbered from 1; 0 also where a label is not annotated."""
    label = np.where(label == IGNORE, 0, label)
    numbers, total = np.zeros(label.shape, np.int32), 0
    for k in range(1, int(label.max(initial=0)) + 1):
        components, count = ndimage.label(label == k)
        np.add(components, total, out=components, where=components > 0)
        numbers += components
        total += count
    return numbers


def pixel_weight(label: Tensor, distance: Tensor, class_share: list[float] | None, w0: float, sigma: float) -> Tensor:
    """Weight of each pixel in the loss: class balance, and additional weight where two objects nearly touch.

    w = w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2)), the second term on background only.

    Parameters
    ----------
    label : Tensor
        (N, H, W) class indices.
    distance : Tensor
        (N, H, W) d1 + d2 [px], see `border_distance`.
    class_share : list of float or None
        Fraction of each class in the training pixels; w_c is such that the mean weight over all pixels is 1. None:
        w_c = 1, which does not shift probabilities away from borders.
    w0, sigma : float
        Height and width [px] of the additional weight at borders. Source: Ronneberger et al. 2015, equation 2.

    Examples
    --------
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
