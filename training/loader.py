"""Loaders of training patches and of whole images, for one process of the run."""

from __future__ import annotations

import gc
import os
import signal
import sys
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset import DataInfo, PatchDataset, PatchSampler, SampleFile, check_values
from files import atomic_write
from model import STRIDE
from training.losses import border_distance
from utils import UserError, say


@dataclass(frozen=True)
class Reading:
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
    def options(self) -> dict:
        """Arguments of a `DataLoader`; the processes live as long as it does, and not for one epoch."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 0 if self.in_memory else min(self.num_workers, cores)
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "worker_init_fn": _start_worker,
            "pin_memory": self.pin_memory,
        }


def patch_loader(data: PatchDataset, crop: tuple[int, int], batch_size: int, seed: int, reading: Reading) -> DataLoader:
    """Loader of random patches with the data's margin, none larger than the largest image; warns of smaller ones."""
    largest = -(-max(max(shape) for shape in data.shapes) // STRIDE) * STRIDE
    if largest < max(crop):
        crop = (min(crop[0], largest), min(crop[1], largest))
        if reading.rank == 0:
            say(f"crops are {crop[0]} x {crop[1]} px, as large as the largest image")
    small = sum(height < crop[0] or width < crop[1] for height, width in data.shapes)
    if small and reading.rank == 0:
        what = f"{small} of {len(data.shapes)} images are smaller than the crop of {crop} px"
        say(f"warning: {what}: padded by reflection", sys.stderr)
    share = {"rank": reading.rank, "num_process": reading.num_process}
    sampler = PatchSampler(data.shapes, crop, data.margin, batch_size, seed, **share)
    return DataLoader(data, batch_sampler=sampler, **reading.options)


def image_loader(data: PatchDataset, reading: Reading) -> DataLoader:
    """Loader of whole images, one a batch."""
    return DataLoader(data, sampler=range(reading.rank, len(data), reading.num_process), **reading.options)


def keep_distances(files: list[SampleFile], info: DataInfo) -> None:
    """Compute what the weight map is made of, once a sample, and keep it beside the sample.

    Raises
    ------
    UserError
        A label is no map of classes, or the folder takes no file.
    """
    for file in tqdm(files, desc="weight map", disable=None, leave=False):
        if not _has_distance(file):
            image, label = file.open(info.class_values)
            if label is None:
                return  # said by the dataset
            check_values(file.input, image, label, info.num_class)
            try:
                with atomic_write(file.distance) as goal:
                    np.save(goal, border_distance(label))
            except UserError as error:
                raise UserError(f"{error}; or train with --loss bce, which keeps nothing there") from error


def _has_distance(file: SampleFile) -> bool:
    """Whether the distance of a sample is kept, and is of the sample as it is now."""
    changed = max(path.stat().st_mtime_ns for path in file if path)
    if not file.distance.is_file() or file.distance.stat().st_mtime_ns < changed:
        return False
    try:
        file.open_distance()
    except UserError:
        return False
    return True


def _start_worker(_worker: int) -> None:
    """Leave signals to the main process, which still reads what it has begun, and its objects' memory shared.

    A terminal that is closed, and many a batch system, sends them to all processes. A process whose main process has
    ended ends by itself.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has not all
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    gc.freeze()  # collected objects would be written to, and no longer shared
