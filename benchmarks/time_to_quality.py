"""Draw the scores of the ISBI validation sections against the minutes of training: ours, the original's, MONAI's.

    OMP_NUM_THREADS=1 python benchmarks/time_to_quality.py --save time_to_quality.png

Each point is a whole training, whose schedule ends with its minutes. Minutes are those of the processor, start of the
program included, scoring not, so that other load does not count. Ours and the original's recipe (`RECIPES` of
quality.py) get the epochs that fit, by two short trainings; the recipes of MONAI (`VARIANTS` of monai_recipe.py, named
`monai VARIANT`, left out where the package `monai` is absent) stop by their clock. Each point adds a JSON line to
WORK/points.jsonl and is not trained again; all that are there are drawn.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
from operator import itemgetter
from pathlib import Path

import numpy as np
import tifffile
from monai_recipe import NUM_TRAIN, NUM_VAL, VARIANTS
from quality import ROOT, SCORES, find_row, make_database, run, write_row

sys.path.insert(0, str(ROOT))
from evaluation import metrics
from evaluation.scorers import Challenge

CALIBRATION = 2, 12  # epochs
LABELS = {  # MONAI's: the best of VARIANTS at one minute
    "default": "ours",
    "original": "pytorch-UNET's recipe",
    "monai 256 cosine views bf16 4e-3": "MONAI, best V_Info found",
    "monai dice+ce cosine views bf16 4e-3": "MONAI, best BCE found",
}
MONAI = {f"monai {name}": name for name in VARIANTS}


def main() -> None:
    """Train and score the points that are not there yet, and draw all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=";".join(LABELS), help="names separated by ';'")
    parser.add_argument("--minutes", type=float, nargs="*", default=[0.5, 1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "isbi2012", help="folder of the stacks")
    parser.add_argument("--work", type=Path, default=Path("time_to_quality"), help="folder for the runs")
    parser.add_argument("--save", type=Path, help="PNG to write")
    parser.set_defaults(nch_ker=16, fold="", context=0, flags="", gpu_ids="-1", split="val")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "datasets").is_dir():
        make_database(args)
    recipes = args.recipe.split(";")
    if not importlib.util.find_spec("monai"):
        print("monai is not installed: its rows are left out", file=sys.stderr)
        recipes = [recipe for recipe in recipes if recipe not in MONAI]
    for seed, minutes, recipe in itertools.product(range(args.seeds), args.minutes, recipes):
        make_point(args, recipe, minutes, seed)
    rows = [json.loads(line) for line in (args.work / "points.jsonl").read_text().splitlines()]
    points = sorted((row for row in rows if row["recipe"] in recipes), key=itemgetter("minutes", "recipe", "seed"))
    print(table(points))
    if args.save:
        draw({recipe: [row for row in points if row["recipe"] == recipe] for recipe in recipes}, args.save)


def make_point(args: argparse.Namespace, recipe: str, minutes: float, seed: int) -> None:
    """Train and score once, unless that is done."""
    log, what = args.work / "points.jsonl", {"recipe": recipe, "minutes": minutes, "seed": seed}
    if find_row(log, what):
        return
    if recipe in MONAI:
        found = run_monai(args, recipe, minutes, seed)
    else:
        found = run_ours(args, recipe, num_epoch(args, recipe, minutes), seed)
    write_row(log, what | found)


def run_ours(args: argparse.Namespace, recipe: str, epochs: int, seed: int) -> dict:
    """Train and score a recipe of quality.py."""
    return run(argparse.Namespace(**vars(args) | {"num_epoch": epochs}), recipe, seed)


def num_epoch(args: argparse.Namespace, recipe: str, minutes: float) -> int:
    """Epochs that take so many minutes, start included."""
    short, long = (run_ours(args, recipe, epochs, 0)["cpu_seconds"] for epochs in CALIBRATION)
    per_epoch = (long - short) / (CALIBRATION[1] - CALIBRATION[0])
    return max(1, round(CALIBRATION[0] + (60 * minutes - short) / per_epoch))


def run_monai(args: argparse.Namespace, recipe: str, minutes: float, seed: int) -> dict:
    """Train and score a recipe of MONAI."""
    output = args.work / f"{recipe}-{minutes:g}-{seed}.npy".replace(" ", "_")
    command = [ROOT / "benchmarks" / "monai_recipe.py", "--variant", MONAI[recipe], "--minutes", minutes]
    command += ["--seed", seed, "--data", args.data, "--output", output]
    done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
    labels = tifffile.imread(args.data / "train-labels.tif")[NUM_TRAIN : NUM_TRAIN + NUM_VAL] > 0
    return json.loads(done.stdout.splitlines()[-1]) | score(np.load(output), labels)


def score(probability: np.ndarray, labels: np.ndarray) -> dict:
    """Scores of P(cell) (N, H, W), as those of `--mode test`."""
    rows = [metrics.challenge_scores(*pair) for pair in zip(labels.astype(int), probability, strict=True)]
    best = Challenge(rows).summary()
    of_label = np.where(labels, probability, 1 - probability)
    bce = -float(np.log(np.maximum(of_label, np.finfo(np.float32).tiny)).mean(dtype=np.float64))
    return dict(zip(SCORES, (bce, best["min_pixel_error"], best["max_v_rand"], best["max_v_info"]), strict=True))


def table(points: list[dict]) -> str:
    """Markdown: a row for each point."""
    lines = ["| minutes | recipe | seed | epochs or steps | " + " | ".join(SCORES) + " |", "|---" * 8 + "|"]
    for row in points:
        cells = [f"{row['cpu_seconds'] / 60:.2f}", row["recipe"], row["seed"], row.get("epoch") or row["steps"]]
        lines.append("| " + " | ".join(map(str, [*cells, *(f"{row[name]:.4f}" for name in SCORES)])) + " |")
    return "\n".join(lines)


def draw(recipes: dict[str, list[dict]], path: Path) -> None:
    """Draw both scores: a mark for each point, a line through the means of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure((10, 3.8), layout="constrained")
    for axes, (score, name) in zip(figure.subplots(1, 2), {"v_info": "V_Info", "bce": "BCE"}.items(), strict=True):
        for colour, (recipe, rows) in enumerate(recipes.items()):
            places = [(row["cpu_seconds"] / 60, row[score]) for row in rows]
            budgets = {row["minutes"]: [] for row in rows}
            for row, place in zip(rows, places, strict=True):
                budgets[row["minutes"]].append(place)
            means = [np.mean(seeds, axis=0) for seeds in budgets.values()]
            axes.plot(*np.transpose(means), color=f"C{colour}", label=LABELS.get(recipe, recipe))
            axes.plot(*np.transpose(places), "o", color=f"C{colour}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="minutes of processor time, one thread", ylabel=f"{name}, validation sections")
        axes.grid(alpha=0.3)
    axes.set_yscale("log")  # of BCE
    axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
