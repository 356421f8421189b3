"""The device that a network runs on, its precision there, and whether torchrun started this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from utils import FlagError, UserError, echo

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


@dataclass(frozen=True)
class Abilities:
    """What a kind of device can do for this program."""

    bfloat16: Callable[[torch.device], bool]  # whether it has instructions for it; without, that is slower than float32
    free_memory: Callable[[torch.device], int] | None = None  # [byte]; None: it shares that of the machine
    autocast: bool = True  # mixed precision; without, float32 throughout
    augments: bool = True  # has all operators of training/augment.py, and float64
    channels_last: bool = True
    pinned: bool = False  # copies from pinned memory without waiting
    compiles: bool = False  # torch.compile saves time
    backend: str = "gloo"  # of torch.distributed; with another one, batch normalisation is over all processes


def _cpu_bfloat16(_: torch.device) -> bool:
    import torch

    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16", False) or can.get("amx_tile", False))


def _cuda_bfloat16(device: torch.device) -> bool:
    import torch

    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def _cuda_memory(device: torch.device) -> int:
    import torch

    return torch.cuda.mem_get_info(device)[0]


ABILITIES = {
    "cpu": Abilities(_cpu_bfloat16),
    "cuda": Abilities(_cuda_bfloat16, _cuda_memory, pinned=True, compiles=True, backend="cpu:gloo,cuda:nccl"),
    # not measured yet
    "mps": Abilities(lambda _: False, autocast=False, augments=False, channels_last=False),
}


def abilities(device: torch.device) -> Abilities:
    """What a device can do."""
    return ABILITIES[device.type]


def gpu_numbers(gpu_ids: str) -> list[int]:
    """Numbers of a comma-separated list of GPUs; empty for the CPU and for Apple's GPU."""
    return [] if gpu_ids.strip() in ("-1", "mps") else [int(number) for number in gpu_ids.split(",")]


def pick_device(gpu_ids: str) -> torch.device:
    """Device that the network runs on: `-1` is the CPU, `mps` Apple's GPU, else the first of a list of GPU numbers.

    A process of torchrun gets the entry at its local rank, or if the list is shorter than the number of processes, the
    GPU with the number of its local rank. Without such a GPU it is the CPU, and a line is printed.
    """
    import torch

    rank, num_process = (int(os.environ[name]) for name in LAUNCHED[2:]) if is_worker() else (0, 1)
    has_mps = torch.backends.mps.is_available()
    if gpu_ids.strip() == "mps":
        if not has_mps or num_process > 1:
            rule = "one process can use it" if has_mps else "this machine, or its PyTorch, has none"
            raise FlagError(f"--gpu_ids mps is the GPU of Apple's processors: {rule}: give --gpu_ids -1 for the CPU")
        return torch.device("mps")
    numbers = gpu_numbers(gpu_ids)
    if not numbers:
        return torch.device("cpu")
    number = numbers[rank] if len(numbers) >= num_process else rank
    if number < torch.cuda.device_count():
        return torch.device("cuda", number)
    if rank == 0:
        other = ", or --gpu_ids mps for Apple's GPU" if has_mps else ""
        what = f"no GPU {number} here, running on the CPU: to choose that, give --gpu_ids -1{other}"
        if gpu_ids == "0":  # the default
            echo(f"note: {what}")
        else:
            echo(f"warning: --gpu_ids {gpu_ids}: {what}", sys.stderr)
    return torch.device("cpu")


def pick_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """Data type for `torch.autocast`, None for float32 throughout.

    `auto` is bfloat16 if the device has instructions for it; without them it is slower than float32. Weights,
    normalisation statistics, losses and probabilities stay float32.
    """
    import torch

    if amp == "auto":
        return torch.bfloat16 if abilities(device).bfloat16(device) else None
    if amp != "off" and not abilities(device).autocast:
        raise FlagError(f"--amp {amp}: networks run in float32 on {device.type}: leave it out")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def to_device(net: Network, norm: str, device: torch.device, precision: torch.dtype | None) -> Network:
    """Network with some normalisation on a device, in the memory order that is fastest there.

    Channels-last, but for instance and group normalisation in float32 or on a CPU, which then spend up to a third of
    their time on copies (`benchmarks/bench_step.py`).
    """
    import torch

    planes = norm in ("inorm", "gnorm") and (precision is None or device.type == "cpu")
    planes = planes or not abilities(device).channels_last
    order = torch.contiguous_format if planes else torch.channels_last
    return net.to(device, memory_format=order)  # type: ignore[call-overload]
