"""Time `main.py --mode predict` against the size of the image, and measure its peak memory.

    python benchmarks/bench_infer.py             # 512 to 20,000 px: about 15 minutes on two cores
    python benchmarks/bench_infer.py --quick     # 512 to 2048 px: under a minute
    python benchmarks/bench_infer.py --sizes 20000

Each run is one process, from start to end, that reads and writes 8-bit TIFF; the time of a tiny image is subtracted.
Sizes up to 4096 px run five times, alternating with the other sizes, larger ones once; test-time augmentation only up
to 1024 px. One JSON line: median, minimum and maximum of the seconds and of the peak memory.
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
from pathlib import Path
from statistics import median

import numpy as np
import tifffile
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint
from description import DataInfo
from model import UNet


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--nch_ker", type=int, default=16)
    parser.add_argument("--gpu_ids", default="-1")
    parser.add_argument("--sizes", type=int, nargs="*", help="heights and widths [px]")
    parser.add_argument("--ending", default=".tif", help="suffix of the output: .tif, .npy or .zarr")
    args = parser.parse_args()
    sizes = args.sizes or ([512, 1024, 2048] if args.quick else [512, 1024, 2048, 4096, 8192, 16384, 20000])
    cases = [(size, tta) for size in (64, *sizes) for tta in ("off", "on") if tta == "off" or 64 < size <= 1024]
    small, large = ([case for case in cases if (case[0] <= 4096) == is_small] for is_small in (True, False))
    runs: dict[tuple, list[tuple[float, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        save_network(Path(folder), args.nch_ker)
        for size, tta in small * (2 if args.quick else 5) + large:  # a child's peak is at least its parent's
            runs[size, tta].append(predict(folder, size, tta, args))
            print(size, tta, *(round(value, 1) for value in runs[size, tta][-1]), file=sys.stderr, flush=True)
    start = median(seconds for seconds, _ in runs.pop((64, "off")))
    rows = [row(*case, start, *zip(*done, strict=True)) for case, done in runs.items()]
    facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "nch_ker": args.nch_ker}
    print(json.dumps(facts | {"threads": torch.get_num_threads(), "start_s": round(start, 1), "rows": rows}))


def row(size: int, tta: str, start: float, seconds: tuple[float, ...], memory: tuple[float, ...]) -> dict:
    """Median, minimum and maximum over the runs of a case; the seconds per megapixel are without the start."""
    values = {"s": seconds, "s_per_mpx": [(s - start) / (size / 1024) ** 2 for s in seconds], "peak_mb": memory}
    numbers = {name: [round(f(v), 3) for f in (median, min, max)] for name, v in values.items()}
    return {"size": size, "tta": tta, "repeats": len(seconds)} | numbers


def save_network(folder: Path, nch_ker: int) -> None:
    """A checkpoint with random weights."""
    net = UNet(1, 1, nch_ker)
    info = DataInfo(1, [0, 255], ["membrane", "cell"], [0.2, 0.8], [128.0], [50.0], [0, 255], "image")
    path = checkpoint.path_of(folder / "checkpoints" / "unet" / "em", 1)
    state = {"net": net.state_dict(), "optim": {}, "arch": net.arguments, "config": {}}
    checkpoint.Checkpoint(**state, info=info, epoch=1, epoch_complete=True).save(path)


def predict(folder: str, size: int, tta: str, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds and peak memory [MB] of one run."""
    source, target = Path(folder) / "in.tif", Path(folder) / f"out{args.ending}"
    image = tifffile.memmap(source, shape=(size, size), dtype=np.uint8, photometric="minisblack")
    rng = np.random.default_rng(0)
    for top in range(0, size, 256):
        image[top : top + 256] = rng.integers(0, 255, image[top : top + 256].shape, np.uint8)
    image.flush()
    del image
    flags = ["--mode", "predict", "--gpu_ids", args.gpu_ids, "--tta", tta, "--input", str(source)]
    return measured(folder, "main.py", *flags, "--output", target)


def measured(folder: str, *command: object) -> tuple[float, float]:
    """Seconds and peak memory [MB] of one of the project's programs."""
    name, *flags = map(str, command)
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, ROOT / name, *flags], cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} {' '.join(flags)} ended with {process.returncode}")
    return time.perf_counter() - begin, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
