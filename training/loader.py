"""Finished batches of a training, and the loaders behind them, for one process of the run."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dataset import IGNORE, SampleFile
from training.augment import Augmentation
from training.patches import Batch, PatchDataset, PatchSampler
from utils import say


@dataclass(frozen=True)
class LoaderOptions:
    """How samples are read.

    Attributes
    ----------
    in_memory : bool
        Keep them in memory, and read with no further process.
    num_workers : int
        Processes that read what is not kept in memory; no more than there are cores.
    pin_memory : bool
        Put batches where a GPU copies from without waiting.
    rank, num_process : int
        Which share of each batch this process of the run gets.
    """

    in_memory: bool
    num_workers: int = 0
    pin_memory: bool = False
    rank: int = 0
    num_process: int = 1

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of a `DataLoader`; the processes live as long as it does, and not for one epoch."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 0 if self.in_memory else min(self.num_workers, cores)
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "worker_init_fn": _start_worker,
            "pin_memory": self.pin_memory,
        }


class TrainingBatches:
    """Finished batches of random crops: augmented, weighted, on the device; a function of (seed, epoch) alone.

    Parameters
    ----------
    data : PatchDataset
        Labelled samples, with the margin of the augmentation.
    augment : Augmentation
        Its crop is made smaller where no image is as large.
    batch_size, seed : int
        Crops in a batch of all processes together, and the random seed.
    options : LoaderOptions
        How this process reads samples.
    device : torch.device
        Where the batches go.
    stride : int
        Of the network [px]; a crop of smaller images has sides that are multiples of it.
    weigh : callable, optional
        Weight of each pixel, of a batch's label and distance.
    num_crop : int
        Crops of an epoch, see `PatchSampler`.
    sum_over_processes : callable, optional
        Sum of a tensor over the processes, if there are several.
    """

    def __init__(
        self,
        data: PatchDataset,
        augment: Augmentation,
        batch_size: int,
        seed: int,
        options: LoaderOptions,
        device: torch.device,
        stride: int,
        weigh: Callable[[Tensor, Tensor], Tensor] | None = None,
        num_crop: int = 0,
        sum_over_processes: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        crop = fit_crop(augment.crop, data.shapes, stride, verbose=options.rank == 0)
        self.augment, self.weigh, self._sum = replace(augment, crop=crop), weigh, sum_over_processes
        self.files, self.seed, self.options, self.device = data.files, seed, options, device
        self._loader = patch_loader(data, crop, batch_size, seed, options, num_crop)
        self._sampler = cast(PatchSampler, self._loader.batch_sampler)

    def __len__(self) -> int:
        return len(self._sampler)

    @property
    def plan(self) -> dict[str, Any]:
        """What the batches of an epoch depend on, besides the sizes of the images and what is annotated."""
        return self._sampler.plan

    def files_of(self, epoch: int) -> list[list[SampleFile]]:
        """Samples of each batch of an epoch, those of all processes together."""
        return [[self.files[window.index] for window in batch] for batch in self._sampler.batches(epoch)]

    def of(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Batches of an epoch, from a step on."""
        self._sampler.set_epoch(epoch, first_step)
        sizes = [len(batch) for batch in self._sampler.batches(epoch)[first_step:]]
        for size, batch in zip(sizes, self._loader, strict=True):
            yield self._finished(batch, epoch, size)

    def _finished(self, batch: Batch, epoch: int, size: int) -> Batch:
        """Batch as the network trains on it; the batch of all processes together has `size` crops."""
        rngs = self._rngs(batch, epoch)
        tensors = cast(dict[str, Tensor], batch)
        moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}
        batch = self.augment(cast(Batch, moved), rngs)
        known = batch["label"] != IGNORE
        if self.augment.is_partial:
            batch["label"] = torch.where(known, batch["label"], 0)  # any class: its weight is 0
        if self.weigh is not None:
            batch["weight"] = self.weigh(batch["label"], batch["distance"])
        num_own, num_process = len(range(self.options.rank, size, self.options.num_process)), self.options.num_process
        if self.augment.is_partial:  # the mean over pixels is to be the mean over annotated pixels
            num_known = self._sum(known.sum() * (num_own > 0))  # a process without a crop has repeated another's
            batch["weight"] = batch.get("weight", 1) * known * (size * known[0].numel() / num_known)
        if num_process > 1:  # the mean over processes is to be the mean over images
            batch["loss_scale"] = num_own * num_process / size
        batch["seed"] = int(rngs[0].integers(2**63))
        return batch

    def _rngs(self, batch: Batch, epoch: int) -> list[np.random.Generator]:
        """Random numbers of each crop; the first one of a sample has those of earlier versions, which had no others."""
        crops = zip(batch["index"].tolist(), batch["crop"].tolist(), strict=True)
        return [np.random.default_rng((self.seed, epoch, i, *([k] if k else []))) for i, k in crops]


def memory_for(num_byte: int, cache_gb: float, device: torch.device) -> torch.device | None:
    """Where a database of this size is kept: with the network, if its GPU has ample room; None: on the disk."""
    if num_byte > cache_gb * 1e9:
        return None
    ample = device.type == "cpu" or 8 * num_byte < torch.cuda.mem_get_info(device)[0]
    return device if ample else torch.device("cpu")


def fit_crop(crop: tuple[int, int], shapes: list[tuple[int, int]], stride: int, *, verbose: bool) -> tuple[int, int]:
    """Crop that is no larger than the largest image [px]; says so, and warns of images that are smaller."""
    largest = -(-max(max(shape) for shape in shapes) // stride) * stride
    if largest < max(crop):
        crop = (min(crop[0], largest), min(crop[1], largest))
        if verbose:
            say(f"crops are {crop[0]} x {crop[1]} px, as large as the largest image")
    small = sum(height < crop[0] or width < crop[1] for height, width in shapes)
    if small and verbose:
        what = f"{small} of {len(shapes)} images are smaller than the crop of {crop} px"
        say(f"warning: {what}: padded by reflection", sys.stderr)
    return crop


def patch_loader(
    data: PatchDataset, crop: tuple[int, int], batch_size: int, seed: int, options: LoaderOptions, num_crop: int = 0
) -> DataLoader:
    """Loader of random patches with the data's margin, as they lie on the disk."""
    sampler = PatchSampler(
        data.shapes,
        crop,
        data.margin,
        batch_size,
        seed,
        num_crop=num_crop,
        annotated=data.annotated,
        rank=options.rank,
        num_process=options.num_process,
    )
    return DataLoader(data, batch_sampler=sampler, **options.arguments)


def _start_worker(_worker: int) -> None:
    """Leave signals to the main process, which still reads what it has begun, and its objects' memory shared.

    A terminal that is closed, and many a batch system, sends them to all processes. A process whose main process has
    ended ends by itself.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has not all
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    gc.freeze()  # collected objects would be written to, and no longer shared
