"""Draw how a database, a prediction and a training grow with their samples, pixels and processes.

    python benchmarks/bench_growth.py --figure growth.png            # half an hour on two cores
    python benchmarks/bench_growth.py --figure growth.png --quick    # a few minutes

Samples have 64 x 64 px; predictions are single runs of `bench_infer.py`; the training has 24 crops of 256 px an epoch,
instance normalisation, and its processes have one thread each. One JSON line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import bench_infer
import numpy as np
import tifffile

ROOT = Path(__file__).resolve().parent.parent
Points = list[list[float]]  # x, and what was measured there


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--figure", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()
    num_sample = [1, 10, 100, 1000] if args.quick else [1, 10, 100, 1000, 5000, 20000]
    sizes = [512, 1024, 2048] if args.quick else [512, 1024, 2048, 4096, 8192, 16384, 20000]
    growth = {
        "database": [[num, *make_database(num)] for num in num_sample],
        "prediction": [[size, *predict(size)] for size in sizes],
        "training": [[num, train(num, 3 if args.quick else 8)] for num in (1, 2, 3, 4)],
    }
    draw(growth, args.figure)
    facts = {"date": datetime.date.today().isoformat(), "cores": os.cpu_count()}
    print(json.dumps(facts | growth))


def make_database(num: int) -> tuple[float, float]:
    """Seconds and peak memory [MB] of `run_make_database.py` on so many small images."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for name in ("images", "labels"):
            (Path(folder) / name).mkdir()
        for number in range(num):
            label = np.kron(rng.integers(0, 2, (4, 4), np.uint8) * 255, np.ones((16, 16), np.uint8))
            image = rng.integers(0, 128, (64, 64), np.uint8) + label // 2
            tifffile.imwrite(Path(folder) / "images" / f"{number}.tif", image)
            tifffile.imwrite(Path(folder) / "labels" / f"{number}.tif", label)
        flags = ["--input", "images", "--label", "labels", "--num_val", 0, "--num_test", 0]
        return bench_infer.measured(folder, "run_make_database.py", *flags)


def predict(size: int) -> tuple[float, float]:
    """Seconds and peak memory [MB] of `--mode predict` of an image."""
    with tempfile.TemporaryDirectory() as folder:
        bench_infer.save_network(Path(folder), 16)
        return bench_infer.predict(folder, size, "off", argparse.Namespace(ending=".tif", gpu_ids="-1"))


def train(num_process: int, num_epoch: int) -> float:
    """Crops a second, median of the epochs after the first."""
    with tempfile.TemporaryDirectory() as folder:
        bench_infer.measured(folder, "run_make_database.py", "--synthetic", 24, "--num_val", 0, "--num_test", 0)
        flags = ["--mode", "train", "--gpu_ids", "-1", "--norm", "inorm", "--nch_ker", "16", "--batch_size", "12"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_process}"]
        done = subprocess.run(
            [*command, str(ROOT / "main.py"), *flags, "--num_epoch", str(num_epoch)],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
    return median(float(speed) for speed in re.findall(r"images_per_second ([\d.]+)", done.stdout)[1:])


def draw(growth: dict[str, Points], path: Path) -> None:
    """Draw each time against its size, next to a line through the largest that is proportional to the size."""
    from matplotlib.figure import Figure

    figure = Figure((11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    database, prediction, training = (np.array(points, float) for points in growth.values())
    draw_log(axes[0], database[:, 0], database[:, 1], "samples of 64 x 64 px", "database [s]")
    draw_log(axes[1], prediction[:, 0] ** 2 / 1e6, prediction[:, 1], "megapixels", "prediction [s]")
    draw_log(axes[1].twinx(), prediction[:, 0] ** 2 / 1e6, prediction[:, 2], "", "peak memory [MB]", colour="C1")
    axes[2].plot(training[:, 0], training[:, 1] / training[0, 1], "o-")
    axes[2].plot(training[:, 0], np.minimum(training[:, 0], os.cpu_count() or 1), "--", color="grey", label="the cores")
    axes[2].set(xlabel="processes", ylabel="speed of training, of one process", ylim=(0, None), xticks=training[:, 0])
    axes[2].legend()
    figure.savefig(path, dpi=100)


def draw_log(axes: object, x: np.ndarray, y: np.ndarray, xlabel: str, ylabel: str, colour: str = "C0") -> None:
    """Draw a curve on logarithmic axes; the time also against the line in proportion to the last point."""
    axes.loglog(x, y, "o-", color=colour)
    if colour == "C0":
        axes.loglog(x, y[-1] * x / x[-1], "--", color="grey", label="in proportion to the largest")
        axes.legend()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel, color=colour)
    axes.set_ylim(bottom=min(y) / 3)


if __name__ == "__main__":
    main()
