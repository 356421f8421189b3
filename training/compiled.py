"""A network in training: as it is, or compiled where that makes up for the time it takes."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from functools import cached_property

import torch
from torch import nn

PAYS = 600.0  # [s] a training that ends sooner is not worth the minutes of compiling


def settle(choice: str, device: torch.device) -> str:
    """`off` for `auto` where nothing is gained: on a CPU (`benchmarks/README.md`), or on a GPU without a compiler."""
    compilers = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    may_gain = device.type == "cuda" and compilers and importlib.util.find_spec("triton") is not None
    return "off" if choice == "auto" and not may_gain else choice


def _compile_if_possible(net: nn.Module) -> nn.Module:
    """Compiled network, whose parts run as they are where compiling them fails."""
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True
    return torch.compile(net)


class Compiled:
    """A network that is compiled, is not, or tries.

    Parameters
    ----------
    net : nn.Module
        The network; it keeps the weights, compiled or not.
    choice : {"auto", "on", "off"}
        `auto` measures: two epochs as it is and, if the rest takes longer than `PAYS`, two compiled. The faster of the
        second ones does the rest.
    compile : callable
        Makes the compiled network; default: `torch.compile`, and with `auto` what it can't compile runs as it is.
    """

    def __init__(self, net: nn.Module, choice: str, compile: Callable[[nn.Module], nn.Module] | None = None) -> None:
        self.net, self.choice = net, choice
        self._compile = compile or (_compile_if_possible if choice == "auto" else torch.compile)
        self.speeds: list[float] = []

    @cached_property
    def _compiled(self) -> nn.Module:
        return self._compile(self.net)

    def choose(self, seconds_left: float) -> nn.Module:
        """Network of the next epoch, of a training that takes so long yet [s]."""
        if self.choice == "auto" and len(self.speeds) == 2 and seconds_left < PAYS:
            self.choice = "off"
        if self.choice == "auto" and len(self.speeds) == 4:
            self.choice = "on" if self.speeds[3] > self.speeds[1] else "off"
        trial = self.choice == "auto" and len(self.speeds) >= 2
        return self._compiled if self.choice == "on" or trial else self.net

    def measured(self, speed: float) -> None:
        """Take in the speed of an epoch [images/s]."""
        self.speeds.append(speed)
