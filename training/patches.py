"""Patches for training: which ones form a batch, and how they are cut from samples in memory or on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dataset import DataInfo, SampleFile, as_tensor, check_samples, check_values, normalise, statistics_of, to_indices
from training.annotation import AnnotatedBlocks
from utils import UserError

Array = TypeVar("Array", np.ndarray, Tensor)
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
MIN_CROP = 24  # crops of an epoch, at least; see "Few annotated sections" in benchmarks/README.md
LARGE = 1024**2  # [px] area of an image, one crop each; up to 1.5 times that is one crop, too


class Patch(TypedDict, total=False):
    """Window of a sample.

    Attributes
    ----------
    input : Tensor
        (C, H, W) float32, normalised.
    label : Tensor
        (H, W) uint8 class indices, `IGNORE` where not annotated; absent without ground truth.
    distance : Tensor
        (H, W) float32 border distance [px], if wanted.
    index, crop : int
        Number of the sample, and of the crop among those of the sample in the epoch.
    mean, std : Tensor
        (C,) mean and standard deviation that the input was normalised by.
    """

    input: Tensor
    label: Tensor
    distance: Tensor
    index: int
    crop: int
    mean: Tensor
    std: Tensor


class Batch(TypedDict, total=False):
    """Patches for one step: the entries of `Patch` with a first axis of N patches, and those of the batch.

    Attributes
    ----------
    input, label, distance, index, crop, mean, std : Tensor
        (N, ...) as in `Patch`; once augmented, the label is int64, and 0 where not annotated.
    weight : Tensor
        (N, H, W) float32 weight of each pixel in the loss; 0 where not annotated.
    loss_scale : float
        Factor of the batch's loss, so that the mean over the processes is the mean over the images.
    seed : int
        Random seed of the dropout.
    """

    input: Tensor
    label: Tensor
    distance: Tensor
    index: Tensor
    crop: Tensor
    mean: Tensor
    std: Tensor
    weight: Tensor
    loss_scale: float
    seed: int


@dataclass(frozen=True)
class Window:
    """Part of a sample; beyond the image, pixels are reflected.

    Attributes
    ----------
    index : int
        Number of the sample.
    top, left, height, width : int
        Position and size [px]; may exceed the image.
    crop : int
        Number of the crop among those of the sample in the epoch.
    """

    index: int
    top: int
    left: int
    height: int
    width: int
    crop: int = 0

    def is_inside(self, height: int, width: int) -> bool:
        """Whether it lies completely inside an image of this size."""
        return min(self.top, self.left) >= 0 and self.top + self.height <= height and self.left + self.width <= width


class PatchDataset(Dataset[Patch]):
    """Normalised windows of samples, read from `.npy` files.

    Parameters
    ----------
    files : list of SampleFile
        The samples; each is opened once to check its shape and channels.
    info : DataInfo
        Channels, classes, mean and standard deviation.
    labelled : bool
        Refuse samples without a label.
    memory : torch.device, optional
        Cache the samples in the memory of this device, and check their pixels now. None: read each window from disk,
        and check it then.
    distances : bool
        Also read the `SampleFile.distance` of each sample.
    margin : int
        How far windows reach beyond the image [px]. Samples are cached with this margin of reflected pixels, unless
        that would double their memory, so that cutting a window is a plain slice.

    Attributes
    ----------
    annotated : list of AnnotatedBlocks or None
        Where each sample is annotated; None where all pixels are.

    Raises
    ------
    UserError
        A sample is damaged, has other channels or classes, or no label where it needs one.
    """

    def __init__(
        self,
        files: list[SampleFile],
        info: DataInfo,
        *,
        labelled: bool,
        memory: torch.device | None = None,
        distances: bool = False,
        margin: int = 0,
    ) -> None:
        self.files, self.info, self.distances = files, info, distances
        self.memory, self.margin = memory, margin
        self.shapes = check_samples(files, info, labelled=labelled)
        self._cached: list[CachedSample] = []
        self._statistics: dict[int, tuple[Tensor, Tensor]] = {}
        self.annotated = self._find_annotated() if labelled and info.is_partial else None
        if memory is not None:
            self._cached = [self._cache(index) for index in range(len(files))]

    def __len__(self) -> int:
        return len(self.files)

    def _find_annotated(self) -> list[AnnotatedBlocks]:
        """Where each sample is annotated; at least one must be."""
        labels = (cast(np.ndarray, file.open(self.info.class_values)[1]) for file in self.files)
        annotated = [AnnotatedBlocks.find(label) for label in labels]
        if not any(map(len, annotated)):
            folder = self.files[0].input.parent
            raise UserError(f"{folder}: no pixel is annotated, all have the label {self.info.ignore}: check --ignore")
        return annotated

    def __getitem__(self, key: int | Window) -> Patch:
        """One window, or the whole image if the key is a number."""
        window = key if isinstance(key, Window) else Window(key, 0, 0, *self.shapes[key])
        if self._cached:
            planes = self._cached[window.index].cut(window)
        else:
            planes = {name: as_tensor(array) for name, array in self._read(window).items()}
        mean, std = self.statistics(window.index)
        pixels = normalise(planes["input"], mean, std).movedim(-1, 0).contiguous()  # (H, W, C) -> (C, H, W)
        patch: Patch = {"input": pixels, "index": window.index, "crop": window.crop, "mean": mean, "std": std}
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
        image = np.array(_cut(image, window))
        if label is not None:
            label = np.array(_cut(label, window))
            if file.label is not None:
                label = to_indices(label, self.info.class_values, file.label)
        check_values(file.input, image, label, self.info.num_class, partial=self.info.is_partial)
        arrays = {"input": image}
        if label is not None:
            arrays["label"] = label
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
        own = np.s_[self.margin : height - self.margin, self.margin : width - self.margin]
        return {name: _cut(plane[own], window) for name, plane in self.planes.items()}


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

    Examples
    --------
    >>> _reflect(np.arange(-2, 6), 3).tolist()
    [2, 1, 0, 1, 2, 1, 0, 1]
    """
    period = max(2 * (size - 1), 1)
    return size - 1 - abs(size - 1 - abs(index) % period)


class PatchSampler(Sampler[list[Window]]):
    """Batches of random windows of the samples; they depend on (seed, epoch) only.

    Parameters
    ----------
    shapes : list of (int, int)
        Height and width of each sample [px].
    crop : (int, int)
        Height and width of a crop [px].
    margin : int
        Pixels read around the crop for the elastic displacement.
    batch_size, seed : int
        Windows per batch (the last may have fewer), and the random seed.
    num_crop : int
        Crops of an epoch, which the samples share by their area; 0: one crop per sample, more if that are few or a
        sample is large.
    annotated : list of AnnotatedBlocks, optional
        Where each sample is annotated: there crops are drawn. None: all pixels are.
    rank, num_process : int
        This process gets every `num_process`-th window of a batch, starting with window `rank`. A process without a
        window gets the batch's first one, whose loss is then scaled by 0.
    """

    def __init__(
        self,
        shapes: list,
        crop: tuple[int, int],
        margin: int,
        batch_size: int,
        seed: int,
        *,
        num_crop: int = 0,
        annotated: list[AnnotatedBlocks] | None = None,
        rank: int = 0,
        num_process: int = 1,
    ) -> None:
        self.shapes, self.crop, self.margin = np.array(shapes), crop, margin
        self.batch_size, self.seed = batch_size, seed
        self.annotated = annotated
        self.rank, self.num_process = rank, num_process
        self.epoch, self.first_step = 1, 0
        sizes = _relative_sizes(self.shapes)
        if annotated is not None:
            sizes = sizes * [len(blocks) > 0 for blocks in annotated]
        self.num_crop = num_crop or max(MIN_CROP, round(sizes.sum()))
        self.expected = sizes * (self.num_crop / sizes.sum())  # crops of each sample, on average over the epochs

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the next epoch, and the step at which a resumed run continues."""
        self.epoch, self.first_step = epoch, first_step

    @property
    def plan(self) -> dict[str, Any]:
        """Settings that the batches of an epoch depend on, besides the image sizes and what is annotated."""
        crop = [int(side) for side in self.crop]
        plan = {"seed": self.seed, "batch_size": self.batch_size, "crop": crop, "samples": len(self.shapes)}
        return plan | {"num_crop": self.num_crop}

    def batches(self, epoch: int) -> list[list[Window]]:
        """All batches of an epoch, for all processes together."""
        rng = np.random.default_rng((self.seed, epoch))
        rounding, anchoring = rng.spawn(2)  # leaves the numbers of `rng` as they are
        counts = self._draw_counts(rounding)
        samples = np.repeat(np.arange(len(counts)), counts)
        numbers = np.arange(len(samples)) - np.repeat(counts.cumsum() - counts, counts)  # 0, 1, ... of each sample
        order = rng.permutation(len(samples))
        low, high = self._corner_range(counts, anchoring)
        corners = low + (rng.random(low.shape) * (high - low + 1)).astype(int) - self.margin
        height, width = (side + 2 * self.margin for side in self.crop)
        drawn = zip(samples.tolist(), corners.tolist(), numbers.tolist(), strict=True)
        windows = [Window(index, top, left, height, width, number) for index, (top, left), number in drawn]
        return [[windows[i] for i in order[k : k + self.batch_size]] for k in range(0, len(order), self.batch_size)]

    def _draw_counts(self, rng: np.random.Generator) -> np.ndarray:
        """Crops of each sample (N,) in an epoch: its expected number, rounded up or down at random; the sum is fixed.

        Systematic sampling: one random offset for all. So over the epochs no sample is left out or preferred.
        """
        offset = rng.integers(2**20) / 2**20  # so few bits that adding a whole number is exact
        ends = np.floor(self.expected.cumsum().round(6) + offset)
        return np.diff(ends, prepend=0).astype(int)

    def _corner_range(self, counts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """First and last possible top left corner (num_crop, 2) of each crop, given the number of each sample."""
        high = np.maximum(np.repeat(self.shapes, counts, axis=0) - self.crop, 0)
        if self.annotated is None:
            return np.zeros_like(high), high
        drawn = zip(self.annotated, counts, strict=True)
        anchors = np.concatenate([blocks.draw(rng, num) for blocks, num in drawn if num])
        # so far inside the crop, if the image has room, that no displacement moves the anchor out of it
        inside = np.minimum(self.margin, (np.array(self.crop) - 1) // 2)
        return np.clip(anchors + inside + 1 - self.crop, 0, high), np.clip(anchors - inside, 0, high)

    def __iter__(self) -> Iterator[list[Window]]:
        for batch in self.batches(self.epoch)[self.first_step :]:
            yield batch[self.rank :: self.num_process] or batch[:1]

    def __len__(self) -> int:
        return math.ceil(self.num_crop / self.batch_size)


def _relative_sizes(shapes: np.ndarray) -> np.ndarray:
    """Crops (N,) for which an image is large enough, given the heights and widths (N, 2) [px].

    Examples
    --------
    >>> _relative_sizes(np.array([(512, 512), (1200, 1200), (2048, 2048)])).tolist()
    [1.0, 1.0, 4.0]
    """
    areas = shapes.prod(axis=1) / LARGE
    return np.where(areas <= 1.5, 1.0, areas)
