"""The device that a network runs on, its precision there, and whether torchrun started this process."""

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
    """Whether this is one of several processes of a run, which torchrun started; refuses a half-set environment."""
    if not any(name in os.environ for name in LAUNCHED):  # an address alone makes no process one of several
        return False
    values = {name: os.environ.get(name, "") for name in (*LAUNCHED, "MASTER_ADDR", "MASTER_PORT")}
    advice = "start the program with torchrun, or unset them"
    if missing := [name for name, value in values.items() if not value]:
        present = ", ".join(f"{name}={value}" for name, value in values.items() if value) or "nothing else"
        raise UserError(f"the environment sets {present}, but not {', '.join(missing)}: {advice}")
    numbers = {name: int(value) for name, value in values.items() if value.isascii() and value.isdecimal()}
    for name, size in {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE", "MASTER_PORT": ""}.items():
        if not 0 <= numbers.get(name, -1) < (numbers.get(size, 0) if size else 2**16):
            rule = f"a number below {size}={values[size]}" if size else "the number of a port"
            raise UserError(f"the environment sets {name}={values[name]}, which must be {rule}: {advice}")
    return True


def pick_device(gpu_ids: str) -> torch.device:
    """Device that the network runs on: `"-1"` is the CPU, else the first of a comma-separated list of GPU numbers.

    A process of torchrun gets the entry at its local rank, or if the list is shorter than the number of processes, the
    GPU with the number of its local rank. Without such a GPU it is the CPU, and a warning is printed.
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
    """Data type for `torch.autocast`, None for float32 throughout.

    `auto` is bfloat16 if the device has instructions for it; without them it is slower than float32. Weights,
    normalisation statistics, losses and probabilities stay float32.
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
    """Network with some normalisation on a device, in the memory order that is fastest there.

    Channels-last, but for instance and group normalisation in float32 or on a CPU, which then spend up to a third of
    their time on copies (`benchmarks/bench_step.py`).
    """
    import torch

    planes = norm in ("inorm", "gnorm") and (precision is None or device.type == "cpu")
    order = torch.contiguous_format if planes else torch.channels_last
    return net.to(device, memory_format=order)  # type: ignore[call-overload]
