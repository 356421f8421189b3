"""The processes of one run: which of them this one is, and what they tell each other (torch.distributed)."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Item = TypeVar("Item")


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def num_gpu(gpu_ids: str) -> int:
    """How many of the GPUs of a comma-separated list are there; the list may be `-1`."""
    return sum(0 <= int(number) < torch.cuda.device_count() for number in gpu_ids.split(","))


def restarts() -> int:
    """How often torchrun has started this run again after a process died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def run_id() -> str:
    """Name that torchrun gives to a run and keeps over its restarts; empty without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def launch(num_process: int, argv: list[str]) -> int:
    """Run this program once more in several processes on this machine, and wait for them.

    Parameters
    ----------
    num_process : int
        How many.
    argv : list of str
        The program and its arguments.

    Returns
    -------
    int
        0, or 1 where a process failed.
    """
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_process}"]
    process = subprocess.Popen([*run, *argv])
    while True:
        try:
            return int(process.wait() != 0)
        except KeyboardInterrupt:  # the launcher has got it too, and lets the processes save
            continue


@dataclass(frozen=True)
class World:
    """Place of this process among those of the run.

    Attributes
    ----------
    rank : int
        Its number, from 0.
    size : int
        How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, items: list[Item]) -> list[Item]:
        """Items of all processes, in every process."""
        if self.size == 1:
            return items
        lists: list[list[Item]] = [[] for _ in range(self.size)]
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def total(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def most(self, *values: float) -> list[float]:
        """Greatest of each value over the processes; on the CPU, so that no GPU is waited for."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def same(self, value: Item) -> Item:
        """Value of the first process, in every process."""
        return self.gather([value])[0]

    def wrap(self, net: nn.Module) -> nn.Module:
        """Network whose gradients are averaged over the processes at each step.

        On GPUs batch normalisation takes its statistics over all processes; torch has none that does on CPUs, where
        each process normalises by its own share of the batch and the first one's running statistics count.
        """
        if self.size == 1:
            return net
        if next(net.parameters()).is_cuda:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return nn.parallel.DistributedDataParallel(net)


@contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[World]:
    """Meet the other processes that torchrun started; alone where it did not.

    Parameters
    ----------
    device : torch.device
        What this process computes on.
    timeout : float
        How long to wait for another process before giving up [s].
    """
    if not is_worker():
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = datetime.timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    store = dist.PrefixStore(_agree_on_name(store, rank, size, timeout), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    yield World(rank, size)
    dist.barrier()  # who leaves early takes the store along; after an error the others may not be there to wait for
    dist.destroy_process_group()


def _agree_on_name(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """Name that all processes of this start know and no earlier start used.

    After a restart torchrun hands out the same store (torch 2.11 to 2.13), and a process that reads the address of a
    dead one from it fails. So the first process answers each of the others by the name that only that one has.
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
