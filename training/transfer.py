"""Weights of a trained network as the start of a training of another one."""

from __future__ import annotations

import re
from pathlib import Path

import checkpoint
from description import compare_databases
from model import UNet
from training.state import TrainState, num_weight
from utils import UserError, echo


def start_from(state: TrainState, path: Path) -> str:
    """Copy the weights of a checkpoint that fit into a new training; return a message about them.

    The path is that of a `.pth` of this program or of pytorch-UNET, or of a folder, whose newest checkpoint is loaded.
    """
    what = "no checkpoint there" if path.is_dir() else "no such file or folder"
    if not path.exists() or (path.is_dir() and not checkpoint.list_newest(path)):
        raise UserError(f"--init_from {path}: {what}: name a .pth, or the folder that it lies in")
    path, saved = checkpoint.load_epoch(path)
    for line in compare_databases(saved.info, state.info, f"--init_from {path}"):
        echo(f"note: {line}")
    source = saved.network(path)
    num_copied, others = copy_weights(state.net, source)
    if not num_copied:
        shape = " ".join(f"--{name} {source.arguments[name]}" for name in ("nch_ker", "num_level"))
        raise UserError(f"--init_from {path}: none of its weights fit this network: it has {shape}")
    if state.average:
        state.average.net.load_state_dict(state.net.state_dict())
    drawn = f"; drawn at random: {', '.join(others)}" if others else ""
    return f"{num_copied:,} of {num_weight(state.net):,} weights taken from {path}{drawn}"


def role_of(name: str, num_level: int) -> str:
    """Name of a weight with all levels counted from the top, which a network of another depth has, too.

    The decoders are listed from the bottom, and the two convolutions at the bottom are those of one more level.

    >>> role_of("decoders.0.up.weight", 4), role_of("bottom.0.conv.weight", 4), role_of("fc.bias", 4)
    ('decoders.3.up.weight', 'encoders.4.0.conv.weight', 'fc.bias')
    """
    name = re.sub(r"^bottom\.", f"encoders.{num_level}.", name)
    return re.sub(r"^decoders\.(\d+)", lambda match: f"decoders.{num_level - 1 - int(match[1])}", name)


def copy_weights(net: UNet, source: UNet) -> tuple[int, list[str]]:
    """Copy the weights and statistics of another network that have the same role and shape here.

    A bias or a statistic is copied only where the weights of its layer fit. Returns the number of the copied weights,
    without statistics, and the other layers. The networks may differ in channels, classes, normalisation and levels.
    """
    state = net.state_dict()
    theirs = {role_of(name, source.num_level): tensor for name, tensor in source.state_dict().items()}
    roles = {name: role_of(name, net.num_level) for name in state}
    fits = {name for name, role in roles.items() if role in theirs and theirs[role].shape == state[name].shape}
    copied = {name for name in fits if f"{_layer_of(name)}.weight" in fits}
    net.load_state_dict(state | {name: theirs[roles[name]] for name in copied})
    parameters = dict(net.named_parameters())
    others = dict.fromkeys(_layer_of(name) for name in parameters if name.endswith(".weight") and name not in copied)
    return sum(parameters[name].numel() for name in copied & parameters.keys()), list(others)


def _layer_of(name: str) -> str:
    return name.rpartition(".")[0]
