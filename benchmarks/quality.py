"""Train and score recipes on the ISBI 2012 stack by the protocol of benchmarks/README.md, and print the table.

    python benchmarks/quality.py --minutes 10 --nch_ker 16 --seeds 3 --recipe default

Sections 0-20 train, 21-23 validate, 24-29 test. Choices are made on `--split val`; `--split test` is for the end.
Each run adds a JSON line to WORK/runs.jsonl; a finished run is not trained again, so that a table can
be made in several sessions. To run two in parallel, give each OMP_NUM_THREADS=1, and --num_epoch instead of --minutes.
The five folds are five calls: --fold 1/5 --work fold1 and so on; in each, six sections are tested and six validate.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent

ORIGINAL = (
    "--loss bce --normalize data --norm inorm --init normal --optim adam --lr 1e-4 --beta1 0.5 --schedule constant"
    " --average 0 --turn off --elastic 0 --brightness 0 --contrast 0 --tta off"
)
PAPER = (
    "--normalize data --norm none --pool max --dropout 0.5 --optim sgd --beta1 0.99 --lr 1e-3 --schedule constant"
    " --average 0 --batch_size 1 --loss wbce --w0 10 --balance on --brightness 0 --contrast 0 --elastic_share 1"
)
RECIPES = {
    "default": "",
    "original": ORIGINAL,
    "paper": PAPER,
    "normalize data": "--normalize data",
    "amp off": "--amp off",
    "inorm": "--norm inorm",
    "gnorm": "--norm gnorm",
    "max pooling": "--pool max",
    "dropout 0.5": "--dropout 0.5",
    "batch 2": "--batch_size 2",
    "batch 8": "--batch_size 8",
    "crop 384": "--ny_load 384 --nx_load 384 --batch_size 2",
    "crop 512": "--ny_load 512 --nx_load 512 --batch_size 1",
    "crop 128": "--ny_load 128 --nx_load 128 --batch_size 16",
    "lr 5e-4": "--lr 5e-4",
    "lr 1e-3": "--lr 1e-3",
    "lr 4e-3": "--lr 4e-3",
    "warmup 0.05": "--warmup 0.05",
    "constant": "--schedule constant",
    "adam": "--optim adam",
    "sgd": "--optim sgd --lr 0.05",
    "clip 1": "--clip 1",
    "average 0": "--average 0",
    "average 0.999": "--average 0.999",
    "bce": "--loss bce",
    "w0 10": "--w0 10",
    "balance": "--balance on",
    "balance, w0 0": "--balance on --w0 0",
    "balance, w0 10": "--balance on --w0 10",
    "dice": "--loss dice",
    "bce+dice": "--loss bce+dice",
    "elastic 0": "--elastic 0",
    "elastic 15": "--elastic 15",
    "elastic always": "--elastic_share 1",
    "elastic 10, grid 5": "--elastic_grid 5",
    "brightness, contrast 0": "--brightness 0 --contrast 0",
    "brightness, contrast 0.5": "--brightness 0.5 --contrast 0.4",
    "gamma 0.3": "--gamma 0.3",
    "blur 1": "--blur 1",
    "noise 0.2": "--noise 0.2",
    "turn off": "--turn off",
}
SCORES = ("bce", "pixel_error", "v_rand", "v_info")


def main() -> None:
    """Train and score the recipes, and print the table."""
    parser = run_parser(__doc__, "quality")
    parser.add_argument("--recipe", default="default", help=f"names separated by ';': {'; '.join(RECIPES)}")
    parser.add_argument(
        "--fold", default="", help="K/N, as of run_make_database.py, instead of the protocol; needs its own --work"
    )
    parser.add_argument(
        "--context", type=int, default=0, help="--context of run_make_database.py; needs its own --work"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "datasets").is_dir():
        make_database(args)
    runs = [run(args, recipe.strip(), seed) for seed in range(args.seeds) for recipe in args.recipe.split(";")]
    print(table(runs))


def run_parser(description: str | None, work: str) -> argparse.ArgumentParser:
    """Parser of the flags that `run` needs, with the default folder for the runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="minutes of training for each run")
    parser.add_argument("--num_epoch", type=int, default=0, help="epochs of training instead of --minutes")
    parser.add_argument("--nch_ker", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--flags", default="", help="additional flags of main.py for every run")
    parser.add_argument("--gpu_ids", default="-1")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="split to score")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "isbi2012", help="folder of the stacks")
    parser.add_argument("--work", type=Path, default=Path(work), help="folder for the runs")
    return parser


def make_database(args: argparse.Namespace) -> None:
    """Split the stack as the protocol, or a fold, says."""
    data = args.data.resolve()  # the program runs in another folder
    stacks = ["--input", data / "train-volume.tif", "--label", data / "train-labels.tif"]
    split = ["--fold", args.fold] if args.fold else ["--num_val", 3, "--num_test", 6]
    names = ["--class_names", "membrane,cell"]
    program("run_make_database.py", args.work, *stacks, *split, "--context", args.context, *names)


def run(args: argparse.Namespace, recipe: str, seed: int) -> dict:
    """Train and score once, or find it done."""
    length = ["--num_epoch", args.num_epoch] if args.num_epoch else ["--max_minutes", args.minutes]
    flags = f"{RECIPES[recipe]} {args.flags}".split()
    what = {"recipe": recipe, "flags": flags, "length": length, "nch_ker": args.nch_ker, "seed": seed}
    log = args.work / "runs.jsonl"
    if found := find_row(log, what | {"split": args.split}):
        return found
    scope = f"{recipe}-{length[1]}-{seed}".translate(str.maketrans(" ,+", "___"))
    place = ["--scope", scope, "--gpu_ids", args.gpu_ids]
    start = time.perf_counter()
    train = ["--nch_ker", args.nch_ker, *length, *flags, "--seed", seed]
    cpu = program("main.py", args.work, "--mode", "train", *place, "--num_freq_save", 100000, *train)
    seconds = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(cpu, 1)}
    views = ["--tta", "off"] if "--tta off" in RECIPES[recipe] else []
    program("main.py", args.work, "--mode", "test", *place, "--split", args.split, *views)
    row = what | {"split": args.split} | seconds | scores(args.work / "results" / scope / "em")
    row |= {"date": datetime.date.today().isoformat(), "machine": platform.processor() or platform.machine()}
    write_row(log, row)
    return row


def find_row(log: Path, what: dict) -> dict | None:
    """First row of a log of JSON lines with these values."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return next((row for row in rows if row.items() >= what.items()), None)


def write_row(log: Path, row: dict) -> None:
    """Add a row to a log, and print it."""
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), file=sys.stderr, flush=True)


def scores(folder: Path) -> dict:
    """Scores of a test: BCE at the network's own probabilities, the others the best of nine thresholds."""
    metrics = json.loads((folder / "metrics.json").read_text())
    best = metrics["challenge"]
    values = metrics["mean"]["loss"], best["min_pixel_error"], best["max_v_rand"], best["max_v_info"]
    return dict(zip(SCORES, values, strict=True)) | {"epoch": metrics["epoch"]}


def program(name: str, work: Path, *flags: object) -> float:
    """Run one of the project's programs in the folder of the runs, and return its processor time [s]."""
    before = os.times()
    with (work / "log.txt").open("a") as log:
        subprocess.run([sys.executable, ROOT / name, *map(str, flags)], cwd=work, stdout=log, stderr=log, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def table(runs: list[dict]) -> str:
    """Markdown: a row for each recipe, mean and standard deviation over the seeds."""
    lines = ["| recipe | seeds | epochs | " + " | ".join(SCORES) + " |", "|---" * (3 + len(SCORES)) + "|"]
    for recipe in dict.fromkeys(row["recipe"] for row in runs):
        rows = [row for row in runs if row["recipe"] == recipe]
        cells = [recipe, str(len(rows)), f"{mean(row['epoch'] for row in rows):.0f}"]
        for score in SCORES:
            values = [row[score] for row in rows]
            cells.append(f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
