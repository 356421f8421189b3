"""Compiling the network for training, where it saves time."""

from __future__ import annotations

import importlib.util
import shutil
from typing import cast

import torch
from torch import nn

from device import abilities

LONG_STEPS, LONG_MINUTES = 5000, 10  # compiling takes minutes, which a shorter training does not save


def maybe_compile(net: nn.Module, choice: str, device: torch.device, num_step: int, max_minutes: float) -> nn.Module:
    """Return the network with the same weights, compiled if `--compile` says so.

    `auto` compiles in long trainings (of so many steps, or minutes if they are limited) on a GPU if a compiler is
    installed; parts that can't be compiled run as they are. On a CPU compiling saves no time (`benchmarks/README.md`).
    """
    is_long = max_minutes >= LONG_MINUTES if max_minutes else num_step >= LONG_STEPS
    if choice == "off" or (choice == "auto" and not (can_compile(device) and is_long)):
        return net
    import torch._dynamo

    if choice == "auto":
        torch._dynamo.config.suppress_errors = True
    return cast(nn.Module, torch.compile(net))


def can_compile(device: torch.device) -> bool:
    """Whether the device is a GPU, and a C compiler and Triton are installed."""
    has_compiler = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    return abilities(device).compiles and has_compiler and importlib.util.find_spec("triton") is not None
