"""Tables of the scores of a test: metrics.json, metrics.csv, and as text."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.pictures import PICTURES
from utils import csv_cell

Scores = dict[str, float]  # name of a score -> value
OF_SEGMENTS = ("v_rand", "v_info", "object_f1", "object_f1_unfiltered")
MAIN_SCORES = ("image", "loss", "pixel_error"), OF_SEGMENTS  # columns before and after Dice
OF_OBJECTS = ("matched_iou", "ap", "ap_50", "ap_75", "warping_error", "num_split", "num_merger")
LAST_SCORES = (*OF_SEGMENTS, *OF_OBJECTS)  # not each image has them: their order is this one, after all others
MEANINGS = {  # score -> its best value, and what it is in a sentence; docs/test-and-scores.md has the same
    "loss": (0, "cross entropy per pixel, without weights, whatever loss the training minimised"),
    "pixel_error": (0, "fraction of pixels with the wrong class"),
    "dice_NAME": (
        1,
        "overlap of a class in label and output: twice the area of both, divided by the sum of their areas",
    ),
    "iou_NAME": (1, "intersection over union of a class in label and output"),
    "v_rand": (1, "V_Rand of the ISBI 2012 challenge: F-score of pairs of pixels that are in one segment"),
    "v_info": (1, "V_Info of the challenge: F-score of the mutual information of the segments"),
    "object_f1": (1, "F1 of the objects found; two objects match if their intersection over union is at least 0.5"),
    "object_f1_unfiltered": (1, "the same before small objects are dropped and holes filled, where that differs"),
    "matched_iou": (1, "mean intersection over union of the matched objects"),
    "ap": (1, "average precision of the objects, the mean over limits of 0.5, 0.55, ... 0.95 for a match"),
    "ap_50": (1, "average precision where the intersection over union of a match is at least 0.5"),
    "ap_75": (1, "average precision where the intersection over union of a match is at least 0.75"),
    "warping_error": (0, "fraction of pixels that change the topology"),
    "num_split": (0, "number of split segments of the warping error"),
    "num_merger": (0, "number of merged segments of the warping error"),
}
LOW_IS_GOOD = [name for name, (best, _) in MEANINGS.items() if best == 0]
WIDTH = 100  # columns of a terminal
SORTED_BY = ("pixel_error", "loss")  # the first of these scores that there is tells which images are the worst
# entries of the result folder, replaced together, each with the names of what may be removed in it
RESULTS = {"images": PICTURES, "index.html": "", "metrics.json": "", "metrics.csv": ""}


def write_metrics(folder: Path, summary: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write `metrics.json` (the summary and all rows) and `metrics.csv` (the rows, their mean, and its images)."""
    text = json.dumps(summary | {"images": rows}, indent=1, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n", "utf-8")
    with (folder / "metrics.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns(rows) or ["image"], restval="", lineterminator="\n")
        fewer = summary.get("scored_images", {}).get("mean")
        last = [{"image": "mean"} | summary["mean"], *([{"image": "images"} | fewer] if fewer else [])]
        for row in ({name: name for name in table.fieldnames}, *rows, *last):
            table.writerow({name: csv_cell(value) for name, value in row.items()})


def columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names in the rows, in their order; not each row has all of them.

    >>> columns([{"loss": 1.0, "ap": 1.0}, {"loss": 1.0, "v_rand": 1.0, "ap": 1.0}])
    ['loss', 'v_rand', 'ap']
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return sorted(names, key=lambda name: LAST_SCORES.index(name) if name in LAST_SCORES else -1)


def meaning_of(name: str) -> str:
    """What a score is, in a sentence."""
    return MEANINGS.get(name, MEANINGS.get(name.split("_")[0] + "_NAME", (0, "")))[1]


def sorting_score(rows: Iterable[Scores]) -> str:
    """Name of the score that tells which images are the worst, those where it is highest; empty without one.

    >>> sorting_score([{}, {"loss": 0.25, "dice_a": 0.5}])
    'loss'
    """
    names = {name for row in rows for name in row}
    return next((name for name in SORTED_BY if name in names), "")


def main_scores(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the scores that fit into 100 columns of a terminal; with more than three classes, the mean Dice.

    >>> main_scores([{"image": "0000", "loss": 0.25, "dice_a": 0.5, "iou_a": 0.3}])
    [{'image': '0000', 'loss': 0.25, 'dice_a': 0.5}]
    """
    narrow_rows = []
    for row in rows:
        dice = {name: value for name, value in row.items() if name.startswith("dice_")}
        dice = {"dice": float(np.mean(list(dice.values())))} if len(dice) > 3 else dice
        first, last = ({name: row[name] for name in names if name in row} for names in MAIN_SCORES)
        narrow_rows.append(first | dice | last)
    return narrow_rows


def format_table(rows: list[dict[str, Any]]) -> str:
    """Text table of rows; a missing value is left blank.

    >>> print(format_table([{"image": "0000", "loss": 0.25}, {"image": "mean", "loss": 0.25}]))
    image    loss
    0000   0.2500
    mean   0.2500
    """
    names = columns(rows)
    return _aligned([names, *([_cell(row.get(name)) for name in names] for row in rows)])


def _aligned(cells: list[list[str]]) -> str:
    """Lines of cells with the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def format_confusion(counts: np.ndarray, names: list[str]) -> str:
    """Text table of the percentage of each class of the label (row) that was predicted as each class (column).

    The diagonal has the recall of each class; a class without pixels has none. Numbers head the columns if the names
    are too wide for 100 columns of a terminal; with too many classes for that, the text is empty.

    >>> print(format_confusion(np.array([[3, 1], [0, 0]]), ["cell", "edge"]))
    label  cell  edge
    cell   75.0  25.0
    edge
    """
    rows = [[f"{100 * count / max(row.sum(), 1):.1f}" if row.any() else "" for count in row] for row in counts]
    numbered = [f"{k} {name}" for k, name in enumerate(names)]
    for heads, firsts in ((names, names), (list(map(str, range(len(names)))), numbered)):
        text = _aligned([["label", *heads], *([first, *row] for first, row in zip(firsts, rows, strict=True))])
        if max(map(len, text.splitlines())) <= WIDTH:
            return text
    return ""


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
