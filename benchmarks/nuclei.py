"""Train on fluorescent nuclei and score the objects by the protocol of benchmarks/README.md.

    python benchmarks/nuclei.py --variant full --seeds 3
    python benchmarks/nuclei.py --variant corners --unlabelled --num_epoch 80 --seeds 3

Images 000-063 train, 064-075 validate, 076-095 test. `full` has their numbered objects; `whole` trains on the images
003, 020 and 041 as masks of 0 and 255, and `corners` on the densest 100 x 100 px of each, both without validation.
`--unlabelled` lets the training see the others of 000-063 without their labels. Choices are made on `--split val`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from PIL import Image
from quality import ROOT, find_row, program, write_row

sys.path.insert(0, str(ROOT))
from checkpoint import list_newest
from evaluation.metrics import LIMITS, overlaps
from predict import load, predict_array

SPLITS = {"val": range(64, 76), "test": range(76, 96)}
NUM_TRAIN, MIN_SIZE = 64, 10  # images, [px] of the objects that count
SCORES = ("f1", "ap_50", "ap_75", "false")


def main() -> None:
    """Train and score the variant, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=("full", "whole", "corners"), default="full")
    parser.add_argument("--unlabelled", action="store_true")
    parser.add_argument("--num_epoch", type=int, default=100)
    parser.add_argument("--nch_ker", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="seeds")
    parser.add_argument("--flags", default="", help="additional flags of main.py")
    parser.add_argument("--split", choices=SPLITS, default="val", help="split to score")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "nuclei2018")
    parser.add_argument("--work", type=Path, default=Path("nuclei"), help="folder for the runs")
    args = parser.parse_args()
    args.data = args.data.resolve()
    name = args.variant + ("_unlabelled" if args.unlabelled else "")
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "datasets" / name).is_dir():
        make_database(args, name)
    print(table([run(args, name, seed) for seed in args.seeds]))


def make_database(args: argparse.Namespace, name: str) -> None:
    """Make the database of a variant."""
    flags = ["--name_data", name, "--class_names", "background,nucleus"]
    if args.variant == "full":
        source = ["--input", args.data / "images", "--label", args.data / "labels", "--objects", "on"]
        program("run_make_database.py", args.work, *flags, *source, "--num_val", 12, "--num_test", 20)
        return
    few = args.work.resolve() / "few"
    subprocess.run([sys.executable, args.data / "corners.py", few], check=True)
    flags += ["--input", few / "images", "--label", few / args.variant, "--num_val", 0, "--num_test", 0]
    flags += ["--ignore", 128] if args.variant == "corners" else []
    others = [args.data / "images" / f"{number:03d}.png" for number in range(NUM_TRAIN)]
    program("run_make_database.py", args.work, *flags, *(["--unlabelled", *others] if args.unlabelled else []))


def run(args: argparse.Namespace, name: str, seed: int) -> dict:
    """Train and score once, or find it done."""
    what = {"variant": name, "epochs": args.num_epoch, "nch_ker": args.nch_ker, "flags": args.flags, "seed": seed}
    what["split"] = args.split
    if found := find_row(args.work / "runs.jsonl", what):
        return found
    scope = f"{args.num_epoch}-{args.nch_ker}-{seed}{args.flags.replace('--', '-').replace(' ', '')}"
    place = ["--name_data", name, "--scope", scope, "--gpu_ids", -1]
    length = ["--nch_ker", args.nch_ker, "--num_epoch", args.num_epoch, "--num_freq_save", 100000]
    cpu = program("main.py", args.work, "--mode", "train", *place, *length, "--seed", seed, *args.flags.split())
    path = list_newest(args.work / "checkpoints" / scope / name)[0]
    row = what | {"cpu_seconds": round(cpu), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    row |= scores(path, args.data, SPLITS[args.split])
    write_row(args.work / "runs.jsonl", row)
    return row


def scores(path: Path | str, data: Path, numbers: range) -> dict:
    """F1 at IoU 0.5, average precision at 0.5 and 0.75, and false objects, pooled over the images, as of predict."""
    predictor, counts = load(path), np.zeros((len(LIMITS), 2))
    false = 0
    for number in numbers:
        image, label = (np.array(Image.open(data / kind / f"{number:03d}.png")) for kind in ("images", "labels"))
        cells = predict_array(predictor, image, what="cells").astype(np.int64)
        pairs = overlaps(without_small(label.astype(np.int64)), without_small(cells))
        counts += [pairs.counts(limit) for limit in LIMITS]
        false += int(np.count_nonzero(pairs.proposal_area[1:])) - pairs.counts(LIMITS[0])[0]
    match, total = counts.T
    precision = dict(zip(LIMITS, (match / (total - match)).tolist(), strict=True))
    threshold = {"threshold": predictor.object_threshold, "false": false}
    return threshold | {"f1": float(2 * match[0] / total[0]), "ap_50": precision[0.5], "ap_75": precision[0.75]}


def without_small(objects: np.ndarray) -> np.ndarray:
    """Numbers (H, W) of the objects that count, 0 elsewhere."""
    return np.where((np.bincount(objects.ravel()) >= MIN_SIZE)[objects], objects, 0)


def table(rows: list[dict]) -> str:
    """Markdown: a row for each seed, and their mean."""
    lines = ["| seed | threshold | " + " | ".join(SCORES) + " |", "|---" * (2 + len(SCORES)) + "|"]
    for row in rows:
        lines.append(f"| {row['seed']} | {row['threshold']:g} | " + " | ".join(f"{row[s]:.3f}" for s in SCORES) + " |")
    if len(rows) > 1:
        values = [[row[score] for row in rows] for score in SCORES]
        lines.append("| mean | | " + " | ".join(f"{mean(each):.3f} ± {stdev(each):.3f}" for each in values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
