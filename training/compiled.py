"""The network that is trained: as it is, or compiled."""

from __future__ import annotations

import importlib.util
import shutil
from typing import cast

import torch
from torch import nn

LONG_STEPS, LONG_MINUTES = 5000, 10  # a training of fewer steps and minutes is not worth the minutes of compiling


def compile_if_worth(net: nn.Module, choice: str, device: torch.device, num_step: int, max_minutes: float) -> nn.Module:
    """Compiled network, or the network as it is.

    Parameters
    ----------
    net : nn.Module
        The network; it keeps the weights, compiled or not.
    choice : {"auto", "on", "off"}
        `auto` compiles long trainings on a GPU with a compiler, and what can't be compiled runs as it is; on a CPU
        nothing is gained (`benchmarks/README.md`).
    device : torch.device
        Where it is trained.
    num_step, max_minutes
        Length of the training; by steps if it has no limit of minutes.
    """
    if choice == "off" or (choice == "auto" and not (can_compile(device) and _is_long(num_step, max_minutes))):
        return net
    import torch._dynamo

    if choice == "auto":
        torch._dynamo.config.suppress_errors = True
    return cast(nn.Module, torch.compile(net))


def can_compile(device: torch.device) -> bool:
    """Whether a device gains from compiled networks, and what compiles them is installed."""
    compilers = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    return device.type == "cuda" and compilers and importlib.util.find_spec("triton") is not None


def _is_long(num_step: int, max_minutes: float) -> bool:
    return max_minutes >= LONG_MINUTES if max_minutes else num_step >= LONG_STEPS
