"""Time the start: `main.py --help`, and `--mode train` until its first step is done, Python and torch included.

    python benchmarks/bench_start.py            # five repeats: about half a minute
    python benchmarks/bench_start.py --quick    # two

24 synthetic images of 512x512 px; the first training, which also computes the weight maps, is listed separately. One
JSON line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent

TRAIN = """
import os, sys
sys.path.insert(0, {root!r})
import main, train
step = train._step
def first(*args):
    step(*args)
    os._exit(0)
train._step = first
main.main(sys.argv[1:])
"""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--nch_ker", type=int, default=16)
    parser.add_argument("--gpu_ids", default="-1")
    args = parser.parse_args()
    repeats = 2 if args.quick else 5
    train = ["-c", TRAIN.format(root=str(ROOT)), "--nch_ker", args.nch_ker, "--gpu_ids", args.gpu_ids]
    with tempfile.TemporaryDirectory() as folder:
        seconds(folder, ROOT / "run_make_database.py", "--synthetic", 24, "--size", 512, "--num_val", 0)
        row = {"help_s": [seconds(folder, ROOT / "main.py", "--help") for _ in range(repeats)]}
        row |= {"first_training_s": [seconds(folder, *train)]}
        row |= {"first_step_s": [seconds(folder, *train) for _ in range(repeats)]}
    facts = {"date": datetime.date.today().isoformat(), "nch_ker": args.nch_ker, "repeats": repeats}
    print(json.dumps(facts | {name: round(median(values), 2) for name, values in row.items()}))


def seconds(folder: str, *command: object) -> float:
    """Seconds of one Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
