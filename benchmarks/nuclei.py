"""Train on fluorescent nuclei and score the objects by the protocol of benchmarks/README.md.

    python benchmarks/nuclei.py --variant full --seeds 3
    python benchmarks/nuclei.py --variant corners --unlabelled --num_epoch 80 --seeds 0 1 2

Images 000-063 train, 064-075 validate, 076 and later ones test. `full` has their numbered objects; `whole` trains on
the images 003, 020 and 041, or on `--num` others, as masks of 0 and 255, and `corners` on the densest 100 x 100 px of
each, both without validation. `--unlabelled` lets the training see the others of 000-063 without their labels. Choices
are made on `--split val`. `--data` is shared/nuclei2018, or a folder of `other_nuclei.py`.
"""

from __future__ import annotations

import argparse
import shutil
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

SPLITS = {"val": slice(64, 76), "test": slice(76, None)}
NUM_TRAIN, MIN_SIZE = 64, 10  # images, [px] of the objects that count
FEW = dict.fromkeys((3, 20, 41, *range(1, NUM_TRAIN, 2)))  # images that are annotated first
IGNORED = 128  # grey level of pixels that are not annotated
WINDOW, STRIDE = 100, 20  # [px] of what is annotated of an image, and of the places that it is chosen from
SCORES = ("f1", "ap_50", "ap_75", "false")


def main() -> None:
    """Train and score the variant, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=("full", "whole", "corners"), default="full")
    parser.add_argument("--unlabelled", action="store_true")
    parser.add_argument("--num", type=int, default=3, help="annotated images of whole and corners")
    parser.add_argument("--num_epoch", type=int, default=100)
    parser.add_argument("--max_minutes", type=float, help="train so long instead")
    parser.add_argument("--nch_ker", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="seeds")
    parser.add_argument("--ensemble", action="store_true", help="score the seeds together, too")
    parser.add_argument("--flags", default="", help="additional flags of main.py")
    parser.add_argument("--split", choices=SPLITS, default="val", help="split to score")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "nuclei2018")
    parser.add_argument("--work", type=Path, default=Path("nuclei"), help="folder for the runs")
    args = parser.parse_args()
    args.data = args.data.resolve()
    name = args.variant if args.variant == "full" else f"{args.variant}{args.num}"
    name += "_unlabelled" if args.unlabelled else ""
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "datasets" / name).is_dir():
        make_database(args, name)
    print(table([run(args, name, seed) for seed in args.seeds]))
    if args.ensemble:
        paths = [list_newest(args.work / "checkpoints" / scope_of(args, seed) / name)[0] for seed in args.seeds]
        print("ensemble:", scores(paths, args.data, split_of(args)))


def make_database(args: argparse.Namespace, name: str) -> None:
    """Make the database of a variant."""
    flags = ["--name_data", name, "--class_names", "background,nucleus"]
    if args.variant == "full":
        source = ["--input", args.data / "images", "--label", args.data / "labels", "--objects", "on"]
        program("run_make_database.py", args.work, *flags, *source, "--num_val", 12, "--num_test", 20)
        return
    few = args.work.resolve() / "few" / name
    annotate(args.data, few, args.variant, list(FEW)[: args.num])
    flags += ["--input", few / "images", "--label", few / "labels", "--num_val", 0, "--num_test", 0]
    flags += ["--ignore", IGNORED] if args.variant == "corners" else []
    others = [args.data / "images" / f"{number:03d}.png" for number in range(NUM_TRAIN)]
    program("run_make_database.py", args.work, *flags, *(["--unlabelled", *others] if args.unlabelled else []))


def annotate(data: Path, few: Path, variant: str, numbers: list[int]) -> None:
    """Write images and masks of 0 and 255; of `corners` only the window with most foreground is annotated."""
    for kind in ("images", "labels"):
        (few / kind).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        name = f"{number:03d}.png"
        mask = np.where(np.array(Image.open(data / "labels" / name)) > 0, 255, 0).astype(np.uint8)
        if variant == "corners":
            rows, columns = (range(0, side - WINDOW, STRIDE) for side in mask.shape)
            windows = [np.s_[y : y + WINDOW, x : x + WINDOW] for y in rows for x in columns]
            window = max(windows, key=lambda window: mask[window].sum())
            inside = mask[window].copy()
            mask[:] = IGNORED
            mask[window] = inside
        Image.fromarray(mask).save(few / "labels" / name)
        shutil.copy(data / "images" / name, few / "images" / name)


def run(args: argparse.Namespace, name: str, seed: int) -> dict:
    """Train and score once, or find it done."""
    length = {"max_minutes": args.max_minutes} if args.max_minutes else {"num_epoch": args.num_epoch}
    what = {"variant": name} | length | {"nch_ker": args.nch_ker, "flags": args.flags, "seed": seed}
    what["split"] = args.split
    if found := find_row(args.work / "runs.jsonl", what):
        return found
    scope = scope_of(args, seed)
    place = ["--name_data", name, "--scope", scope, "--gpu_ids", -1]
    flags = ["--nch_ker", args.nch_ker, "--num_freq_save", 100000, "--seed", seed, *args.flags.split()]
    flags += [part for flag, value in length.items() for part in (f"--{flag}", value)]
    cpu = program("main.py", args.work, "--mode", "train", *place, *flags)
    path = list_newest(args.work / "checkpoints" / scope / name)[0]
    row = what | {"cpu_seconds": round(cpu), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    row |= scores(path, args.data, split_of(args))
    write_row(args.work / "runs.jsonl", row)
    return row


def scope_of(args: argparse.Namespace, seed: int) -> str:
    """Name of a training."""
    number = "-".join(map(str, [args.max_minutes or args.num_epoch, args.nch_ker, seed]))
    return number + args.flags.replace("--", "-").replace(" ", "")


def split_of(args: argparse.Namespace) -> list[Path]:
    """Images of the split to score."""
    return sorted((args.data / "images").glob("*.png"))[SPLITS[args.split]]


def scores(path: Path | str | list[Path], data: Path, files: list[Path]) -> dict:
    """F1 at IoU 0.5, average precision at 0.5 and 0.75, and false objects, pooled over the images, as of predict."""
    predictor, counts = load(path), np.zeros((len(LIMITS), 2))
    false = 0
    for file in files:
        image, label = (np.array(Image.open(data / kind / file.name)) for kind in ("images", "labels"))
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
