"""Scores in float32 and bfloat16, with 1 to 8 views of test-time augmentation, and the time of a view.

    OMP_NUM_THREADS=1 python benchmarks/precision.py DATABASE CHECKPOINT...

Scores are means over the samples of `--split`, V_Rand, V_Info, pixel error and object F1 each at its own best
threshold; then mean ± standard deviation over the checkpoints, which are of different seeds. A variant's difference is
that of the same checkpoint from float32 with eight views: mean, and the largest of any checkpoint. Times are CPU
seconds per megapixel (1024 x 1024) of one view, the types in turn, so compare their ratio.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from threshold import at_thresholds

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from predict import load, predict_array
from prediction.predictor import Predictor
from samples import SampleFile, list_samples

TYPES = ("off", "bf16")  # values of --amp
EIGHT = [(flip, quarters) for flip in (False, True) for quarters in range(4)]
VIEWS = {
    "1": EIGHT[:1],
    "2 (half turn)": EIGHT[:3:2],
    "4 (turns)": EIGHT[:4],
    "4 (flips)": EIGHT[::2],
    "8": EIGHT,
}
BEST = {"bce": np.min, "pixel_error": np.min, "v_rand": np.max, "v_info": np.max, "object_f1": np.max}

Scores = dict[tuple[str, str], np.ndarray]  # by type and views


def main() -> None:
    """Print the table of a database."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    args = parser.parse_args()
    files, seconds = list_samples(args.database / args.split), defaultdict(list)
    found = [score(path, files, seconds) for path in args.checkpoints]
    print(table({variant: np.array([scores[variant] for scores in found]) for variant in found[0]}))
    per_type = {amp: np.median(seconds[amp]) for amp in TYPES}
    ratios = np.divide(seconds["off"], seconds["bf16"])
    print(f"CPU s per megapixel and view: {', '.join(f'{amp} {value:.3f}' for amp, value in per_type.items())}")
    print(f"ratio {np.median(ratios):.2f} ({' to '.join(f'{q:.2f}' for q in np.quantile(ratios, (0.1, 0.9)))})")


def score(path: Path, files: list[SampleFile], seconds: dict[str, list[float]]) -> Scores:
    """Scores (5,) of a checkpoint in each variant, mean over the samples; adds the times of each view."""
    predictors = {amp: load(path, amp=amp) for amp in TYPES}
    rows = defaultdict(list)
    for file in files:
        image, label = file.open(predictors["off"].info.class_values)
        views = by_view(predictors, np.ascontiguousarray(image), seconds)
        for amp in TYPES:
            for name, chosen in VIEWS.items():
                mean = np.mean([views[amp, view] for view in chosen], axis=0)
                rows[amp, name].append(scores_of(mean, np.ascontiguousarray(label, np.uint8)))
    return {variant: best(found) for variant, found in rows.items()}


def by_view(predictors: dict[str, Predictor], image: np.ndarray, seconds: dict[str, list[float]]) -> dict:
    """Probability (H, W) of class 1 of an image (H, W, C) by type and view, and its CPU seconds per megapixel."""
    found = {}
    for flip, quarters in EIGHT:
        view = np.ascontiguousarray(np.rot90(image[:, ::-1] if flip else image, quarters))
        for amp, predictor in predictors.items():
            start = time.process_time()
            probability = predict_array(predictor, view, tta=False)
            seconds[amp].append((time.process_time() - start) / (probability.size / 2**20))
            back = np.rot90(probability, -quarters)
            found[amp, (flip, quarters)] = back[:, ::-1] if flip else back
    return found


def scores_of(probability: np.ndarray, label: np.ndarray) -> dict[str, np.ndarray]:
    """Each score at each threshold; BCE has one value."""
    of_label = np.where(label == 1, probability, 1 - probability)
    bce = -np.log(np.maximum(of_label, np.finfo(np.float32).tiny)).mean(keepdims=True)
    return at_thresholds(label, probability) | {"bce": bce}


def best(rows: list[dict[str, np.ndarray]]) -> np.ndarray:
    """The scores (5,) at the best threshold of their means."""
    return np.array([choose(np.mean([row[name] for row in rows], axis=0)) for name, choose in BEST.items()])


def table(scores: dict[tuple[str, str], np.ndarray]) -> str:
    """Markdown of the scores (checkpoints, 5) of each variant."""
    reference = scores["off", "8"]
    lines = ["| type | views | " + " | ".join(BEST) + " |", "|---" * (2 + len(BEST)) + "|"]
    for (amp, views), values in scores.items():
        mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(BEST))
        change = values - reference
        worst = np.abs(change).max(0)
        cells = zip(mean, spread, change.mean(0), worst, strict=True)
        shown = [f"{m:.4f} ± {s:.4f} ({c:+.5f}, {w:.5f})" for m, s, c, w in cells]
        lines.append("| " + " | ".join([amp, views, *shown]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
