"""The device that a network runs on, its precision there, and the process that it belongs to."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TypeVar

from utils import UserError, echo

if TYPE_CHECKING:
    import torch

Network = TypeVar("Network", bound="torch.nn.Module")
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # variables that torchrun sets for a process


def is_worker() -> bool:
    """Whether this is one of several processes of a run, which torchrun started.

    Raises
    ------
    UserError
        The environment sets only some of the variables by which such processes find each other, or not to numbers.
    """
    found = {name: os.environ.get(name, "") for name in (*LAUNCHED, "MASTER_ADDR", "MASTER_PORT")}
    if not any(name in os.environ for name in LAUNCHED):  # an address alone makes no process one of several
        return False
    advice = "start the program with torchrun, or unset them"
    if missing := [name for name, value in found.items() if not value]:
        there = ", ".join(f"{name}={value}" for name, value in found.items() if value) or "nothing else"
        raise UserError(f"the environment sets {there}, but not {', '.join(missing)}: {advice}")
    numbers = {name: int(value) for name, value in found.items() if value.isascii() and value.isdecimal()}
    limits = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE", "MASTER_PORT": ""}
    for name, size in limits.items():
        if not 0 <= numbers.get(name, -1) < (numbers.get(size, 0) if size else 2**16):
            rule = f"a number below {size}={found[size]}" if size else "the number of a port"
            raise UserError(f"the environment sets {name}={found[name]}, which must be {rule}: {advice}")
    return True


def pick_device(gpu_ids: str) -> torch.device:
    """Device that the network runs on.

    Parameters
    ----------
    gpu_ids : str
        `"-1"` for the CPU, or a comma-separated list of GPU numbers. A process of torchrun takes the entry at its local
        rank, or if the list is shorter than the number of processes, the GPU with the number of its local rank.

    Returns
    -------
    torch.device
        The GPU, or the CPU with a warning on stderr if there is no such GPU.

    Raises
    ------
    UserError
        As `is_worker`.
    """
    import torch

    numbers = [int(number) for number in gpu_ids.split(",")]
    rank, num_process = (int(os.environ[name]) for name in LAUNCHED[2:]) if is_worker() else (0, 1)
    number = numbers[rank] if len(numbers) >= num_process else rank
    if numbers[0] < 0:
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        echo(f"warning: --gpu_ids {gpu_ids}: no GPU {number} here, running on the CPU", sys.stderr)
        return torch.device("cpu")
    return torch.device("cuda", number)


def pick_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """Data type of mixed precision; weights, normalisation statistics, losses and probabilities stay float32.

    Parameters
    ----------
    amp : {"auto", "off", "bf16", "fp16"}
        `auto` is bfloat16 if the device has instructions for it; without them it is slower than float32.
    device : torch.device
        Device that the network runs on.

    Returns
    -------
    torch.dtype or None
        For `torch.autocast`; None for float32 throughout.
    """
    import torch

    if amp == "auto" and device.type == "cuda":
        with torch.cuda.device(device):
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif amp == "auto":
        can = torch.cpu.get_capabilities()
        fast = can.get("avx512_bf16", False) or can.get("amx_tile", False)
    else:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.bfloat16 if fast else None


def to_device(net: Network, norm: str, device: torch.device, precision: torch.dtype | None) -> Network:
    """Network with some normalisation on a device, in the memory order that is fastest there."""
    return net.to(device, memory_format=memory_format(norm, device, precision))  # type: ignore[call-overload]


def memory_format(norm: str, device: torch.device, precision: torch.dtype | None) -> torch.memory_format:
    """Order of the pixels in memory that a network is fastest with.

    Channels-last, but for instance and group normalisation in float32 or on a CPU, which then spend up to a third of
    their time on copies (`benchmarks/bench_step.py`).
    """
    import torch

    planes = norm in ("inorm", "gnorm") and (precision is None or device.type == "cpu")
    return torch.contiguous_format if planes else torch.channels_last
