"""Which windows of the samples form the batches of a training: random ones, where samples are annotated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch.utils.data import Sampler

from dataset import Window
from description import DataInfo
from distributed import World
from samples import IGNORE, SampleFile
from utils import UserError

MIN_CROP = 24  # crops of an epoch, at least; see "Few annotated sections" in benchmarks/README.md
BLOCK = 16  # [px] height and width of a block of a label
BAND = 16 * BLOCK  # rows of a label that are read at once
LARGE = 1024**2  # [px] area of an image, one crop each; up to 1.5 times that is one crop, too


@dataclass(frozen=True)
class AnnotatedBlocks:
    """Blocks of a label that contain annotated pixels; 16 bytes for each of them."""

    anchors: np.ndarray  # (N, 2) of int32, position (y, x) of one annotated pixel of each block [px]
    ends: np.ndarray  # (N,) of int64, annotated pixels in this block and those before it

    @classmethod
    def find(cls, label: np.ndarray) -> AnnotatedBlocks:
        """Blocks of a label (H, W), which is read a few rows at a time."""
        anchors, counts = [np.empty((0, 2), np.int32)], [np.empty(0, np.int64)]
        for top in range(0, label.shape[0], BAND):
            positions, numbers = _find_in_band(label[top : top + BAND] != IGNORE)
            anchors.append((positions + np.array([top, 0])).astype(np.int32))
            counts.append(numbers)
        return cls(np.concatenate(anchors), np.concatenate(counts).cumsum())

    def __len__(self) -> int:
        return len(self.ends)

    def draw(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Random anchors (num, 2), each block with a probability proportional to its number of annotated pixels."""
        pixels = rng.integers(self.ends[-1], size=num)
        return self.anchors[np.searchsorted(self.ends, pixels, side="right")]


def _find_in_band(valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First annotated pixel (N, 2) of each block of a band (H, W), and number (N,) of annotated pixels, if any."""
    padded = np.pad(valid, [(0, -side % BLOCK) for side in valid.shape])
    rows, columns = (side // BLOCK for side in padded.shape)
    blocks = padded.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2).reshape(rows, columns, BLOCK**2)
    counts = np.count_nonzero(blocks, axis=-1)
    row, column = counts.nonzero()
    y, x = np.divmod(blocks[row, column].argmax(-1), BLOCK)
    return np.stack([row * BLOCK + y, column * BLOCK + x], -1), counts[row, column]


def find_annotated(files: list[SampleFile], info: DataInfo) -> list[AnnotatedBlocks] | None:
    """Where each sample is annotated, which at least one must be; None where all pixels are."""
    if not info.is_partial:
        return None
    labels = (cast(np.ndarray, file.open(info.class_values)[1]) for file in files)
    annotated = [AnnotatedBlocks.find(label) for label in labels]
    if not any(map(len, annotated)):
        folder = files[0].input.parent
        raise UserError(f"{folder}: no pixel is annotated, all have the label {info.ignore}: check --ignore")
    return annotated


@dataclass(frozen=True)
class BatchSettings:
    """Flags that the batches of an epoch depend on, besides the samples."""

    crop: tuple[int, int]  # height and width [px]
    batch_size: int  # crops per batch over all processes; the last one may have fewer
    seed: int
    num_crop: int = 0  # per epoch, shared by area; 0: one per sample, more if those are few or a sample is large


class PatchSampler(Sampler[list[Window]]):
    """Batches of random windows of samples; they depend on (seed, epoch) only.

    Windows have a margin [px] around the crop, for the elastic displacement. Crops are drawn where the samples are
    annotated; None: everywhere. The last `num_unlabelled` samples have no label; every other crop is one of theirs, so
    that an epoch has no more crops than without them. Each process of the world gets consecutive windows of a batch, of
    both kinds where they are two or more, or the first window, whose loss is then scaled by 0, if there are too few.
    """

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        margin: int,
        settings: BatchSettings,
        annotated: list[AnnotatedBlocks] | None = None,
        world: World | None = None,
        num_unlabelled: int = 0,
    ) -> None:
        self.shapes, self.margin = np.array(shapes), margin
        self.num_labelled = len(shapes) - num_unlabelled
        self.settings, self.annotated, self.world = settings, annotated, world or World()
        self.epoch, self.first_step = 1, 0
        sizes, unlabelled = np.split(_relative_sizes(self.shapes), [self.num_labelled])
        if annotated is not None:
            sizes = sizes * [len(blocks) > 0 for blocks in annotated]
        self.num_crop = settings.num_crop or max(MIN_CROP, round(sizes.sum()))
        num = self.num_crop // 2 if num_unlabelled else 0  # of unlabelled samples
        # crops of each sample, on average over the epochs: labelled ones and others
        self.expected = [sizes * ((self.num_crop - num) / sizes.sum())]
        self.expected += [unlabelled * (num / unlabelled.sum())] if num_unlabelled else []

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the next epoch, and the step at which a resumed run continues."""
        self.epoch, self.first_step = epoch, first_step

    @property
    def batch_settings(self) -> dict[str, Any]:
        """Settings for a checkpoint: if they change, so do the batches of an epoch."""
        return {
            "seed": self.settings.seed,
            "batch_size": self.settings.batch_size,
            "crop": [int(side) for side in self.settings.crop],
            "samples": len(self.shapes),
            "num_crop": self.num_crop,
        }

    def batches(self, epoch: int) -> list[list[Window]]:
        """All batches of an epoch, for all processes together."""
        size, crop = self.settings.batch_size, self.settings.crop
        rng = np.random.default_rng((self.settings.seed, epoch))
        rounding, anchoring = rng.spawn(2)  # leaves the numbers of `rng` as they are
        counts = np.concatenate([_draw_counts(expected, rounding) for expected in self.expected])
        samples = np.repeat(np.arange(len(counts)), counts)
        numbers = np.arange(len(samples)) - np.repeat(counts.cumsum() - counts, counts)  # 0, 1, ... of each sample
        order = self._mixed(rng.permutation(len(samples)), samples)
        low, high = self._corner_range(counts, anchoring)
        corners = low + (rng.random(low.shape) * (high - low + 1)).astype(int) - self.margin
        height, width = (side + 2 * self.margin for side in crop)
        drawn = zip(samples.tolist(), corners.tolist(), numbers.tolist(), strict=True)
        windows = [Window(index, top, left, height, width, number) for index, (top, left), number in drawn]
        return [[windows[i] for i in order[k : k + size]] for k in range(0, len(order), size)]

    def _mixed(self, order: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Order of the crops, given the sample of each; every other one is of an unlabelled sample, if any are."""
        if len(self.expected) == 1:
            return order
        is_labelled, mixed = samples[order] < self.num_labelled, np.empty_like(order)
        mixed[::2], mixed[1::2] = order[is_labelled], order[~is_labelled]
        return mixed

    def _corner_range(self, counts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """First and last possible top left corner (num_crop, 2) of each crop, given the number of each sample."""
        crop = np.array(self.settings.crop)
        high = np.maximum(np.repeat(self.shapes, counts, axis=0) - crop, 0)
        if self.annotated is None:
            return np.zeros_like(high), high
        drawn = zip(self.annotated, counts[: self.num_labelled], strict=True)
        anchors = np.concatenate([blocks.draw(rng, num) for blocks, num in drawn if num])
        # at least a margin inside the crop, if the image has room: no displacement moves the anchor out of it
        inside = np.minimum(self.margin, (crop - 1) // 2)
        of_labelled, others = np.split(high, [len(anchors)])
        low = np.clip(anchors + inside + 1 - crop, 0, of_labelled)
        high = np.clip(anchors - inside, 0, of_labelled)
        return np.concatenate([low, np.zeros_like(others)]), np.concatenate([high, others])

    def __iter__(self) -> Iterator[list[Window]]:
        for batch in self.batches(self.epoch)[self.first_step :]:
            yield list(self.world.share(batch)) or batch[:1]

    def __len__(self) -> int:
        return math.ceil(self.num_crop / self.settings.batch_size)


def _draw_counts(expected: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Crops of each sample (N,) in an epoch: its expected number, rounded up or down at random; the sum is fixed.

    Systematic sampling: one random offset for all. So over the epochs no sample is left out or preferred.
    """
    offset = rng.integers(2**20) / 2**20  # so few bits that adding a whole number is exact
    ends = np.floor(expected.cumsum().round(6) + offset)
    return np.diff(ends, prepend=0).astype(int)


def _relative_sizes(shapes: np.ndarray) -> np.ndarray:
    """Crops (N,) for which an image is large enough, given the heights and widths (N, 2) [px].

    >>> _relative_sizes(np.array([(512, 512), (1200, 1200), (2048, 2048)])).tolist()
    [1.0, 1.0, 4.0]
    """
    areas = shapes.prod(axis=1) / LARGE
    return np.where(areas <= 1.5, 1.0, areas)
