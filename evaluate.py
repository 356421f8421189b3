"""Observers of validation and test: what is scored and pictured of each image."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import metrics
import report
from dataset import Batch, DataInfo, SampleFile
from model import class_map, class_probability

Gather = Callable[[list], list]  # lists of all processes, joined


def pictures_of(batch: Batch, logits: Tensor, info: DataInfo) -> report.Pictures:
    """Pictures of the first image of a batch: input, label if there is one, and output."""
    pixels = (batch["input"][0].movedim(0, -1) * batch["std"][0] + batch["mean"][0]).cpu().numpy()
    nch = info.nch_in // (2 * info.context + 1)  # of the section itself, which lies between its neighbours
    own = pixels[..., info.context * nch : (info.context + 1) * nch]
    pictures = {"input": report.input_picture(own, info.value_range)}
    if "label" in batch:
        pictures["label"] = report.label_picture(batch["label"][0].cpu().numpy(), info.num_class)
    return pictures | {"output": report.probability_picture(class_probability(logits[:1])[0].cpu().numpy())}


class Threads:
    """Calls, of which as many run at once as torch has threads; the network waits, else both would be slow."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Callable, tuple]] = []
        self._done: list[Any] = []

    def add(self, function: Callable, *arguments: Any) -> None:
        """Add a call, and run all that wait if they are enough."""
        self._waiting.append((function, arguments))
        if len(self._waiting) >= torch.get_num_threads():
            self.results()

    def results(self) -> list[Any]:
        """What the calls returned, in the order of `add`."""
        with ThreadPoolExecutor(len(self._waiting) or 1) as pool:
            self._done += pool.map(lambda call: call[0](*call[1]), self._waiting)
        self._waiting = []
        return self._done


class Challenge:
    """Scores of the ISBI 2012 challenge of a stack of images, from those of each image.

    Parameters
    ----------
    scores : list of dict
        `metrics.challenge_scores` of each image.
    """

    def __init__(self, scores: list[dict[str, np.ndarray]]) -> None:
        self.scores = scores

    def means(self, name: str) -> np.ndarray:
        """Mean over the images of a score at each threshold, (T,)."""
        return np.mean([scores[name] for scores in self.scores], axis=0)

    @property
    def best_threshold(self) -> float:
        """Threshold of the highest V_Info; V_Rand swings with single mergers of large cells."""
        return metrics.THRESHOLDS[int(self.means("v_info").argmax())]

    def summary(self) -> report.Scores:
        """Maximum over the thresholds of the mean V_Rand and V_Info, least pixel error, and the Rand error."""
        return {
            "max_v_rand": float(self.means("v_rand").max()),
            "max_v_info": float(self.means("v_info").max()),
            "min_pixel_error": float(self.means("pixel_error").min()),
            "rand_error": metrics.rand_error(sum(scores["rand_counts"] for scores in self.scores)),
        }


class ValidationScorer:
    """Counts pixels on the device, and on demand keeps pictures and computes the scores of the challenge.

    Parameters
    ----------
    info : DataInfo
        Classes.
    pictures : bool
        Keep those of the first image.
    challenge : bool
        Score segments, too; only two classes have such scores.

    Attributes
    ----------
    losses : list of float
        Of each image, after `finish`.
    """

    def __init__(self, info: DataInfo, *, pictures: bool, challenge: bool) -> None:
        self.info = info
        self.pictures: report.Pictures | None = {} if pictures else None
        self.challenge: Challenge | None = None
        self._challenge = Threads() if challenge and info.num_class == 2 else None
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, batch: Batch, logits: Tensor, loss: Tensor) -> None:
        """Take in a batch of one image."""
        if self.pictures == {}:
            self.pictures = pictures_of(batch, logits, self.info)
        if self._challenge:
            probability = class_probability(logits)[0, 1].cpu().numpy()
            self._challenge.add(metrics.challenge_scores, batch["label"][0].cpu().numpy(), probability)
        counts = metrics.confusion_matrix(batch["label"], class_map(logits), self.info.num_class)
        self._seen.append((batch["index"], loss[None], counts))

    def finish(self, gather: Gather = list) -> None:
        """Fetch the counts from the device, and put the images of all processes in order."""
        columns = [torch.cat(column).cpu().numpy() for column in zip(*self._seen, strict=True)]
        challenges = self._challenge.results() if self._challenge else [None] * len(self._seen)
        rows = sorted(gather(list(zip(*columns, challenges, strict=True))), key=lambda row: row[0])
        self.losses = [float(row[1]) for row in rows]
        self._matrices = [row[2] for row in rows]
        if self._challenge:
            self.challenge = Challenge([row[3] for row in rows])

    def scores(self) -> report.Scores:
        """Mean scores, under the names of their curves: TensorBoard groups by what stands before the slash."""
        rows = [metrics.confusion_scores(matrix, self.info.class_names) for matrix in self._matrices]
        scores = metrics.mean_scores(rows) | (self.challenge.summary() if self.challenge else {})
        return {"loss/val": float(np.mean(self.losses))} | {
            name.replace("_", "/", 1) if name.startswith(("dice_", "iou_", "max_")) else name: value
            for name, value in scores.items()
        }


class TestScorer:
    """Writes the pictures of each tested image, and keeps its scores.

    Parameters
    ----------
    folder : Path
        Where the pictures go.
    files : list of SampleFile
        The samples that the `index` of a batch counts; a batch holds one image.
    info : DataInfo
        Classes.
    threshold : float
        With two classes, segments are scored where the probability of class 1 is greater. Pixels count for the
        likeliest class.

    Attributes
    ----------
    rows : list of dict
        Scores of each image, after `finish`.
    baseline : list of dict
        Scores of always saying the majority class, of each image with a label.
    predicted : set of int
        Classes that came out at all.
    """

    __test__ = False  # no test of pytest's

    def __init__(self, folder: Path, files: list[SampleFile], info: DataInfo, threshold: float) -> None:
        self.folder, self.files, self.info, self.threshold = folder, files, info, threshold
        self.rows: list[dict[str, Any]] = []
        self.baseline: list[report.Scores] = []
        self.predicted: set[int] = set()
        self.majority = int(np.argmax(info.class_share))
        self.challenge = Challenge([])
        self._images = Threads()

    def __call__(self, batch: Batch, logits: Tensor, loss: Tensor) -> None:
        """Take in a batch of one image."""
        number, probability = int(batch["index"]), class_probability(logits)[0].cpu().numpy()
        report.save_images(self.folder, number, pictures_of(batch, logits, self.info))
        label = batch["label"][0].cpu().numpy() if "label" in batch else None
        self._images.add(self._scored, number, probability, label, loss.item())

    def _scored(self, number: int, probability: np.ndarray, label: np.ndarray | None, loss: float) -> tuple:
        """Row, baseline and scores of the challenge (None: there are none) of an image, and classes that came out."""
        classes, mask = probability.argmax(0), probability[1] > self.threshold
        row = {"image": f"{number:04d}", "sample": self.files[number].input.name}
        baseline = challenge = None
        if label is not None:
            row |= {"loss": loss} | self._scores(label, classes, mask)
            answer = np.full_like(classes, self.majority)
            baseline = self._scores(label, answer, answer)
            challenge = metrics.challenge_scores(label, probability[1]) if self.info.num_class == 2 else None
        return row, baseline, challenge, set(np.unique(classes).tolist())

    def finish(self, gather: Gather = list) -> None:
        """Put the images of all processes in order."""
        images = sorted(gather(self._images.results()), key=lambda image: int(image[0]["image"]))
        self.rows, self.baseline, self.challenge.scores = (
            [image[part] for image in images if image[part] is not None] for part in range(3)
        )
        self.predicted = set().union(*(image[3] for image in images))

    def _scores(self, label: np.ndarray, classes: np.ndarray, mask: np.ndarray) -> report.Scores:
        """Scores of one class map, and with two classes of the segments of one mask, (H, W) each."""
        matrix = metrics.confusion_matrix(label[None], classes[None], self.info.num_class)[0].numpy()
        scores = metrics.confusion_scores(matrix, self.info.class_names)
        return scores | metrics.mask_scores(label, mask) if self.info.num_class == 2 else scores

    @property
    def legend(self) -> str:
        """Which class is which, and what is scored at which threshold, in words."""
        pairs = zip(self.info.class_names, self.info.class_values, strict=True)
        of = [name if name == str(value) else f"{name} = {value}" for name, value in pairs]
        foreground = f"; foreground is {self.info.class_names[1]}; pixels at 0.5, segments at {self.threshold:g}"
        shown = "; input shown from {:.4g} to {:.4g}".format(*self.info.value_range)
        return f"classes {', '.join(of)}" + (foreground if len(of) == 2 else "") + shown

    def summary(self) -> dict[str, Any]:
        """What the scores are of, their mean, the baseline, and the challenge's maxima over the thresholds."""
        two = self.info.num_class == 2
        numbers = [{k: v for k, v in row.items() if k not in ("image", "sample")} for row in self.rows]
        return {
            "classes": dict(zip(self.info.class_names, self.info.class_values, strict=True)),
            "foreground": self.info.class_names[1] if two else None,
            "pixel_threshold": 0.5 if two else None,
            "segment_threshold": self.threshold if two else None,
            "mean": metrics.mean_scores(numbers),
            "majority_class": self.info.class_names[self.majority],
            "majority": metrics.mean_scores(self.baseline),
            "challenge": self.challenge.summary() if two and self.baseline else None,
        }

    def table(self) -> list[dict[str, Any]]:
        """Rows of the images, of their mean, and of always saying the majority class."""
        summary = self.summary()
        last = {"mean": summary["mean"], f"all {summary['majority_class']}": summary["majority"]}
        return self.rows + [{"image": name, "sample": ""} | scores for name, scores in last.items() if scores]
