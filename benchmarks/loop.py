"""Which images to annotate next: object F1 after each round of the loop, for several orders of the images.

    python benchmarks/loop.py ../shared/nuclei2018 --orders random --seeds 5
    python benchmarks/loop.py ../shared/nuclei2018 --orders names,entropy-top,tta-near,errors --seeds 1
    python benchmarks/loop.py ../shared/nuclei2018 --figure img/annotate_next.png

Of the images and numbered labels in the folder the first 64 are the pool, the last 20 the test. Two images train a
network, then two more are added, eight times: at random, in the order of their names, by the errors that the network
makes of them, which only the labels tell, or by the rank of an uncertainty: a measure (entropy of the probability,
disagreement of four views of the image or of two networks) and how the pixels become a number (mean of all, of those
near predicted objects, of the highest hundredth). Each round is a training of its own, of equal length, without
validation images; object F1 is pooled over the test images at the threshold 0.5, without test-time augmentation.
Adds a JSON line per round to WORK/rounds.jsonl; a finished round is not computed again. A seed has the same two first
images in each order but that of the names.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from scipy import ndimage
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main as program
import run_make_database
from evaluation.metrics import object_scores
from images.readers import Frame, list_frames
from predict import load, predict_array
from prediction.predictor import Predictor

NUM_POOL, NUM_TEST, NUM_ROUND, ADDED = 64, 20, 8, 2
TRAINING = "--nch_ker 8 --ny_load 128 --nx_load 128 --num_epoch 10 --num_crop 30 --gpu_ids -1 --train_continue off"
NEAR = 5  # [px] around the predicted objects
OF_PIXELS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {  # of uncertainties (H, W) and pixels near objects
    "mean": lambda values, near: values.mean(),
    "near": lambda values, near: values[near].mean(),
    "top": lambda values, near: np.sort(values, axis=None)[-values.size // 100 :].mean(),
}
Pairs = list[tuple[Frame, Frame]]


def main() -> None:
    """Do what the flags say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with images/ and labels/")
    parser.add_argument("--work", type=Path, default=Path("loop"))
    parser.add_argument("--orders", default="random")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    log = args.work / "rounds.jsonl"
    if args.figure:
        return draw(read(log), args.figure)
    pairs = [*zip(*(list_frames(str(args.data / name)) for name in ("images", "labels")), strict=True)]
    for seed in range(args.seeds):
        for order in args.orders.split(","):
            run(args.work, log, pairs, order, seed)


def read(log: Path) -> list[dict]:
    """Rounds until now."""
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.is_file() else []


def run(work: Path, log: Path, pairs: Pairs, order: str, seed: int) -> None:
    """All rounds of one order."""
    shuffled = np.random.default_rng(seed).permutation(NUM_POOL).tolist()
    if order == "names":
        shuffled.sort()
    chosen = shuffled[:ADDED]
    for number in range(NUM_ROUND + 1):
        key = {"order": order, "seed": seed, "round": number}
        row = next((old for old in read(log) if key.items() <= old.items()), None)
        if row is None:
            row = key | {"chosen": chosen} | one_round(work, pairs, chosen, order, seed)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(order, seed, number, row["f1"], flush=True)
        rest = row.get("ranking") or [k for k in shuffled if k not in chosen]
        chosen = chosen + rest[:ADDED]


def one_round(work: Path, pairs: Pairs, chosen: list[int], order: str, seed: int) -> dict:
    """Train on the chosen images, score the test images, and rank the others of the pool if the order needs it."""
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "checkpoint", ignore_errors=True)
    where = ["--name_data", "loop", "--dir_data", work / "datasets"]
    files = [[pairs[k][side].path for k in sorted(chosen)] for side in (0, 1)]
    none = ["--num_val", 0, "--num_test", 0]
    call(run_make_database.main, *where, "--input", *files[0], "--label", *files[1], "--objects", *none, "--overwrite")
    nets = []
    for k in range(2 if order.startswith("ensemble") else 1):
        folders = [f"--dir_{name}={work / name}" for name in ("checkpoint", "log", "result")]
        call(program.main, *where, *folders, "--scope", f"net{k}", "--seed", seed + 100 * k, *TRAINING.split())
        nets.append(load(next((work / "checkpoint" / f"net{k}" / "loop").glob("*.pth")), amp="auto"))
    judged = [errors_of(nets[0], pair) for pair in pairs[-NUM_TEST:]]
    row: dict = {"f1": round(1 - sum(wrong for wrong, _ in judged) / sum(num for _, num in judged), 4)}
    if order in ("random", "names"):
        return row
    rest = [k for k in range(NUM_POOL) if k not in chosen]
    wrong = [errors_of(nets[0], pairs[k])[0] for k in rest]
    values = wrong if order == "errors" else [uncertainty(nets, pairs[k][0].read()[..., 0], order) for k in rest]
    ranking = [rest[k] for k in np.argsort(-np.array(values), kind="stable")]
    return row | {"ranking": ranking, "correlation": round(float(spearmanr(values, wrong).statistic), 3)}


def call(main: Callable, *flags: object) -> None:
    """Run a program of the project."""
    if main([*map(str, flags)]):
        sys.exit(1)


def errors_of(net: Predictor, pair: tuple[Frame, Frame]) -> tuple[float, int]:
    """Missed and added objects of an image, and the number of objects in its label and in the prediction."""
    image, label = (frame.read()[..., 0].astype(np.int64) for frame in pair)
    cells = predict_array(net, image, what="cells", tta=False).astype(np.int64)
    num = sum(len(np.unique(numbers[numbers > 0])) for numbers in (label, cells))
    return num * (1 - object_scores(label, cells).get("object_f1", 1.0)), num


def uncertainty(nets: list[Predictor], image: np.ndarray, order: str) -> float:
    """Uncertainty of an image (H, W) as `MEASURE-PIXELS` names it."""
    measure, of_pixels = order.split("-")
    views = np.array([*islice(probabilities(nets[0], image), 1 if measure == "ensemble" else None)])
    views = np.array([views[0], predict_array(nets[1], image, tta=False)]) if measure == "ensemble" else views
    values = entropy(views.mean(0)) - (0 if measure == "entropy" else entropy(views).mean(0))
    near = ndimage.binary_dilation(views.mean(0) > 0.5, iterations=NEAR)
    return float(OF_PIXELS[of_pixels](values, near if near.any() else ~near))


def probabilities(net: Predictor, image: np.ndarray) -> Iterator[np.ndarray]:
    """Probability (H, W) of four views of an image: as it is, upside down, and both mirrored."""
    for step_y, step_x in ((1, 1), (-1, -1), (1, -1), (-1, 1)):
        view = np.ascontiguousarray(image[::step_y, ::step_x])
        yield predict_array(net, view, tta=False)[::step_y, ::step_x]


def entropy(probability: np.ndarray) -> np.ndarray:
    """Entropy of a probability [bit]."""
    p = np.clip(probability, 1e-7, 1 - 1e-7)
    return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))


def draw(rows: list[dict], target: Path) -> None:
    """Figure of the curves, and a row of a table for each order: F1 of the rounds 1 to 8, mean over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="annotated images", ylabel="object F1 of the test images")
    for order in dict.fromkeys(row["order"] for row in rows):
        by_seed: dict[int, dict[int, float]] = {}
        for row in rows:
            if row["order"] == order:
                by_seed.setdefault(row["seed"], {})[row["round"]] = row["f1"]
        curves = np.array([[*curve.values()] for curve in by_seed.values() if len(curve) == NUM_ROUND + 1])
        if not len(curves):
            continue
        num, middle = ADDED * np.arange(1, NUM_ROUND + 2), curves.mean(0)
        (line,) = axes.plot(num, middle, label=f"{order} ({len(curves)})", lw=2.5 if order == "random" else 1.2)
        means = [mean(curve[1:]) for curve in curves.tolist()]
        print(order, len(curves), " ".join(f"{value:.3f}" for value in middle), f"mean {mean(means):.3f}", end=" ")
        print(f"sd {stdev(means):.3f}" if len(means) > 1 else "")
        if len(curves) > 1:
            axes.fill_between(num, curves.min(0), curves.max(0), alpha=0.15, color=line.get_color())
    axes.legend(title="order (seeds)")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
