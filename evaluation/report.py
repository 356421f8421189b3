"""Wording of a test: the legend, the summary, rows and cards of the images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from description import DataInfo, Origin
from evaluation import fates, metrics
from evaluation.hints import score_hints
from evaluation.pictures import image_name
from evaluation.results_page import Card
from evaluation.scorers import Challenge, ImageScores
from prediction.objects import KEEP_ALL, ObjectFilter
from prediction.predictor import Predictor
from samples import SampleFile


@dataclass(frozen=True)
class Report:
    """Texts and tables of a test."""

    images: list[ImageScores]  # in their order
    files: list[SampleFile]  # the samples, by `ImageScores.index`
    predictor: Predictor  # classes, background and threshold
    origins: dict[str, Origin]  # of each sample by the name of its file, where it is known
    object_filter: ObjectFilter = KEEP_ALL  # objects that were scored

    @property
    def info(self) -> DataInfo:
        """Channels and classes."""
        return self.predictor.info

    @property
    def is_partial(self) -> bool:
        """Whether any image has pixels that are not annotated."""
        return any(image.annotated < 1 for image in self.images)

    @property
    def num_labelled(self) -> int:
        """Number of images with a label, which all have scores of their pixels."""
        return sum(bool(image.scores) for image in self.images)

    @property
    def matrix(self) -> np.ndarray:
        """Confusion matrix (K, K) of all images; row: class of the label, column: class of the output."""
        return np.sum([image.matrix for image in self.images], axis=0)

    @property
    def legend(self) -> str:
        """Text with the classes, the threshold of each kind of score, and what the pictures show."""
        names, values, background = self.info.class_names, self.info.class_values, self.predictor.background
        classes = [
            name if name == str(value) else f"{name} = {value}" for name, value in zip(names, values, strict=True)
        ]
        parts = [f"classes {', '.join(classes)}"]
        if len(names) == 2:
            parts += [f"foreground is {names[1 - background]}"]
            parts += [f"pixels at 0.5, segments at {self.predictor.threshold_text}"]
        else:
            parts += [f"background is {names[background]}"]
        num = self.info.num_own
        channels = "input" if num in (1, 3) else f"channel 1 of {num} of the input"
        parts += [f"{channels} shown with the contrast of each image"]
        parts += ["grey in a label is not annotated"] if self.is_partial else []
        parts += [f"objects {self.object_filter}"] if self.object_filter.is_active else []
        return "; ".join(parts)

    def summary(self) -> dict[str, Any]:
        """Classes, thresholds, means, baselines, the challenge's maxima over the thresholds, confusion matrix.

        `scored_images` has the number of images of each mean that is not over all labelled ones.
        """
        names, background, two = self.info.class_names, self.predictor.background, self.info.num_class == 2
        challenge = Challenge([image.challenge for image in self.images if image.challenge is not None])
        rows = {
            "mean": [image.scores for image in self.images],
            "majority": [image.baseline for image in self.images],
            "baseline_otsu": [image.otsu for image in self.images],
        }
        means = {name: metrics.mean_scores(scores) for name, scores in rows.items()}
        fewer = {name: metrics.fewer_images(scores) for name, scores in rows.items()}
        fewer["challenge"] = challenge.fewer_images()
        return {
            "classes": dict(zip(names, self.info.class_values, strict=True)),
            "foreground": names[1 - background] if two else None,
            "background": names[background],
            "pixel_threshold": 0.5 if two else None,
            "segment_threshold": self.predictor.object_threshold if two else None,
            "threshold_origin": self.predictor.threshold_origin if two else None,
            "mean": means["mean"],
            "majority_class": names[int(np.argmax(self.info.class_share))],
            "majority": means["majority"],
            "baseline_otsu": means["baseline_otsu"] or None,
            "challenge": challenge.summary() if challenge.scores else None,
            "objects": fates.total([image.objects for image in self.images if image.objects]) or None,
            "num_labelled": self.num_labelled,
            "scored_images": {name: counts for name, counts in fewer.items() if counts},
            "confusion_matrix": {"names": names, "counts": self.matrix.tolist()},
        } | (self.object_filter._asdict() if self.object_filter.is_active else {})

    @property
    def hints(self) -> list[str]:
        """What the scores show, and what to do about it."""
        one_class = len(set().union(*(image.predicted for image in self.images))) == 1
        return score_hints(self.summary(), one_class=one_class)

    @property
    def rows(self) -> list[dict[str, str | float]]:
        """Number, sample, source, scores, counts of objects of each image; the annotated fraction if not always 1."""
        rows: list[dict[str, str | float]] = []
        is_partial, two = self.is_partial, self.info.num_class == 2
        for card in self.cards:
            source = {"source": card.name} if card.sample in self.origins else {}
            annotated = {"annotated": card.annotated} if is_partial and card.scores else {}
            threshold = {"threshold": self.predictor.object_threshold} if two and card.scores else {}
            counts = {f"objects_{name}": count for name, count in card.objects.items()}
            about: dict[str, str | float] = {"image": card.image, "sample": card.sample, **source, **annotated}
            rows.append({**about, **threshold, **card.scores, **counts})
        return rows

    @property
    def cards(self) -> list[Card]:
        """The images as the page shows them."""
        cards = []
        for image in self.images:
            sample = self.files[image.index].input.name
            origin = self.origins.get(sample, Origin(""))
            cards.append(
                Card(
                    image=image_name(image.index),
                    sample=sample,
                    shape=image.shape,
                    scores=image.scores,
                    name=origin.name,
                    pixel_size=origin.pixel_size,
                    wrong=image.wrong,
                    annotated=image.annotated,
                    objects=image.objects,
                )
            )
        return cards

    def table(self) -> list[dict[str, str | float]]:
        """Rows of the images, of their mean, of always predicting the majority class, and of Otsu's threshold.

        Below a mean is the number of its images, where it is less than all.
        """
        summary, table = self.summary(), self.rows
        last = {"mean": "mean", "majority": f"all {summary['majority_class']}", "baseline_otsu": "otsu"}
        for name, text in last.items():
            fewer = summary["scored_images"].get(name, {})
            counts = {score: f"{num} of {self.num_labelled}" for score, num in fewer.items()}
            table += [{"image": text, "sample": ""} | summary[name]] if summary[name] else []
            table += [{"image": "  images", "sample": "", **counts}] if counts else []
        return table
