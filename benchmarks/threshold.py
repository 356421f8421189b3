"""Scores against the threshold of the foreground: python benchmarks/threshold.py DATABASE CHECKPOINT.

Prints the scores of the validation and the test samples at the nine thresholds of the ISBI 2012 challenge, the
threshold that a training would choose on the validation set, and the best scores possible on the test set.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation.metrics import THRESHOLDS, challenge_scores, object_scores
from evaluation.scorers import Challenge
from predict import load, predict_array
from prediction.objects import separate_objects
from prediction.predictor import Predictor
from samples import list_samples

SCORES = ("v_info", "v_rand", "pixel_error", "object_f1")


def main() -> None:
    """Print the tables of one checkpoint of two classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database", type=Path)
    parser.add_argument("checkpoint", type=Path)
    args = parser.parse_args()
    predictor = load(args.checkpoint)
    rows = {split: score(predictor, args.database / split) for split in ("val", "test")}
    for split, found in rows.items():
        print(f"{split:12}", *(f"{threshold:7}" for threshold in THRESHOLDS))
        for name in SCORES:
            print(f"{name:12}", *(f"{value:7.4f}" for value in average(found, name)))
    chosen = Challenge(rows["val"]).best_threshold
    print("chosen threshold:", chosen)
    for name in SCORES:
        values = average(rows["test"], name)
        best = values.min() if name == "pixel_error" else values.max()
        print(f"test {name}: {values[THRESHOLDS.index(chosen)]:.4f} (best {best:.4f})")


def score(predictor: Predictor, folder: Path) -> list[dict]:
    """Scores of each sample, at each threshold."""
    rows = []
    for file in list_samples(folder):
        image, label = file.open(predictor.info.class_values)
        probability = predict_array(predictor, np.ascontiguousarray(image))
        rows.append(at_thresholds(np.ascontiguousarray(label, np.uint8), probability))
    return rows


def at_thresholds(label: np.ndarray, probability: np.ndarray) -> dict:
    """Scores of segments and objects of an image (H, W), at each threshold."""
    truth = ndimage.label(label)[0]
    objects = [object_scores(truth, separate_objects(probability, threshold)) for threshold in THRESHOLDS]
    return challenge_scores(label, probability) | {"object_f1": [found["object_f1"] for found in objects]}


def average(rows: list[dict], name: str) -> np.ndarray:
    """Mean of a score over the samples, at each threshold."""
    return np.mean([row[name] for row in rows], axis=0)


if __name__ == "__main__":
    main()
