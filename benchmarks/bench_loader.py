"""Time the loader alone, from memory and streamed, and watch the memory of a training on 20,000 samples.

    python benchmarks/bench_loader.py            # 20,000 samples of 512x512 px, three epochs: about 8 minutes
    python benchmarks/bench_loader.py --quick    # 500 samples: under a minute

The samples are links to one file. The training has `--nch_ker 2` and crops of 64 px, so that the loader does most of
the work; its resident memory is the sum over its processes after each epoch. One JSON line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import Config
from dataset import PatchDataset
from description import describe, load_info
from samples import list_samples, write_sample
from sources.phantom import em_stack
from training.augment import Augmentation
from training.loader import patch_loader
from training.sampler import BatchSettings

CROP, BATCH = 256, 4


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    num = 500 if args.quick else 20_000
    with tempfile.TemporaryDirectory() as folder:
        database = make_database(Path(folder), num)
        rates = {
            "memory": rate(database, torch.device("cpu"), 0, 96, args.repeats),
            **{f"streamed_{n}": rate(database, None, n, 200, args.repeats) for n in (0, 1, 2)},
        }
        memory = training_memory(Path(folder), num_epoch=3)
    facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "samples": num}
    print(json.dumps(facts | {"samples_per_s": rates, "rss_mb_after_epoch": memory}))


def make_database(folder: Path, num: int) -> Path:
    """`datasets/em` with many links to one sample."""
    database = folder / "datasets" / "em"
    (database / "train").mkdir(parents=True)
    images, labels = em_stack(1, 512, 0)
    label = (labels[0] > 0).astype(np.uint8)
    first = database / "train" / "00000.npy"
    write_sample(first, images[0][..., None], label)
    for number in range(1, num):
        os.link(first, database / "train" / f"{number:05d}.npy")
    info = describe([(images[0][..., None], label)], [0, 255], ["membrane", "cell"])
    (database / "dataset.json").write_text(json.dumps(asdict(info)))
    return database


def rate(database: Path, memory: torch.device | None, num_workers: int, num: int, repeats: int) -> float:
    """Samples per second, read and collated, with the margin of the augmentation."""
    info = load_info(database)
    augment = Augmentation((CROP, CROP), info.num_class, elastic=Config().elastic)
    files = list_samples(database / "train")[:num]
    data = PatchDataset(files, info, labelled=True, memory=memory, margin=augment.margin)
    settings = BatchSettings(augment.crop, BATCH, seed=0)
    loader = patch_loader(data, settings, torch.device("cpu"), num_workers=num_workers)
    seconds = []
    for epoch in range(repeats + 1):
        loader.batch_sampler.set_epoch(epoch)
        start = time.perf_counter()
        for _ in loader:
            pass
        seconds.append(time.perf_counter() - start)
    return round(num / median(seconds[1:]), 1)


def training_memory(folder: Path, num_epoch: int) -> list[float]:
    """Resident memory after each epoch of a training, summed over its processes [MB]."""
    flags = ["--gpu_ids", "-1", "--nch_ker", "2", "--ny_load", "64", "--nx_load", "64", "--cache_gb", "0"]
    flags += ["--num_epoch", str(num_epoch), "--elastic", "2", "--loss", "bce", "--batch_size", "32"]
    command = [sys.executable, str(ROOT / "main.py"), *flags]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment)
    return [resident(process.pid) for line in process.stdout if " left, " in line]


def resident(pid: int) -> float:
    """Private memory of a process and its children, and their part of shared memory [MB]."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    lines: list[str] = []
    for one in pids:
        with suppress(OSError):  # a process that reads may have ended meanwhile
            lines += Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
    return round(sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024, 1)


if __name__ == "__main__":
    main()
