"""The processes of one run, and their communication by torch.distributed."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from device import abilities, gpu_numbers, is_worker
from exchange import finish_exchange, reading
from signals import ENDING
from utils import FlagError

Item = TypeVar("Item")


def num_gpu(gpu_ids: str) -> int:
    """Number of GPUs in a comma-separated list; all of them must exist, or none."""
    numbers = gpu_numbers(gpu_ids)
    missing = [number for number in numbers if number >= torch.cuda.device_count()]
    if missing and len(missing) < len(numbers):
        what = f"no GPU {', '.join(map(str, missing))} here, there are {torch.cuda.device_count()}"
        raise FlagError(f"--gpu_ids {gpu_ids}: {what}: name those that are there")
    return len(numbers) - len(missing)


def is_restarted() -> bool:
    """Whether torchrun has started this run again after a process died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launch(num_process: int, argv: list[str]) -> int:
    """Run a program and its arguments in several processes on this machine, and wait for them.

    Returns 0, 1 if a process failed, or 128 plus the number of the signal that ended them.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_process}"]
    received: list[int] = []
    process: subprocess.Popen | None = None

    def note(signum: int, _frame: object) -> None:
        received.append(signum)
        if process and signum != signal.SIGINT:  # Ctrl-C reaches the launcher too, which lets the processes save
            process.send_signal(signum)

    for signum in (signal.SIGINT, *ENDING):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, note)
    if not received:
        process = subprocess.Popen([*torchrun, *argv])
    status = int(process is not None and process.wait() != 0)
    return 128 + received[0] if received else status


@dataclass(frozen=True)
class World:
    """Processes of a run, and which of them this one is."""

    rank: int = 0  # number of this process, from 0
    size: int = 1  # number of processes
    launcher: int = 0  # process id of the torchrun that started this process; 0: without torchrun

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Consecutive items that are this process's; the numbers of two processes differ by one at most.

        >>> [World(rank, 2).share([5, 6, 7]) for rank in (0, 1)]
        [[5], [6, 7]]
        """
        first, last = (rank * len(items) // self.size for rank in (self.rank, self.rank + 1))
        return items[first:last]

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def is_orphaned(self) -> bool:
        """Whether the launcher has died, so that nothing would stop this process or read its exit status."""
        return bool(self.launcher) and os.getppid() != self.launcher

    def gather(self, items: list[Item]) -> list[Item]:
        """Items of all processes, in every process."""
        if self.size == 1:
            return items
        lists: list[list[Item]] = [[] for _ in range(self.size)]
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, *values: float) -> list[float]:
        """Element-wise maximum over the processes; computed on the CPU, to avoid waiting for a GPU."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def broadcast(self, value: Item) -> Item:
        """Value of the first process, in every process."""
        return self.gather([value])[0]

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        self.gather([None])

    @contextmanager
    def reading(self, folder: Path, entries: Mapping[str, str], advice: str) -> Iterator[None]:
        """While entered, a folder is complete and other programs can't replace its entries; see `files.reading`."""
        if self.is_main:
            finish_exchange(folder, entries)
        self.barrier()
        with reading(folder, entries, advice):
            yield

    def wrap(self, net: nn.Module) -> nn.Module:
        """Network whose gradients are averaged over the processes at each step.

        On GPUs the statistics of batch normalisation are taken over all processes. Torch can't do that on CPUs: there
        each process normalises its own part of the batch, and the running statistics are those of the first process.
        """
        if self.size == 1:
            return net
        if abilities(next(net.parameters()).device).backend != "gloo":
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return nn.parallel.DistributedDataParallel(net)


@contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[World]:
    """Connect to the other processes that torchrun started, if there are any; waits at most `timeout` [s] for each."""
    if device.index is not None:  # as only those of CUDA have
        torch.cuda.set_device(device)
    if not is_worker():
        yield World()
        return
    launcher = os.getppid()
    backend = abilities(device).backend
    limit = datetime.timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    store = dist.PrefixStore(_agree_on_name(store, rank, size, timeout), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    yield World(rank, size, launcher)
    dist.barrier()  # the store ends with its process; no barrier after an error, when others may be gone
    dist.destroy_process_group()


def _agree_on_name(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """Name that the processes agree on after each start, and that no earlier start used.

    After a restart torchrun reuses the store (torch 2.11 to 2.13), and a process that reads the address of a dead one
    from it fails. So each process draws a random name, and the first process sends its own to the others under theirs.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"here/{rank}", own)
        name = store.get(f"answer/{own}").decode()  # waits
        store.set(f"joined/{name}/{rank}", "")
        return name
    missing, end = set(range(1, size)), time.monotonic() + timeout
    while missing and time.monotonic() < end:
        for other in sorted(missing):
            if store.check([f"here/{other}"]):
                store.set(f"answer/{store.get(f'here/{other}').decode()}", own)
            if store.check([f"joined/{own}/{other}"]):
                missing.remove(other)
        time.sleep(0.02)
    return own
