"""Weights of a trained network as the start of a training of another one."""

from __future__ import annotations

import re
from pathlib import Path

import checkpoint
from checkpoint import Checkpoint
from model import UNet
from training.state import TrainState, num_weight
from utils import UserError


def start_from(state: TrainState, path: Path) -> str:
    """Replace the weights of a training that begins by those of a checkpoint, where they fit.

    Parameters
    ----------
    state : TrainState
        Its network and the average of that are changed.
    path : Path
        A `.pth` of this program or of pytorch-UNET, or a folder, of which the newest is taken.

    Returns
    -------
    str
        What was taken.

    Raises
    ------
    UserError
        There is no checkpoint, it can't be used, or nothing of it fits.
    """
    path, saved = _load(path)
    source = saved.network(path)
    num_taken, others = take_weights(state.net, source)
    if not num_taken:
        shape = " ".join(f"--{name} {source.arguments[name]}" for name in ("nch_ker", "num_level"))
        raise UserError(f"--init_from {path}: none of its weights fit this network: it has {shape}")
    if state.average:
        state.average.net.load_state_dict(state.net.state_dict())
    drawn = f"; drawn at random: {', '.join(others)}" if others else ""
    return f"{num_taken:,} of {num_weight(state.net):,} weights taken from {path}{drawn}"


def _load(path: Path) -> tuple[Path, Checkpoint]:
    """File that `--init_from` names, and what it holds."""
    what = "no checkpoint there" if path.is_dir() else "no such file or folder"
    if not path.exists() or (path.is_dir() and not checkpoint.list_newest(path)):
        raise UserError(f"--init_from {path}: {what}: name a .pth, or the folder that it lies in")
    return checkpoint.load_epoch(path) if path.is_dir() else (path, Checkpoint.load(path))


def role_of(name: str, num_level: int) -> str:
    """Name of a weight with all levels counted from the top, which a network of another depth has, too.

    The decoders are listed from the bottom, and the two convolutions at the bottom are those of one more level.

    Parameters
    ----------
    name : str
        As in the state of a `UNet`.
    num_level : int
        Levels of that network.

    Examples
    --------
    >>> role_of("decoders.0.up.weight", 4), role_of("bottom.0.conv.weight", 4), role_of("fc.bias", 4)
    ('decoders.3.up.weight', 'encoders.4.0.conv.weight', 'fc.bias')
    """
    name = re.sub(r"^bottom\.", f"encoders.{num_level}.", name)
    return re.sub(r"^decoders\.(\d+)", lambda found: f"decoders.{num_level - 1 - int(found[1])}", name)


def take_weights(net: UNet, source: UNet) -> tuple[int, list[str]]:
    """Copy the weights and statistics of another network that have the same role and shape here.

    A bias or a statistic is taken only where the weights of its layer fit.

    Parameters
    ----------
    net : UNet
        Changed in place.
    source : UNet
        May have other channels, classes, normalisation and levels.

    Returns
    -------
    num_taken : int
        Number of weights that were taken, without statistics.
    others : list of str
        Layers of `net` whose weights were not.
    """
    own = net.state_dict()
    theirs = {role_of(name, source.num_level): tensor for name, tensor in source.state_dict().items()}
    roles = {name: role_of(name, net.num_level) for name in own}
    fits = {name for name, role in roles.items() if role in theirs and theirs[role].shape == own[name].shape}
    taken = {name for name in fits if f"{_layer_of(name)}.weight" in fits}
    net.load_state_dict(own | {name: theirs[roles[name]] for name in taken})
    parameters = dict(net.named_parameters())
    others = dict.fromkeys(_layer_of(name) for name in parameters if name.endswith(".weight") and name not in taken)
    return sum(parameters[name].numel() for name in taken & parameters.keys()), list(others)


def _layer_of(name: str) -> str:
    return name.rpartition(".")[0]
