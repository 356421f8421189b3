"""What to do when results are bad, by symptom: said where the program sees one, and listed in the README."""

from __future__ import annotations

from typing import Any

HINTS = {
    "one class": (
        "all pixels are predicted as one class",
        "see in the database's `index.html` whether labels and images belong together; train longer, or `--balance on`",
    ),
    "small test": (
        "fewer than three images are tested",
        "the scores are those of these images alone: add some by `--add IMAGES --label LABELS --to test`",
    ),
    "otsu": (
        "the test is no better than Otsu's threshold",
        "train longer; where brightness alone tells the classes apart, no network will do much better",
    ),
    "few": (
        "fewer than 20 objects to learn from",
        "annotate more, in several images that differ, and some empty background in each",
    ),
    "apart": (
        "the validation loss is over twice that of the training",
        "the network knows its images by heart: annotate more of them, and test with `--epoch best`",
    ),
    "merged": (
        "pixels are right, but objects are merged",
        "number the objects in the labels, add `--objects on`, and make the database again; or train with `--w0 10`",
    ),
}
FEW = 20  # objects
FEW_IMAGES = 3  # of a test
APART = 2.0  # factor between the losses
NO_BETTER = 0.95  # of Otsu's pixel error
RIGHT, MERGED = 0.8, 0.3  # least Dice of right pixels, and how far the F1 of their objects is below it


def hint(symptom: str) -> str:
    """Line about a symptom of `HINTS`, for the terminal and pages."""
    return ": ".join(HINTS[symptom]).replace("`", "")


def score_hints(summary: dict[str, Any], *, one_class: bool) -> list[str]:
    """Lines about what the summary of a test shows; `one_class`: nothing else was predicted."""
    mean, otsu = summary["mean"], summary["baseline_otsu"] or {}
    dice = mean.get(f"dice_{summary['foreground']}", 0)
    is_no_better = mean.get("pixel_error", 0) > NO_BETTER * otsu.get("pixel_error", 1)
    seen = {
        "one class": one_class,
        "small test": 0 < summary["num_labelled"] < FEW_IMAGES,
        "otsu": is_no_better and not mean.get("object_f1", 0) > otsu.get("object_f1", 0),
        "merged": dice >= RIGHT and mean.get("object_f1", 1) <= dice - MERGED,
    }
    return [hint(symptom) for symptom, is_seen in seen.items() if is_seen]


def loss_hints(scores: dict[str, float]) -> list[str]:
    """Lines about the last losses of a training."""
    far = scores.get("loss/val", 0) > APART * scores["loss/train"]
    return [hint("apart")] if far else []
