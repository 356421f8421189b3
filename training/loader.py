"""Training batches of one process: loading, augmentation and pixel weights."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dataset import Batch, PatchDataset
from device import abilities
from distributed import World
from samples import IGNORE, SampleFile
from training.augment import Augmentation
from training.sampler import BatchSettings, PatchSampler, find_annotated
from utils import UserError, echo


class TrainingBatches:
    """Batches of random crops, augmented and weighted, on the device; they depend on (seed, epoch) only.

    The samples have the margin of the augmentation. `weigh` makes the weight of each pixel from label and distance.
    """

    def __init__(
        self,
        data: PatchDataset,
        augment: Augmentation,
        settings: BatchSettings,
        device: torch.device,
        *,
        world: World | None = None,
        num_workers: int = 0,
        weigh: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.augment, self.weigh, self.device, self.world = augment, weigh, device, world or World()
        self.files, self.seed = data.files, settings.seed
        self._loader = patch_loader(data, settings, device, world=self.world, num_workers=num_workers)
        self.sampler = cast(PatchSampler, self._loader.batch_sampler)

    def __len__(self) -> int:
        return len(self.sampler)

    def files_of(self, epoch: int) -> list[list[SampleFile]]:
        """Samples of each batch of an epoch, over all processes."""
        return [[self.files[window.index] for window in batch] for batch in self.sampler.batches(epoch)]

    def of(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Batches of an epoch, starting at a step."""
        self.sampler.set_epoch(epoch, first_step)
        sizes = [len(batch) for batch in self.sampler.batches(epoch)[first_step:]]
        for size, batch in zip(sizes, self._loaded(), strict=True):
            yield self._finished(batch, epoch, size)

    def _loaded(self) -> Iterator[Batch]:
        """Batches as the loader reads them.

        Torch raises an error as soon as a process of the loader is killed, which may be within a step: so its handler
        is removed. The loader itself looks after its processes every five seconds that it waits for them.
        """
        try:
            batches = iter(self._loader)
            in_main = threading.current_thread() is threading.main_thread()
            if self._loader.num_workers and in_main and hasattr(signal, "SIGCHLD"):  # Windows has none
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield from batches
        except (RuntimeError, ConnectionError, EOFError) as error:  # as what a lost process, or its pipe, shows
            is_of_torch = not isinstance(error, RuntimeError) or "DataLoader worker" in str(error)
            if not self._loader.num_workers or not is_of_torch or "Original Traceback" in str(error):
                raise
            what = "a process that reads samples was killed, as for lack of memory"
            raise UserError(f"{what}: lower --num_workers and --cache_gb, or close other programs") from error

    def _finished(self, batch: Batch, epoch: int, size: int) -> Batch:
        """Batch as the network is trained on it; over all processes it has `size` crops."""
        crops = zip(batch["index"].tolist(), batch["crop"].tolist(), strict=True)
        # crop 0 of a sample has the random numbers of earlier versions, which had no others
        rngs = [np.random.default_rng((self.seed, epoch, i, *([k] if k else []))) for i, k in crops]
        num_own = len(self.world.share(range(size)))  # crops of this process; 0: it repeats another's
        batch = self._augmented(batch, rngs)
        if self.augment.is_partial:
            valid = batch["label"] != IGNORE
            batch["label"] = torch.where(valid, batch["label"], 0)  # any class: its weight is 0
        if self.weigh is not None:
            batch["weight"] = self.weigh(batch["label"], batch["distance"])
        if self.augment.is_partial:
            batch["weight"] = self._weighted(batch, valid, num_own, size)
        if self.world.size > 1:
            # mean over P processes of loss_p num_p P / size = sum of loss_p num_p / size, the mean over the images
            batch["loss_scale"] = num_own * self.world.size / size
        batch["seed"] = int(rngs[0].integers(2**63))
        return batch

    def _augmented(self, batch: Batch, rngs: list[np.random.Generator]) -> Batch:
        """Batch on the device, augmented there with the random numbers of each crop, or before where it can't."""
        if abilities(self.device).augments:
            return self.augment(self._moved(batch), rngs)
        return self._moved(self.augment(batch, rngs))

    def _moved(self, batch: Batch) -> Batch:
        """Batch on the device."""
        tensors = cast(dict[str, Tensor], batch)
        return cast(Batch, {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()})

    def _weighted(self, batch: Batch, valid: Tensor, num_own: int, size: int) -> Tensor:
        """Weights with which the mean over the pixels of the whole batch is the mean over its annotated pixels."""
        # mean of loss * weight * valid * num_pixel / num_valid = sum over valid of loss * weight / num_valid
        num_pixel, num_valid = size * valid[0].numel(), self.world.sum(valid.sum() * (num_own > 0))
        return batch.get("weight", 1) * valid * (num_pixel / num_valid.clamp_min(1))


def memory_for(num_byte: int, cache_gb: float, device: torch.device) -> torch.device | None:
    """Device that caches a database of this size, a GPU only if it has ample memory; None: read it from disk."""
    if num_byte > cache_gb * 1e9:
        return None
    free_memory = abilities(device).free_memory
    return device if free_memory and 8 * num_byte < free_memory(device) else torch.device("cpu")


def fit_crop(crop: tuple[int, int], shapes: list[tuple[int, int]], stride: int, *, verbose: bool) -> tuple[int, int]:
    """Crop no higher and no wider than the images [px]; prints a changed crop, and warns of smaller images."""
    highest, widest = (max(sides) for sides in zip(*shapes, strict=True))
    height, width = (min(side, -(-most // stride) * stride) for side, most in zip(crop, (highest, widest), strict=True))
    # a square crop can be turned by quarters, which is worth a quarter of the pixels; a long image keeps its context
    if crop[0] == crop[1] and 4 * min(height, width) >= 3 * max(height, width):
        height = width = min(height, width)
    if (height, width) != crop and verbose:
        what = f"the images are at most {highest} px high and {widest} px wide, rounded up to multiples of {stride}"
        echo(f"crops are {height} x {width} px: {what}")
    small = sum(rows < height or columns < width for rows, columns in shapes)
    if small and verbose:
        what = f"{small} of {len(shapes)} images are smaller than the crop of {height} x {width} px"
        echo(f"warning: {what}: padded by reflection", sys.stderr)
    return height, width


def patch_loader(
    data: PatchDataset, settings: BatchSettings, device: torch.device, *, world: World | None = None, num_workers: int
) -> DataLoader:
    """Loader of random patches with the margin of `data`, before augmentation; samples in memory need no workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = 0 if data.memory is not None else min(num_workers, cores)
    annotated = find_annotated(data.files[: len(data.files) - data.num_unlabelled], data.info)
    return DataLoader(
        data,
        batch_sampler=PatchSampler(data.shapes, data.margin, settings, annotated, world, data.num_unlabelled),
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        pin_memory=abilities(device).pinned and data.memory != device,  # from which a GPU copies without waiting
    )


def _start_worker(_worker: int) -> None:
    """Ignore signals in a worker process, and keep the memory that it shares with the main process shared.

    A closed terminal and many batch systems signal all processes. The main process handles the signal, and needs its
    workers until then. A worker ends by itself when the main process has ended.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has not all
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    gc.freeze()  # garbage collection writes to objects, which would copy their memory
