"""Time whole epochs of training, and the fraction of the time spent in the network.

    python benchmarks/bench_epoch.py            # crops of 256 and 512 px, five repeats: about 6 minutes on two cores
    python benchmarks/bench_epoch.py --quick    # crops of 256 px, two repeats: under a minute

24 synthetic images of 512x512 px train and 3 validate, through `Trainer` with all its parts: loader, augmentation,
weight map, average, validation, log; ten epochs after the first, one of which logs pictures. The network's time is that
of `train_step` without waiting for batches and without what follows a step (average). One JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run_make_database
import train as train_module
from config import Config
from device import pick_device

NUM_TRAIN, NUM_VAL, SIZE, EPOCHS = 24, 3, 512, 10


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--nch_ker", type=int, default=16)
    parser.add_argument("--gpu_ids", default="-1")
    args = parser.parse_args()
    device = pick_device(args.gpu_ids)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        flags = ["--synthetic", str(NUM_TRAIN + NUM_VAL), "--size", str(SIZE), "--num_val", str(NUM_VAL)]
        with contextlib.redirect_stdout(io.StringIO()):
            run_make_database.main([*flags, "--num_test", "0"])
        crops, repeats = ((256,), 2) if args.quick else ((256, 512), 5)
        rows = [measure(crop, args.nch_ker, device, args.gpu_ids, repeats) for crop in crops]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "device": name}
    print(json.dumps(facts | {"threads": torch.get_num_threads(), "nch_ker": args.nch_ker, "rows": rows}))


def measure(crop: int, nch_ker: int, device: torch.device, gpu_ids: str, repeats: int) -> dict:
    """Seconds per epoch and in its network, and the fraction of the latter."""
    whole, network = zip(*(train(crop, nch_ker, device, gpu_ids) for _ in range(repeats)), strict=True)
    shares = [part / all_ for part, all_ in zip(network, whole, strict=True)]
    row = {"crop": crop, "repeats": repeats, "epoch_s": median(whole), "network_s": median(network)}
    row |= {"share": median(shares), "share_min": min(shares), "share_max": max(shares)}
    return {key: round(value, 3) for key, value in row.items()}


def train(crop: int, nch_ker: int, device: torch.device, gpu_ids: str) -> tuple[float, float]:
    """Seconds per epoch and in its network, mean without the first and the last epoch, which scores and saves."""
    size = {"nch_ker": nch_ker, "ny_load": crop, "nx_load": crop}
    config = Config(**size, num_epoch=EPOCHS + 2, gpu_ids=gpu_ids, train_continue=False)
    stopwatch = Stopwatch(train_module.train_step)
    train_module.train_step = stopwatch.train_step
    with contextlib.redirect_stdout(io.StringIO()):
        train_module.Trainer(config, device).train()
    train_module.train_step = stopwatch.original
    starts, network = (np.reshape(times, (EPOCHS + 2, -1)) for times in (stopwatch.starts, stopwatch.seconds))
    return float(starts[-1, 0] - starts[1, 0]) / EPOCHS, float(network[1:-1].sum()) / EPOCHS


class Stopwatch:
    """Times each `train_step`: not the waiting for batches, nor what follows a step."""

    def __init__(self, original: Callable) -> None:
        self.original = original
        self.starts: list[float] = []
        self.seconds: list[float] = []

    def train_step(self, net: Any, batch: dict, *more: Any, **recipe: Any) -> torch.Tensor:
        """The original `train_step`, timed."""
        start = time.perf_counter()
        loss = self.original(net, batch, *more, **recipe)
        if batch["input"].is_cuda:
            torch.cuda.synchronize()
        self.starts.append(start)
        self.seconds.append(time.perf_counter() - start)
        return loss


if __name__ == "__main__":
    main()
