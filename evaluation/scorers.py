"""Scores of the images of validation and test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from description import DataInfo
from evaluation import metrics
from evaluation.fates import ObjectMap
from evaluation.otsu import otsu_mask
from evaluation.pictures import OBJECTS, Pictures, probability_picture, row_bands, save_images, wrong_pixels
from evaluation.segment import Segmented
from evaluation.tables import Scores, columns
from images.memory import release_memory
from prediction.gaps import grown
from prediction.objects import (
    KEEP_ALL,
    ObjectFilter,
    ObjectList,
    filter_objects,
    foreground_class_ids,
    join_bands,
    separate_bands,
)
from prediction.predictor import Predictor

Gather = Callable[[list], list]  # lists of all processes, joined
F1, UNFILTERED = "object_f1", "object_f1_unfiltered"  # of the objects after and before their filter
LEVEL = 1e-3  # of V_Info: a smaller difference is none
PAIR_SCORES = ("v_rand", "v_info")
TOLERANCE = 1e-2  # of V_Info or average precision: single mergers make such a difference (benchmarks/README.md)
LARGE = 2**22  # [px] of an image whose scores begin with memory given back
CERTAINTIES = (0.0, 0.7, 0.8, 0.9)  # that the probability of an object may have to exceed somewhere
SHARED = 2**23  # [px] that threads score at once: each needs up to 80 bytes for a pixel


@contextmanager
def scoring_threads(num_pixel: int) -> Iterator[Executor]:
    """Threads that share the scores of an image of this size, while the network waits; together both would be slow."""
    if num_pixel > LARGE:
        release_memory()
    threads = ThreadPoolExecutor(max(1, min(torch.get_num_threads(), SHARED // num_pixel)))
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)  # after Ctrl-C, say


@dataclass
class Challenge:
    """Scores of the ISBI 2012 challenge of a stack of images."""

    scores: list[dict[str, np.ndarray]]  # `metrics.challenge_scores` of each image

    @property
    def counts(self) -> np.ndarray:
        """`metrics.threshold_counts` (2, 127) of all images."""
        return np.sum([scores["counts"] for scores in self.scores], axis=0)

    @property
    def decisive(self) -> list[dict[str, np.ndarray]]:
        """Scores of the images with foreground: without one, there is nothing that a threshold could be best for."""
        return [scores for scores in self.scores if scores["rand_counts"][0, 1] > 0]

    def means(self, name: str) -> np.ndarray:
        """Mean of a score at each threshold, (T,), over the images that have it; one with foreground always has."""
        return np.nanmean([scores[name] for scores in self.scores], axis=0)

    @property
    def best_threshold(self) -> float:
        """Threshold to segment at: the middle of those whose V_Info is as good as the best, up to single mergers.

        V_Info finds the threshold where cells touch. Where objects lie apart, it is level over many thresholds, since
        it depends only on the segment of each pixel, not on the size of objects; there the pixel error decides. Where
        the labels number the objects, the average precision of these decides instead. 0.5 if no image has foreground.
        """
        if not self.decisive:
            return 0.5
        if "object_counts" in self.decisive[0]:
            return metrics.THRESHOLDS[self._best_for_objects[0]]
        v_info, error = Challenge(self.decisive).means("v_info"), np.round(self.means("pixel_error"), 12)
        good = np.flatnonzero(v_info >= v_info.max() - TOLERANCE)
        middles = good[(len(good) - 1) // 2 : len(good) // 2 + 1]  # one, or two of an even number
        middle = min(middles, key=lambda k: error[k])
        # the plateau: adjacent thresholds where V_Info is that of the middle one
        levels = ndimage.label(np.abs(v_info - v_info[middle]) <= LEVEL)[0]
        plateau = np.flatnonzero(levels == levels[middle])
        return metrics.THRESHOLDS[min(plateau, key=lambda k: (error[k], abs(k - middle)))]

    @property
    def best_certainty(self) -> float:
        """Probability that an object must exceed somewhere to be one; 0 where the labels number no objects."""
        if not self.decisive or "object_counts" not in self.decisive[0]:
            return 0.0
        return CERTAINTIES[self._best_for_objects[1]]

    @property
    def _best_for_objects(self) -> tuple[int, int]:
        """Indices of threshold and certainty by the average precision of all objects.

        The threshold is the middle of those that are as good as the best, the certainty the least of them there.
        """
        counts = np.sum([scores["object_counts"] for scores in self.decisive], axis=0)
        num_match, num_object = counts[..., 0], counts[..., 1]
        precision = (num_match / np.maximum(num_object - num_match, 1)).mean(2)
        good = np.flatnonzero(precision.max(1) >= precision.max() - TOLERANCE)
        at_threshold = precision[middle := good[len(good) // 2]]
        return middle, int(np.argmax(at_threshold >= at_threshold.max() - TOLERANCE))

    @property
    def chosen_on(self) -> list[int]:
        """Number of the images that the best threshold is chosen on, and of the objects in their labels."""
        return [len(self.decisive), sum(int(scores["num_object"]) for scores in self.decisive)]

    def summary(self) -> Scores:
        """Maximum over the thresholds of the mean V_Rand and V_Info, least pixel error, and the Rand error.

        Without any foreground there is the pixel error alone: a blank image has no V_Info where nothing is predicted.
        """
        error = {"min_pixel_error": float(self.means("pixel_error").min())}
        if not self.decisive:
            return error
        maxima = {f"max_{name}": float(self.means(name).max()) for name in PAIR_SCORES}
        counts = np.sum([scores["rand_counts"] for scores in self.scores], axis=0)
        return maxima | error | {"rand_error": metrics.rand_error(counts)}

    def fewer_images(self) -> dict[str, int]:
        """Number of images that the maxima of `summary` are means over, where it is less than all."""
        if not self.decisive:
            return {}
        best = {name: int(self.means(name).argmax()) for name in PAIR_SCORES}
        nums = {name: sum(not np.isnan(scores[name][k]) for scores in self.scores) for name, k in best.items()}
        return {f"max_{name}": num for name, num in nums.items() if num < len(self.scores)}


def segment_scores(image: Segmented, background: int) -> dict[str, np.ndarray]:
    """`metrics.challenge_scores` of an image of two classes, its `metrics.threshold_counts` and number of objects."""
    assert image.label is not None
    foreground, inside, valid = image.foreground(background), image.label != background, image.valid
    with scoring_threads(foreground.size) as threads:
        scores = metrics.challenge_scores(inside, foreground, valid=valid, mapped=threads.map)
    num_object = metrics.number_segments(inside, valid).max()
    return scores | {"counts": metrics.threshold_counts(inside, foreground, valid), "num_object": num_object}


def object_counts(image: Segmented, predictor: Predictor) -> dict[str, np.ndarray]:
    """Matches and objects (T, C, L, 2) as predict finds them, as `Overlaps.counts`.

    T thresholds, C certainties, L `LIMITS`. Neighbours of a dropped object are here as beside it.
    """
    assert image.label is not None
    grow, object_filter = grown if predictor.has_gaps else np.asarray, predictor.object_filter._replace(certainty=0)
    foreground, inside = image.foreground(predictor.background), image.label != predictor.background
    truth = grow(metrics.number_segments(inside, image.valid))

    def counts_at(threshold: float) -> list[list[tuple[int, int]]]:
        objects = join_bands(separate_bands(foreground, threshold), foreground.shape)
        objects = grow(filter_objects(objects, foreground, object_filter))
        pairs, peak = metrics.overlaps(truth, objects), np.zeros(objects.max(initial=0) + 1)
        np.maximum.at(peak, objects, foreground)
        of_certain = [pairs.keeping(peak > certainty) for certainty in CERTAINTIES]
        return [[pairs.counts(limit) for limit in metrics.LIMITS] for pairs in of_certain]

    with scoring_threads(foreground.size) as threads:
        return {"object_counts": np.array([*threads.map(counts_at, metrics.THRESHOLDS)])}


@dataclass
class PixelScores:
    """Scores of the pixels of the validation images."""

    info: DataInfo
    losses: list[float]  # of each image
    matrices: list[np.ndarray]  # (K, K) confusion matrix of each
    pictures: Pictures | None  # of the first one, if wanted

    def scores(self, challenge: Challenge | None = None) -> Scores:
        """Mean scores, under the names of their curves: TensorBoard groups them by the part before the slash."""
        rows = [metrics.confusion_scores(matrix, self.info.class_names) for matrix in self.matrices]
        scores = metrics.mean_scores(rows) | (challenge.summary() if challenge else {})
        return {"loss/val": float(np.mean(self.losses))} | {
            name.replace("_", "/", 1) if name.startswith(("dice_", "iou_", "max_")) else name: value
            for name, value in scores.items()
        }


@dataclass
class ImageScores:
    """Scores of a tested image; without a label all of them are empty."""

    index: int  # its number
    predicted: set[int]  # classes that any pixel was predicted as
    shape: tuple[int, int]  # height and width [px]
    matrix: np.ndarray  # (K, K) confusion matrix of the annotated pixels
    annotated: float = 1.0  # fraction of its pixels
    scores: Scores = field(default_factory=dict)
    baseline: Scores = field(default_factory=dict)  # of always predicting the majority class
    otsu: Scores = field(default_factory=dict)  # of Otsu's threshold; empty if that does not apply
    challenge: dict[str, np.ndarray] | None = None  # `metrics.challenge_scores` of an image of two classes
    wrong: list[int] = field(default_factory=list)  # wrong pixels of the output's picture, see `wrong_pixels`
    objects: dict[str, int] = field(default_factory=dict)  # counts of `ObjectMap`; empty without objects


def _unfiltered(scores: Scores) -> Scores:
    """The F1 of objects before their filter, under its name; empty if there is none."""
    return {UNFILTERED: scores[F1]} if F1 in scores else {}


class TestScorer:
    """Writes the pictures of each tested image to a folder, and keeps its scores.

    With two classes, segments and objects are scored where the probability of the foreground is above the predictor's
    threshold; pixels count for the most probable class. The objects scored are those that the filter leaves; where it
    changes their F1 in any image, `object_f1_unfiltered` is that of all objects.
    """

    __test__ = False  # no test of pytest's

    def __init__(self, folder: Path, predictor: Predictor, object_filter: ObjectFilter = KEEP_ALL) -> None:
        self.folder, self.info, self.object_filter = folder, predictor.info, object_filter
        self.background, self.threshold = predictor.background, predictor.object_threshold
        self.majority = int(np.argmax(self.info.class_share))
        self._images: list[ImageScores] = []

    def __call__(self, image: Segmented) -> None:
        """Add an image."""
        predicted = set(np.flatnonzero(np.bincount(image.classes.ravel())).tolist())
        entry = ImageScores(image.index, predicted, image.classes.shape, image.matrix)
        self._images.append(entry)
        with scoring_threads(image.classes.size) as threads:
            saved = threads.submit(lambda: save_images(self.folder, image.index, image.pictures(self.info)))
            if image.label is not None:
                self._add_scores(entry, image, image.label, threads)
            saved.result()

    def finish(self, gather: Gather = list) -> list[ImageScores]:
        """Scores of the images of all processes, in their order."""
        images = sorted(gather(self._images), key=lambda image: image.index)
        if all(image.scores.get(F1) == image.scores.get(UNFILTERED) for image in images):
            for image in images:
                image.scores.pop(UNFILTERED, None)
        return images

    def _add_scores(self, entry: ImageScores, image: Segmented, label: np.ndarray, threads: Executor) -> None:
        """Enter the scores of an image with a label."""
        valid, two = image.valid, self.info.num_class == 2
        if two:
            inside, foreground = label != self.background, image.foreground(self.background)
            entry.challenge = metrics.challenge_scores(inside, foreground, valid=valid, mapped=threads.map)
            output = probability_picture(image.probability)
            entry.wrong = wrong_pixels(inside, output if self.background == 0 else 255 - output, valid)
            del inside, foreground, output  # up to six bytes per pixel that the next scores need themselves
        scores = threads.submit(self._scores_of_output, image, label, objects := ObjectMap(label.shape))
        baseline = threads.submit(self._scores_of_constant, image, label)
        if two:
            entry.otsu = threads.submit(self._scores_of_otsu, image, label).result()
        entry.annotated = 1.0 if valid is None else float(valid.mean())
        of_output = {"loss": image.loss} | scores.result()
        if any(objects.counts.values()):
            entry.objects = objects.counts
            save_images(self.folder, image.index, {OBJECTS: objects.picture})
        entry.scores = {name: of_output[name] for name in columns([of_output])}
        entry.baseline = baseline.result()

    def _scores_of_output(self, image: Segmented, label: np.ndarray, object_map: ObjectMap) -> Scores:
        """Scores of the pixels, segments and objects that the network found, which are added to the map."""
        scores = metrics.confusion_scores(image.matrix, self.info.class_names)
        if self.info.num_class == 2:
            inside, probability = label != self.background, image.foreground(self.background)
            mask, bands = probability > self.threshold, separate_bands(probability, self.threshold)
            grow = grown if self.info.gap else np.asarray  # as predict does, and of the labels alike
            objects, truth = join_bands(bands, label.shape), grow(metrics.number_segments(inside, image.valid))
            if self.object_filter.is_active:
                scores |= _unfiltered(metrics.object_scores(truth, grow(objects)))
                objects = filter_objects(objects, probability, self.object_filter)
            object_map.add(truth, objects := grow(objects))
            return scores | metrics.mask_scores(inside, mask, objects, image.valid, truth)
        class_ids = foreground_class_ids(image.classes, self.background)
        bands = separate_bands(image.probability, self.threshold, class_ids=class_ids)
        objects, classes = join_bands(bands, label.shape), image.classes
        if self.object_filter.is_active:
            scores |= _unfiltered(self._object_scores(image, label, objects, classes))
            objects, object_list = filter_objects(objects, image.probability, self.object_filter), ObjectList()
            object_list.add(objects, class_ids)
            classes = object_list.class_id[objects] - np.uint8(1)  # also of filled holes
        return scores | self._object_scores(image, label, objects, classes, object_map)

    def _scores_of_constant(self, image: Segmented, label: np.ndarray) -> Scores:
        """Scores of always predicting the majority class: one object, or none where that is the background."""
        matrix = np.zeros_like(image.matrix)
        matrix[:, self.majority] = image.matrix.sum(1)
        scores = metrics.confusion_scores(matrix, self.info.class_names)
        mask = np.full(label.shape, self.majority != self.background)
        if self.info.num_class == 2:
            return scores | metrics.mask_scores(label != self.background, mask, valid=image.valid)
        return scores | self._object_scores(image, label, mask, np.full(label.shape, self.majority, np.uint8))

    def _scores_of_otsu(self, image: Segmented, label: np.ndarray) -> Scores:
        """Scores of Otsu's threshold; the class that was brighter in training is above it. Empty if neither was."""
        means, foreground = self.info.class_mean, 1 - self.background
        if means is None or means[0] == means[1]:
            return {}
        channel = image.image[..., self.info.own_channels.start]
        mask = otsu_mask(channel, bright=means[foreground] > means[self.background])
        matrix = np.zeros((2, 2), np.int64)
        for rows in row_bands(len(label)):
            valid = np.s_[:] if image.valid is None else image.valid[rows]
            classes = np.where(mask[rows], foreground, self.background)
            matrix += metrics.confusion_matrix(label[rows][valid], classes[valid], 2)
        scores = metrics.confusion_scores(matrix, self.info.class_names)
        return scores | metrics.mask_scores(label != self.background, mask, valid=image.valid)

    def _object_scores(
        self,
        image: Segmented,
        label: np.ndarray,
        objects: np.ndarray,
        classes: np.ndarray,
        object_map: ObjectMap | None = None,
    ) -> Scores:
        """Mean of the object scores over the classes that have some, without the background."""
        of_class = []
        for k in range(self.info.num_class):
            if k != self.background:
                truth, proposal = metrics.number_segments(label == k, image.valid), objects * (classes == k)
                of_class.append(metrics.object_scores(truth, proposal))
                if object_map:
                    object_map.add(truth, proposal)
        return metrics.mean_scores(of_class)
