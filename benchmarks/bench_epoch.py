"""Time whole epochs of training, and say which share of the time is spent in the network.

    python benchmarks/bench_epoch.py            # crops of 256 and 512 px, five repeats: about 8 minutes on two cores
    python benchmarks/bench_epoch.py --quick    # crops of 256 px, three repeats: under a minute

24 synthetic images of 512x512 px train and 3 validate, through `Trainer` with all its parts: loader, augmentation,
weight map, average, validation, log. An epoch's time is that of a long run less that of a short one. The network's is
that of the same steps and validations on batches that are there already. Both in turn; one JSON line.
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
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run_make_database
from config import Config
from losses import LOSSES
from model import UNet, fold_norm
from optim import OPTIMS
from train import Trainer, run_epoch
from utils import pick_device, pick_precision

NUM_TRAIN, NUM_VAL, SIZE, BATCH = 24, 3, 512, 4


def main() -> None:
    """Do what the flags say."""
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
        crops, repeats, epochs = ((256,), 3, 4) if args.quick else ((256, 512), 5, 6)
        rows = [measure(crop, args.nch_ker, device, args.gpu_ids, repeats, epochs) for crop in crops]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "device": name}
    print(json.dumps(facts | {"threads": torch.get_num_threads(), "nch_ker": args.nch_ker, "rows": rows}))


def measure(crop: int, nch_ker: int, device: torch.device, gpu_ids: str, repeats: int, epochs: int) -> dict:
    """Seconds of an epoch and of its network."""
    whole, network = [], []
    for _ in range(repeats):
        short, long = (train(crop, nch_ker, device, gpu_ids, num) for num in (1, 1 + epochs))
        whole.append((long - short) / epochs)
        network.append(network_seconds(crop, nch_ker, device, epochs))
    shares = [part / all_ for part, all_ in zip(network, whole, strict=True)]
    row = {"crop": crop, "repeats": repeats, "epoch_s": median(whole), "network_s": median(network)}
    row |= {"share": median(shares), "share_min": min(shares), "share_max": max(shares)}
    return {key: round(value, 3) for key, value in row.items()}


def train(crop: int, nch_ker: int, device: torch.device, gpu_ids: str, num_epoch: int) -> float:
    """Seconds of a run."""
    config = Config(
        nch_ker=nch_ker, ny_load=crop, nx_load=crop, num_epoch=num_epoch, gpu_ids=gpu_ids, num_freq_disp=1000
    )
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(config, device).train()
    return time.perf_counter() - start


def network_seconds(crop: int, nch_ker: int, device: torch.device, epochs: int) -> float:
    """Seconds of the steps and validations of an epoch, with nothing else, after one to warm up."""
    net = UNet(1, 1, nch_ker).to(device, memory_format=torch.channels_last)
    optimizer = OPTIMS["adamw"](net.parameters(), 1e-3, 0.9)
    precision = pick_precision("auto", device)

    def batch(num: int, size: int) -> dict[str, torch.Tensor]:
        label = torch.randint(0, 2, (num, size, size), device=device)
        return {"input": torch.randn(num, 1, size, size, device=device), "label": label, "weight": label + 1.0}

    steps, images = [batch(BATCH, crop)] * (NUM_TRAIN // BATCH), [batch(1, SIZE)] * NUM_VAL
    options = {"criterion": LOSSES["wbce"], "precision": precision}
    for number in range(1 + epochs):
        if number == 1:
            start = time.perf_counter()
        run_epoch(net, steps, optimizer, **options)
        losses = run_epoch(fold_norm(net), images, precision=precision)
        torch.stack(losses).tolist()  # waits for a GPU
    return (time.perf_counter() - start) / epochs


if __name__ == "__main__":
    main()
