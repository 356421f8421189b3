"""The dataset: patches that are streamed from the samples, for the training.

A sample is an `.npy` file with an image and its label (samples.py). `PatchSampler` (training/sampler.py) chooses
windows of it, and `PatchDataset` cuts and normalises them. Then a whole batch of them is flipped, turned, deformed
elastically and changed in contrast, on the device that trains (training/augment.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from description import DataInfo, check_samples
from images.rows import Rows
from images.statistics import image_statistics, is_wide
from progress import tracked
from samples import IGNORE, SampleFile, check_values, to_indices
from utils import UserError

Array = TypeVar("Array", np.ndarray, Tensor)
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


class Patch(TypedDict, total=False):
    """Window of a sample."""

    input: Tensor  # (C, H, W) float32, normalised
    label: Tensor  # (H, W) uint8 class indices, `IGNORE` where not annotated; absent without ground truth
    distance: Tensor  # (H, W) float32 border distance [px], if wanted
    index: Any  # int, number of the sample; in a batch a tensor, as the next one
    crop: Any  # int, number among the crops of the sample in the epoch
    mean: Tensor  # (C,) float32 that the input was normalised by
    std: Tensor  # (C,)


class Batch(Patch, total=False):
    """Patches for one step, with a first axis of N patches; once augmented, the label is int64, or 0 for `IGNORE`."""

    weight: Tensor  # (N, H, W) float32 weight of each pixel in the loss; 0 where not annotated
    unchanged: Tensor  # (N, C, H, W) the input before its intensities are changed, for a teacher
    loss_scale: float  # factor of the loss, with which the mean over the processes is that over the images
    seed: int  # of the dropout


@dataclass(frozen=True)
class Window:
    """Part of a sample; beyond the image, pixels are reflected."""

    index: int  # of the sample
    top: int  # [px], as the following
    left: int
    height: int
    width: int
    crop: int = 0  # number among the crops of the sample in the epoch

    def is_inside(self, height: int, width: int) -> bool:
        """Whether it lies completely inside an image of this size."""
        return min(self.top, self.left) >= 0 and self.top + self.height <= height and self.left + self.width <= width


class PatchDataset(Dataset[Patch]):
    """Normalised windows of samples, read from `.npy` files.

    Samples are cached in the memory of a device, and their pixels are checked now; without one, each window is read
    from the disk, and checked then. A cached sample has a margin [px] of reflected pixels, unless that would double its
    memory, so that cutting a window is a plain slice.
    """

    def __init__(
        self,
        files: list[SampleFile],
        info: DataInfo,
        *,
        labelled: bool,  # refuse samples without a label
        memory: torch.device | None = None,
        distances: bool = False,  # also read the border distances
        margin: int = 0,  # how far windows extend beyond the image [px]
        unlabelled: Sequence[SampleFile] = (),  # further samples, whose label is `IGNORE` everywhere
    ) -> None:
        self.files, self.info, self.distances = [*files, *unlabelled], info, distances
        self.memory, self.margin, self.num_unlabelled = memory, margin, len(unlabelled)
        self.shapes = check_samples(files, info, labelled=labelled) + check_samples(unlabelled, info, labelled=False)
        self._cached: list[CachedSample] = []
        self._statistics: dict[int, tuple[Tensor, Tensor]] = {}
        if memory is not None:
            self._cached = [self._cache(index) for index in tracked(range(len(self.files)), "read")]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | Window) -> Patch:
        """One window, or the whole image if the key is a number."""
        window = key if isinstance(key, Window) else Window(key, 0, 0, *self.shapes[key])
        if self._cached:
            planes = self._cached[window.index].cut(window)
        else:
            planes = {name: as_tensor(array) for name, array in self._read(window).items()}
        mean, std = self.statistics(window.index)
        pixels = normalise(planes["input"], mean, std).movedim(-1, 0).contiguous()  # (H, W, C) -> (C, H, W)
        patch: Patch = {"input": pixels, "index": window.index, "crop": window.crop}
        patch |= {"mean": mean.float(), "std": std.float()}  # not each device has float64
        if "label" in planes:
            patch["label"] = planes["label"].to(torch.uint8)
        if "distance" in planes:
            patch["distance"] = planes["distance"].to(torch.float32)
        return patch

    def statistics(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation that a sample is normalised by, (C,) each."""
        if index not in self._statistics:
            file = self.files[index]
            try:
                mean, std = statistics_of(file.open()[0], self.info)
            except UserError as error:
                raise UserError(f"{file.input}: {error}") from error
            self._statistics[index] = torch.from_numpy(mean).to(self.memory), torch.from_numpy(std).to(self.memory)
        return self._statistics[index]

    def _cache(self, index: int) -> CachedSample:
        """A sample on the device, with a margin unless that would double its memory."""
        height, width = self.shapes[index]
        small = (height + 2 * self.margin) * (width + 2 * self.margin) > 2 * height * width
        margin = 0 if small else self.margin
        padded = Window(index, -margin, -margin, height + 2 * margin, width + 2 * margin)
        arrays = self._read(Window(index, 0, 0, height, width))
        self.statistics(index)  # computed now, since the file may be replaced later
        planes = {name: as_tensor(_cut(array, padded)).to(self.memory) for name, array in arrays.items()}
        return CachedSample(planes, margin)

    def _read(self, window: Window) -> dict[str, np.ndarray]:
        """Raw pixels of a window, and its class indices and border distance if there are any."""
        file = self.files[window.index]
        image, label = file.open()
        arrays = {"input": np.array(_cut(image, window))}
        if window.index >= len(self.files) - self.num_unlabelled:
            check_values(file.input, arrays["input"], None, 0)
            size = arrays["input"].shape[:2]
            distance = {"distance": np.zeros(size, np.float16)} if self.distances else {}
            return arrays | {"label": np.full(size, IGNORE, np.uint8)} | distance
        if label is not None:
            arrays["label"] = np.array(_cut(label, window))
            if file.label is not None:
                arrays["label"] = to_indices(arrays["label"], self.info.class_values, file.label)
        check_values(
            file.input, arrays["input"], arrays.get("label"), self.info.num_class, partial=self.info.is_partial
        )
        if self.distances:
            arrays["distance"] = np.array(_cut(file.open_distance(), window))
        return arrays


class CachedSample(NamedTuple):
    """A sample in memory: its (H, W, ...) planes, with a margin [px] of reflected pixels around them."""

    planes: dict[str, Tensor]
    margin: int

    def cut(self, window: Window) -> dict[str, Tensor]:
        """Planes of a window."""
        height, width = self.planes["input"].shape[:2]
        moved = replace(window, top=window.top + self.margin, left=window.left + self.margin)
        if moved.is_inside(height, width):
            return {name: _cut(plane, moved) for name, plane in self.planes.items()}
        image = np.s_[self.margin : height - self.margin, self.margin : width - self.margin]
        return {name: _cut(plane[image], window) for name, plane in self.planes.items()}


def _cut(array: Array, window: Window) -> Array:
    """Window of an (H, W, ...) array, a view if it is inside; only the rows and columns it covers are read."""
    bottom, right = window.top + window.height, window.left + window.width
    if window.is_inside(*array.shape[:2]):
        return array[window.top : bottom, window.left : right]  # much faster than with index arrays
    if isinstance(array, Tensor):
        return _cut_reflected(array, window)
    rows = _reflect(np.arange(window.top, bottom), array.shape[0])
    columns = _reflect(np.arange(window.left, right), array.shape[1])
    top, left = rows.min(), columns.min()
    block = array[top : rows.max() + 1, left : columns.max() + 1]
    return block[(rows - top)[:, None], columns - left]


def _cut_reflected(plane: Tensor, window: Window) -> Tensor:
    """Window of an (H, W, ...) plane on any device, without synchronising with it."""
    tops = torch.arange(window.top, window.top + window.height, device=plane.device)
    lefts = torch.arange(window.left, window.left + window.width, device=plane.device)
    rows, columns = (_reflect(index, size) for index, size in zip((tops, lefts), plane.shape, strict=False))
    bits = plane.view(SIGNED.get(plane.dtype, plane.dtype))  # CUDA can't index unsigned types wider than 8 bits
    return bits[rows[:, None], columns].view(plane.dtype)


def _reflect(index: Array, size: int) -> Array:
    """Indices reflected into [0, size) at the first and last pixel.

    >>> _reflect(np.arange(-2, 6), 3).tolist()
    [2, 1, 0, 1, 2, 1, 0, 1]
    """
    period = max(2 * (size - 1), 1)
    return size - 1 - abs(size - 1 - abs(index) % period)


def statistics_of(image: Rows, info: DataInfo) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) that normalise an image (H, W, C); float64 if its pixels exceed float32."""
    mean, std = (info.mean, info.std) if info.normalize == "data" else STATISTICS[info.normalize](image)
    dtype = np.float64 if is_wide(image.dtype) else np.float32
    return np.asarray(mean, dtype), np.asarray(std, dtype)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels (H, W, C) minus the mean, divided by the standard deviation; computed in the mean's type, then float32."""
    return ((pixels.to(mean.dtype) - mean) / std).float()


def legacy_statistics(image: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) that normalise an image (H, W, C) as pytorch-UNET did.

    It divided 8-bit images by 255, left others unchanged, and then mapped [0, 1] to [-1, 1].
    """
    half = np.full(image.shape[2], 127.5 if image.dtype == np.uint8 else 0.5, np.float32)
    return half, half


STATISTICS = {"image": image_statistics, "legacy": legacy_statistics}


def as_tensor(array: np.ndarray) -> Tensor:
    """Tensor of an array, in the native byte order and under the type's usual name as torch requires."""
    # np.longdouble has no tensor; np.ulonglong is uint64 by another number, which `str` ("<u8") does not keep
    dtype = np.float64 if array.dtype.itemsize > 8 else np.dtype(array.dtype.newbyteorder("=").str)
    return torch.from_numpy(np.ascontiguousarray(array, dtype))
