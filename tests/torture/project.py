"""All that this suite knows of the project's modules: programs, readers and flags."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; forks of a process with threads hang
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import checkpoint
import display_result
import files
import main
import run_make_database
import samples
from config import Config, DatabaseFlags, DisplayFlags
from images import readers as images
from utils import UserError

torch.set_num_threads(1)

PROGRAMS = {"main": main.main, "run_make_database": run_make_database.main, "display_result": display_result.main}
FLAGS = {
    "main": Config,
    "run_make_database": DatabaseFlags,
    "display_result": DisplayFlags,
}
REFUSALS = (UserError, MemoryError)  # what every program says in one line
PER_RUN = {"config", "seconds", "run"}  # entries of a checkpoint that differ between equal runs


def preload() -> None:
    """Import what the programs import late, so that a kill hits their work and not their start."""
    import matplotlib.pyplot
    import scipy.ndimage
    import skimage.segmentation
    import tensorboardX
    import tifffile
    import torch._dynamo.convert_frame as compiler  # by several processes; nobody may not read it then
    import zarr
    from tensorboard.backend.event_processing import event_accumulator

    import predict
    import train
    from prediction import export

    _ = (
        compiler,
        event_accumulator,
        matplotlib,
        scipy,
        skimage,
        tensorboardX,
        tifffile,
        zarr,
        export,
        predict,
        train,
    )


def record_system_calls(sync: Callable, exchange: Callable) -> None:
    """Put functions before those of the project that call the system by other ways than `os`."""
    files.sync_file_system = partial(sync, files.sync_file_system)
    files.rename_exchange = partial(exchange, files.rename_exchange)


def read_images(path: Path) -> None:
    """Read the first frames of an image file or folder."""
    for frame in images.list_frames(path)[:4]:
        frame.read()


def read_samples(folder: Path) -> None:
    """Read all samples of one split."""
    for sample in samples.list_samples(folder):
        for array in sample.open([0, 255]):
            np.array(array)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, after the project's own reader has accepted it."""
    checkpoint.Checkpoint.load(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def is_refusal(error: BaseException) -> bool:
    """Whether the programs turn an exception of a reader into one line."""
    return isinstance(error, REFUSALS) or (isinstance(error, OSError) and bool(error.errno))
