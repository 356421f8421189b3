"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from utils import UserError, atomic_write

OURS = {"net", "optim", "arch", "data", "config", "epoch", "whole", "losses"}
FORMAT = 1  # rises when a reader of the old layout would misread the new one


def path_of(folder: Path, epoch: int) -> Path:
    """Where the checkpoint of an epoch lies.

    Examples
    --------
    >>> path_of(Path("checkpoints/unet/em"), 50).name
    'model_epoch0050.pth'
    """
    return folder / f"model_epoch{epoch:04d}.pth"


def epoch_of(path: Path) -> int | None:
    """Epoch of a checkpoint by its name, with any count of digits; None for another name.

    Examples
    --------
    >>> epoch_of(Path("model_epoch50.pth")), epoch_of(Path("model.pth"))
    (50, None)
    """
    match = re.fullmatch(r"model_epoch(\d+)\.pth", path.name)
    return int(match[1]) if match else None


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; the old file of that name stays until the new one is whole.

    Parameters
    ----------
    path : Path
        The goal.
    state : dict
        Tensors and plain Python values, with at least the keys `OURS`.

    Raises
    ------
    UserError
        The folder or the disk takes no file.
    """
    buffer = io.BytesIO()
    torch.save(state | {"format": FORMAT}, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def list_epochs(folder: Path) -> dict[int, Path]:
    """Checkpoints in a folder by their epoch."""
    return {epoch_of(path): path for path in folder.glob("model_epoch*.pth") if epoch_of(path) is not None}


def find(folder: Path, epoch: int = 0) -> Path:
    """Checkpoint of an epoch, or the newest.

    Parameters
    ----------
    folder : Path
        `[dir_checkpoint]/[scope]/[name_data]`.
    epoch : int
        0 for the newest. File names may have any count of digits.

    Raises
    ------
    UserError
        There is none.
    """
    found = list_epochs(folder)
    if not found:
        raise UserError(f"no checkpoint in {folder}: run --mode train first, or check --scope and --name_data")
    if epoch and epoch not in found:
        raise UserError(f"no checkpoint of epoch {epoch} in {folder}: there are {', '.join(map(str, sorted(found)))}")
    return found[epoch or max(found)]


def load(path: Path) -> dict[str, Any]:
    """State of a checkpoint, ours or pytorch-UNET's, on the CPU.

    Returns
    -------
    dict
        Ours as given to `save`; pytorch-UNET's has the keys `netG` and `optimG`.

    Raises
    ------
    UserError
        The file is no checkpoint, is damaged, or would run code when loaded.
    """
    try:
        _check_sums(path)
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = "it holds more than tensors and plain values, and could run code when loaded"
        raise UserError(f"{path}: refused, {what}: use a checkpoint that main.py --mode train wrote") from error
    except Exception as error:  # a damaged archive fails in as many ways as it has parts
        what = "truncated, damaged or no checkpoint: delete it, and take an older one by --epoch"
        raise UserError(f"{path}: {what}") from error
    if not isinstance(state, dict) or not (state.keys() >= OURS or state.keys() >= {"netG", "optimG"}):
        raise UserError(f"{path}: a file of another program: use a checkpoint that main.py --mode train wrote")
    if state.get("format", FORMAT) > FORMAT:
        raise UserError(f"{path}: written by a newer version of this program: update it")
    if any(not weights.isfinite().all() for key in ("net", "average", "netG") for weights in _tensors(state.get(key))):
        raise UserError(f"{path}: weights that are no numbers, its training broke down: take an older one by --epoch")
    return state


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """Tensors in a dictionary, and in the dictionaries in it."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for part in state.values():
            yield from _tensors(part)


def _check_sums(path: Path) -> None:
    """Compare a checkpoint's parts with their checksums, which torch writes and does not read."""
    if zipfile.is_zipfile(path):  # others are of torch before 1.6
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Turn what a checkpoint of another network makes fail into one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its weights are not those of this network: use a checkpoint of this U-Net") from error
