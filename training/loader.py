"""Training batches of one process: loading, augmentation and pixel weights."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dataset import Batch, PatchDataset
from samples import IGNORE, SampleFile
from training.annotation import find_annotated
from training.augment import Augmentation
from training.sampler import PatchSampler
from utils import UserError, echo


@dataclass(frozen=True)
class LoaderOptions:
    """How samples are read.

    Attributes
    ----------
    in_memory : bool
        Whether all samples are kept in memory; then no worker processes are started.
    num_workers : int
        Worker processes that read samples not kept in memory; at most one per core.
    pin_memory : bool
        Whether batches are put into pinned memory, from which a GPU copies without waiting.
    rank, num_process : int
        This process and the number of processes, among which each batch is divided.
    """

    in_memory: bool
    num_workers: int = 0
    pin_memory: bool = False
    rank: int = 0
    num_process: int = 1

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of a `DataLoader`; its worker processes are kept between epochs."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 0 if self.in_memory else min(self.num_workers, cores)
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "worker_init_fn": _start_worker,
            "pin_memory": self.pin_memory,
        }


class TrainingBatches:
    """Batches of random crops, augmented and weighted, on the device; they depend on (seed, epoch) only.

    Parameters
    ----------
    data : PatchDataset
        Labelled samples, with the margin of the augmentation.
    augment : Augmentation
        Its crop is made smaller if no image is that large.
    batch_size, seed : int
        Crops per batch over all processes, and the random seed.
    options : LoaderOptions
        How this process reads samples.
    device : torch.device
        Device that the batches are moved to.
    stride : int
        Stride of the network [px]; the sides of a crop made smaller are multiples of it.
    weigh : callable, optional
        Function of a batch's label and distance; returns the weight of each pixel.
    num_crop : int
        Number of crops per epoch, see `PatchSampler`.
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
    def batch_settings(self) -> dict[str, Any]:
        """Settings that the batches of an epoch depend on, besides the image sizes and what is annotated."""
        return self._sampler.batch_settings

    def files_of(self, epoch: int) -> list[list[SampleFile]]:
        """Samples of each batch of an epoch, over all processes."""
        return [[self.files[window.index] for window in batch] for batch in self._sampler.batches(epoch)]

    def of(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Batches of an epoch, starting at a step."""
        self._sampler.set_epoch(epoch, first_step)
        sizes = [len(batch) for batch in self._sampler.batches(epoch)[first_step:]]
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
        rngs = self._rngs(batch, epoch)
        tensors = cast(dict[str, Tensor], batch)
        moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}
        batch = self.augment(cast(Batch, moved), rngs)
        if self.augment.is_partial:
            valid = batch["label"] != IGNORE
            batch["label"] = torch.where(valid, batch["label"], 0)  # any class: its weight is 0
        if self.weigh is not None:
            batch["weight"] = self.weigh(batch["label"], batch["distance"])
        num_own, num_process = len(range(self.options.rank, size, self.options.num_process)), self.options.num_process
        if self.augment.is_partial:  # makes the mean over pixels the mean over annotated pixels
            num_valid = self._sum(valid.sum() * (num_own > 0))  # a process without a crop has repeated another's
            batch["weight"] = batch.get("weight", 1) * valid * (size * valid[0].numel() / num_valid)
        if num_process > 1:  # makes the mean over processes the mean over images
            batch["loss_scale"] = num_own * num_process / size
        batch["seed"] = int(rngs[0].integers(2**63))
        return batch

    def _rngs(self, batch: Batch, epoch: int) -> list[np.random.Generator]:
        """Random numbers of each crop; the first one of a sample has those of earlier versions, which had no others."""
        crops = zip(batch["index"].tolist(), batch["crop"].tolist(), strict=True)
        return [np.random.default_rng((self.seed, epoch, i, *([k] if k else []))) for i, k in crops]


def memory_for(num_byte: int, cache_gb: float, device: torch.device) -> torch.device | None:
    """Device that caches a database of this size, a GPU only if it has ample memory; None: read it from disk."""
    if num_byte > cache_gb * 1e9:
        return None
    ample = device.type == "cpu" or 8 * num_byte < torch.cuda.mem_get_info(device)[0]
    return device if ample else torch.device("cpu")


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
    data: PatchDataset, crop: tuple[int, int], batch_size: int, seed: int, options: LoaderOptions, num_crop: int = 0
) -> DataLoader:
    """Loader of random patches with the margin of `data`, before augmentation."""
    sampler = PatchSampler(
        data.shapes,
        crop,
        data.margin,
        batch_size,
        seed,
        num_crop=num_crop,
        annotated=find_annotated(data.files, data.info),
        rank=options.rank,
        num_process=options.num_process,
    )
    return DataLoader(data, batch_sampler=sampler, **options.arguments)


def _start_worker(_worker: int) -> None:
    """Ignore signals in a worker process, and keep the memory that it shares with the main process shared.

    A closed terminal and many batch systems signal all processes. The main process handles the signal, and needs its
    workers until then. A worker ends by itself when the main process has ended.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has not all
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    gc.freeze()  # garbage collection writes to objects, which would copy their memory
