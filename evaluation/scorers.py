"""Scores and pictures of the images of validation and test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from description import DataInfo, Origin, check_samples
from distributed import World
from evaluation import metrics
from evaluation.otsu import otsu_mask
from evaluation.pictures import (
    Pictures,
    image_name,
    label_picture,
    probability_picture,
    save_images,
    wrong_pixels,
)
from evaluation.results_page import Card
from evaluation.tables import Scores
from evaluation.thinning import LARGE
from images.drawing import input_picture
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
from prediction.tiling import Band
from samples import IGNORE, SampleFile, check_values
from utils import UserError, release_memory

Gather = Callable[[list], list]  # lists of all processes, joined
TALL = 512  # [px] rows of an image that are drawn or counted at a time
LEVEL = 1e-3  # of V_Info: a smaller difference is none
TOLERANCE = 1e-2  # of V_Info: single mergers in three images make such a difference (benchmarks/README.md)
SHARED = 2**23  # [px] that threads score at once: each needs up to 80 bytes for a pixel


@dataclass
class Segmented:
    """A sample and its segmentation.

    Attributes
    ----------
    index : int
        Its number.
    image : ndarray
        (H, W, C), mapped from the disk.
    label : ndarray of uint8 or None
        (H, W) class indices, and `IGNORE` where it is not annotated; None without any annotated pixel.
    probability : ndarray of float32
        (H, W) of class 1, or with more than two classes of the most probable one.
    classes : ndarray of uint8
        (H, W) most probable class.
    loss : float
        Mean cross entropy of the annotated pixels; 0 without a label.
    matrix : ndarray of int64
        (K, K) confusion matrix of the annotated pixels; of zeros without a label.
    valid : ndarray of bool or None
        (H, W) pixels that are annotated; None: all, or there is no label.
    """

    index: int
    image: np.ndarray
    label: np.ndarray | None
    probability: np.ndarray
    classes: np.ndarray
    loss: float
    matrix: np.ndarray
    valid: np.ndarray | None = None

    def foreground(self, background: int) -> np.ndarray:
        """Probability (H, W) of the one of two classes that is not the background."""
        return self.probability if background == 0 else 1 - self.probability


def open_sample(file: SampleFile, info: DataInfo) -> tuple[np.ndarray, np.ndarray | None]:
    """Image (H, W, C) and class indices (H, W) of a sample, after checking its values.

    Raises
    ------
    UserError
        The sample is damaged, or holds NaN, infinity or no class.
    """
    image, label = file.open(info.class_values)
    check_values(file.input, image, label, info.num_class, partial=info.is_partial)
    return image, None if label is None else np.ascontiguousarray(label, np.uint8)


def annotation(label: np.ndarray | None, info: DataInfo) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Label (H, W), None if no pixel of it is annotated, and which pixels are annotated, None if all are."""
    if label is None or not info.is_partial:
        return label, None
    valid = label != IGNORE
    return (label, None if valid.all() else valid) if valid.any() else (None, None)


def checked_samples(files: list[SampleFile], info: DataInfo, *, labelled: bool) -> list[SampleFile]:
    """The samples, after checking each of them.

    Raises
    ------
    UserError
        A sample is damaged, has other channels, or lacks a label where one is needed, or any annotated pixel of it.
    """
    check_samples(files, info, labelled=labelled)
    for file in files:
        label, _ = annotation(open_sample(file, info)[1], info)
        if labelled and label is None:
            raise UserError(f"{file.input}: no pixel is annotated, so it has no scores: make the database again")
    return files


def segment(
    predictor: Predictor,
    files: list[SampleFile],
    world: World,
    *,
    tta: bool,
    tile: int,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Segmented]:
    """Segment this process's part of the samples one by one, large ones in tiles.

    Parameters
    ----------
    predictor : Predictor
        The network.
    files : list of SampleFile
        Samples of all processes.
    world : World
        The processes that share them.
    tta, tile
        See `predict_array`.
    stop : callable
        Called after each band; True ends the iteration, and the image stays unfinished.

    Raises
    ------
    UserError
        A sample can't be used, or the output contains NaN.
    """
    num_class = predictor.info.num_class
    for index in range(world.rank, len(files), world.size):
        image, label = open_sample(files[index], predictor.info)
        label, valid = annotation(label, predictor.info)
        probability, classes = np.empty(image.shape[:2], np.float32), np.empty(image.shape[:2], np.uint8)
        matrix = np.zeros((num_class, num_class), np.int64)
        found = Segmented(index, image, label, probability, classes, 0.0, matrix, valid)
        try:
            bands = predictor.bands(image, predictor.tile_grid(image.shape, tile), tta=tta, every_class=True)
            with closing(bands.compute()) as computed:
                for band in computed:
                    if stop():
                        return
                    _add_band(found, band)
        except UserError as error:
            raise type(error)(f"{files[index].input}: {error}") from error
        yield found


def _add_band(image: Segmented, band: Band) -> None:
    """Enter the probability (K, h, W) of some rows, and what it adds to the loss and the confusion matrix."""
    rows, values, num_class = band.rows, band.values, len(image.matrix)
    image.classes[rows] = values.argmax(0)
    image.probability[rows] = values[1] if num_class == 2 else values.max(0)
    if image.label is not None:
        inside = np.s_[:] if image.valid is None else image.valid[rows]
        truth, found = image.label[rows][inside], image.classes[rows][inside]  # (h, W), or (P,) annotated pixels
        num_valid = image.label.size if image.valid is None else int(image.valid.sum())
        image.loss += _cross_entropy(values[:, inside], truth) / num_valid
        image.matrix += metrics.confusion_matrix(truth, found, num_class)


def _cross_entropy(probability: np.ndarray, label: np.ndarray) -> float:
    """Sum over the pixels of -log of the probability (K, ...) of the class of the label (...)."""
    of_label = np.take_along_axis(probability, label[None].astype(np.int64), 0)[0]
    return -float(np.log(np.maximum(of_label, np.finfo(np.float32).tiny)).sum(dtype=np.float64))


def pictures_of(image: Segmented, info: DataInfo) -> Pictures:
    """Pictures of an image: input, label if there is one, and output; made by rows, in little memory."""
    own = image.image[..., info.own_channels]

    def by_rows(draw: Callable[[slice], np.ndarray]) -> np.ndarray:
        return np.concatenate([draw(slice(top, top + TALL)) for top in range(0, len(own), TALL)])

    pictures = {"input": by_rows(lambda rows: input_picture(own[rows].astype(np.float32), info.value_range))}
    if image.label is not None:
        label, valid = image.label, image.valid
        pictures["label"] = by_rows(
            lambda rows: label_picture(label[rows], info.num_class, None if valid is None else valid[rows])
        )
    if info.num_class == 2:
        return pictures | {"output": by_rows(lambda rows: probability_picture(image.probability[rows]))}
    return pictures | {"output": by_rows(lambda rows: label_picture(image.classes[rows], info.num_class))}


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


class Challenge:
    """Scores of the ISBI 2012 challenge of a stack of images, from those of each image.

    Parameters
    ----------
    scores : list of dict
        `metrics.challenge_scores` of each image.
    """

    def __init__(self, scores: list[dict[str, np.ndarray]]) -> None:
        self.scores = scores

    @property
    def counts(self) -> np.ndarray:
        """`metrics.threshold_counts` (2, 127) of all images."""
        return np.sum([scores["counts"] for scores in self.scores], axis=0)

    def means(self, name: str) -> np.ndarray:
        """Mean over the images of a score at each threshold, (T,)."""
        return np.mean([scores[name] for scores in self.scores], axis=0)

    @property
    def best_threshold(self) -> float:
        """Threshold to segment at: the middle of those whose V_Info is as good as the best, up to single mergers.

        V_Info finds the threshold where cells touch. Where objects lie apart, it is level over many thresholds, since
        it depends only on the segment of each pixel, not on the size of objects; there the pixel error decides. 0.5 if
        no image has foreground.
        """
        decisive = [scores["v_info"] for scores in self.scores if scores["rand_counts"][0, 1] > 0]
        if not decisive:
            return 0.5
        v_info, error = np.mean(decisive, axis=0), np.round(self.means("pixel_error"), 12)
        good = [k for k, value in enumerate(v_info) if value >= v_info.max() - TOLERANCE]
        first = last = middle = min(good[(len(good) - 1) // 2 : len(good) // 2 + 1], key=lambda k: error[k])
        level = np.abs(v_info - v_info[middle]) <= LEVEL
        while first > 0 and level[first - 1]:
            first -= 1
        while last < len(level) - 1 and level[last + 1]:
            last += 1
        return metrics.THRESHOLDS[min(range(first, last + 1), key=lambda k: (error[k], abs(k - middle)))]

    def summary(self) -> Scores:
        """Maximum over the thresholds of the mean V_Rand and V_Info, least pixel error, and the Rand error."""
        return {
            "max_v_rand": float(self.means("v_rand").max()),
            "max_v_info": float(self.means("v_info").max()),
            "min_pixel_error": float(self.means("pixel_error").min()),
            "rand_error": metrics.rand_error(np.sum([scores["rand_counts"] for scores in self.scores], axis=0)),
        }


class SegmentScorer:
    """Scores the segments of images of two classes as the challenge does, at nine thresholds.

    Parameters
    ----------
    background : int
        Index of the background class.
    """

    def __init__(self, background: int) -> None:
        self.background = background
        self._images: list[tuple[int, dict[str, np.ndarray]]] = []

    def __call__(self, image: Segmented) -> None:
        """Add an image with a label."""
        assert image.label is not None
        foreground, inside, valid = image.foreground(self.background), image.label != self.background, image.valid
        with scoring_threads(foreground.size) as threads:
            counts = metrics.threshold_counts(inside, foreground, valid)
            scores = metrics.challenge_scores(inside, foreground, valid=valid, mapped=threads.map)
        self._images.append((image.index, scores | {"counts": counts}))

    def finish(self, gather: Gather = list) -> Challenge:
        """Scores of the images of all processes, in their order."""
        return Challenge([scores for _, scores in sorted(gather(self._images), key=lambda pair: pair[0])])


class ValidationScorer:
    """Scores the pixels of images, and keeps pictures if wanted.

    Parameters
    ----------
    info : DataInfo
        Classes.
    pictures : bool
        Keep those of the first image.

    Attributes
    ----------
    losses : list of float
        Of each image, after `finish`.
    """

    def __init__(self, info: DataInfo, *, pictures: bool) -> None:
        self.info = info
        self.pictures: Pictures | None = {} if pictures else None
        self._seen: list[tuple[int, float, np.ndarray]] = []

    def __call__(self, image: Segmented) -> None:
        """Add an image with a label."""
        if self.pictures == {}:
            self.pictures = pictures_of(image, self.info)
        self._seen.append((image.index, image.loss, image.matrix))

    def finish(self, gather: Gather = list) -> None:
        """Gather the images of all processes, in order."""
        rows = sorted(gather(self._seen), key=lambda row: row[0])
        self.losses, self._matrices = [row[1] for row in rows], [row[2] for row in rows]

    def scores(self, challenge: Challenge | None = None) -> Scores:
        """Mean scores, under the names of their curves: TensorBoard groups them by the part before the slash."""
        rows = [metrics.confusion_scores(matrix, self.info.class_names) for matrix in self._matrices]
        scores = metrics.mean_scores(rows) | (challenge.summary() if challenge else {})
        return {"loss/val": float(np.mean(self.losses))} | {
            name.replace("_", "/", 1) if name.startswith(("dice_", "iou_", "max_")) else name: value
            for name, value in scores.items()
        }


@dataclass
class ImageScores:
    """Scores of a tested image.

    Attributes
    ----------
    index : int
        Its number.
    scores, baseline, otsu : dict of str to float
        Its scores, those of always predicting the majority class, and those of Otsu's threshold; empty without a label,
        `otsu` also if that does not apply.
    challenge : dict of str to ndarray or None
        `metrics.challenge_scores` of an image of two classes.
    predicted : set of int
        Classes that any pixel was predicted as.
    matrix : ndarray of int64
        (K, K) confusion matrix of the annotated pixels.
    annotated : float
        Fraction of its pixels that are annotated.
    shape : (int, int)
        Height and width [px].
    wrong : list of int
        Number of wrong pixels of the output's picture for each threshold (`wrong_pixels`) in an image of two classes.
    """

    index: int
    predicted: set[int]
    shape: tuple[int, int]
    matrix: np.ndarray
    annotated: float = 1.0
    scores: Scores = field(default_factory=dict)
    baseline: Scores = field(default_factory=dict)
    otsu: Scores = field(default_factory=dict)
    challenge: dict[str, np.ndarray] | None = None
    wrong: list[int] = field(default_factory=list)


class TestScorer:
    """Writes the pictures of each tested image, and keeps its scores.

    Parameters
    ----------
    folder : Path
        Where the pictures go.
    files : list of SampleFile
        The samples; `Segmented.index` counts them.
    predictor : Predictor
        Classes, background, and the threshold: with two classes, segments and objects are scored where the probability
        of the foreground is greater. Pixels count for the most probable class.
    object_filter : ObjectFilter
        Which of the objects found are scored.
    origins : dict of str to Origin
        Origin of each sample by the name of its file, where it is known.

    Attributes
    ----------
    images : list of ImageScores
        In their order, after `finish`.
    predicted : set of int
        Classes that any pixel was predicted as.
    """

    __test__ = False  # no test of pytest's

    def __init__(
        self,
        folder: Path,
        files: list[SampleFile],
        predictor: Predictor,
        object_filter: ObjectFilter = KEEP_ALL,
        origins: dict[str, Origin] | None = None,
    ) -> None:
        self.folder, self.files, self.info, self.object_filter = folder, files, predictor.info, object_filter
        self.origins = origins or {}
        self.background, self.threshold = predictor.background, predictor.object_threshold
        self.images: list[ImageScores] = []
        self.predicted: set[int] = set()
        self.majority = int(np.argmax(self.info.class_share))
        self.challenge = Challenge([])

    def __call__(self, image: Segmented) -> None:
        """Add an image."""
        predicted = set(np.flatnonzero(np.bincount(image.classes.ravel())).tolist())
        found = ImageScores(image.index, predicted, image.classes.shape, image.matrix)
        self.images.append(found)
        with scoring_threads(image.classes.size) as threads:
            saved = threads.submit(self._save_pictures, image)
            if image.label is not None:
                self._add_scores(found, image, image.label, threads)
            saved.result()

    def _save_pictures(self, image: Segmented) -> None:
        """Write the pictures of an image."""
        save_images(self.folder, image.index, pictures_of(image, self.info))

    def _add_scores(self, found: ImageScores, image: Segmented, label: np.ndarray, threads: Executor) -> None:
        """Enter the scores of an image with a label."""
        valid, two = image.valid, self.info.num_class == 2
        if two:
            inside, foreground = label != self.background, image.foreground(self.background)
            found.challenge = metrics.challenge_scores(inside, foreground, valid=valid, mapped=threads.map)
            output = probability_picture(image.probability)
            found.wrong = wrong_pixels(inside, output if self.background == 0 else 255 - output, valid)
            del inside, foreground, output  # up to six bytes per pixel that the next scores need themselves
        own = threads.submit(self._scores, label, valid, image.matrix, image)
        baseline = threads.submit(self._scores, label, valid, self._majority_matrix(image.matrix), None)
        if two:
            found.otsu = threads.submit(self._otsu_scores, image.image, label, valid).result()
        found.annotated = 1.0 if valid is None else float(valid.mean())
        found.scores, found.baseline = {"loss": image.loss} | own.result(), baseline.result()

    def _majority_matrix(self, matrix: np.ndarray) -> np.ndarray:
        """Confusion matrix of always predicting the majority class."""
        answer = np.zeros_like(matrix)
        answer[:, self.majority] = matrix.sum(1)
        return answer

    def _otsu_scores(self, image: np.ndarray, label: np.ndarray, valid: np.ndarray | None) -> Scores:
        """Scores of Otsu's threshold; the class that was brighter in training is above it. Empty if neither was."""
        means = self.info.class_mean
        if means is None or means[0] == means[1]:
            return {}
        foreground = 1 - self.background
        mask = otsu_mask(image[..., self.info.own_channels.start], bright=means[foreground] > means[self.background])
        matrix = np.zeros((2, 2), np.int64)
        for rows in (slice(top, top + TALL) for top in range(0, len(label), TALL)):
            inside = np.s_[:] if valid is None else valid[rows]
            classes = np.where(mask[rows], foreground, self.background)
            matrix += metrics.confusion_matrix(label[rows][inside], classes[inside], 2)
        scores = metrics.confusion_scores(matrix, self.info.class_names)
        return scores | metrics.mask_scores(label != self.background, mask, valid=valid)

    def finish(self, gather: Gather = list) -> None:
        """Gather the images of all processes, in order."""
        self.images = sorted(gather(self.images), key=lambda image: image.index)
        self.challenge = Challenge([image.challenge for image in self.images if image.challenge is not None])
        self.predicted = set().union(*(image.predicted for image in self.images))

    def _scores(
        self, label: np.ndarray, valid: np.ndarray | None, matrix: np.ndarray, image: Segmented | None
    ) -> Scores:
        """Scores of an image, or (None) of always predicting the majority class: of pixels, segments and objects."""
        scores = metrics.confusion_scores(matrix, self.info.class_names)
        if self.info.num_class == 2:
            inside, whole = label != self.background, np.full(label.shape, self.majority != self.background)
            if image is None:
                return scores | metrics.mask_scores(inside, whole, valid=valid)
            probability = image.foreground(self.background)
            mask, bands = probability > self.threshold, separate_bands(probability, self.threshold)
            found = filter_objects(join_bands(bands, label.shape), self.object_filter)
            return scores | metrics.mask_scores(inside, mask, found, valid)
        classes = np.full(label.shape, self.majority, np.uint8) if image is None else image.classes
        class_ids = foreground_class_ids(classes, self.background)
        probability = np.ones(label.shape, np.float32) if image is None else image.probability
        found = join_bands(separate_bands(probability, self.threshold, class_ids=class_ids), label.shape)
        if image is not None and self.object_filter.is_active:
            found, objects = filter_objects(found, self.object_filter), ObjectList()
            objects.add(found, class_ids)
            classes = objects.class_id[found] - np.uint8(1)  # also of filled holes
        return scores | self._object_scores(label, valid, found, classes)

    def _object_scores(
        self, label: np.ndarray, valid: np.ndarray | None, found: np.ndarray, classes: np.ndarray
    ) -> Scores:
        """Mean of the object scores of each class but the background."""
        of_class = [
            metrics.object_scores(metrics.number_segments(label == k, valid), found * (classes == k))
            for k in range(self.info.num_class)
            if k != self.background
        ]
        return metrics.mean_scores(of_class)

    @property
    def is_partial(self) -> bool:
        """Whether any image has pixels that are not annotated."""
        return any(image.annotated < 1 for image in self.images)

    @property
    def matrix(self) -> np.ndarray:
        """Confusion matrix (K, K) of all images; row: class of the label, column: class of the output."""
        return np.sum([image.matrix for image in self.images], axis=0)

    @property
    def _contrast(self) -> str:
        """Text with the channels of the input that are shown, and their grey values that become black and white."""
        num = self.info.num_own
        of = "input" if num in (1, 3) else f"channel 1 of {num} of the input"
        pairs = np.reshape(self.info.value_range, (-1, 2)).tolist()
        return f"{of} shown from " + ", ".join(f"{low:.4g} to {high:.4g}" for low, high in pairs)

    @property
    def legend(self) -> str:
        """Text with the classes, and the threshold of each kind of score."""
        pairs = zip(self.info.class_names, self.info.class_values, strict=True)
        of = [name if name == str(value) else f"{name} = {value}" for name, value in pairs]
        shown = self._contrast
        shown += "; grey in a label is not annotated" if self.is_partial else ""
        shown += f"; objects {self.object_filter}" if self.object_filter.is_active else ""
        if len(of) > 2:
            return f"classes {', '.join(of)}; background is {self.info.class_names[self.background]}; {shown}"
        foreground = f"foreground is {self.info.class_names[1 - self.background]}"
        return f"classes {', '.join(of)}; {foreground}; pixels at 0.5, segments at {self.threshold:g}; {shown}"

    def summary(self) -> dict[str, Any]:
        """Classes, thresholds, mean scores, baselines, the challenge's maxima over the thresholds, confusion matrix."""
        two = self.info.num_class == 2
        return {
            "classes": dict(zip(self.info.class_names, self.info.class_values, strict=True)),
            "foreground": self.info.class_names[1 - self.background] if two else None,
            "background": self.info.class_names[self.background],
            "pixel_threshold": 0.5 if two else None,
            "segment_threshold": self.threshold if two else None,
            "mean": metrics.mean_scores([image.scores for image in self.images]),
            "majority_class": self.info.class_names[self.majority],
            "majority": metrics.mean_scores([image.baseline for image in self.images if image.baseline]),
            "baseline_otsu": metrics.mean_scores([image.otsu for image in self.images if image.otsu]) or None,
            "challenge": self.challenge.summary() if self.challenge.scores else None,
            "confusion_matrix": {"names": self.info.class_names, "counts": self.matrix.tolist()},
        } | (self.object_filter._asdict() if self.object_filter.is_active else {})

    @property
    def rows(self) -> list[dict[str, str | float]]:
        """Number, sample, source and scores of each image, and the fraction that is annotated if that is not all."""
        rows: list[dict[str, str | float]] = []
        is_partial = self.is_partial
        for image in self.images:
            sample = self.files[image.index].input.name
            source = {"source": self.origins[sample].name} if sample in self.origins else {}
            names = {"image": image_name(image.index), "sample": sample, **source}
            annotated = {"annotated": image.annotated} if is_partial and image.scores else {}
            rows.append({**names, **annotated, **image.scores})
        return rows

    def cards(self) -> list[Card]:
        """The images as the page shows them."""
        cards = []
        for image in self.images:
            sample = self.files[image.index].input.name
            origin = self.origins.get(sample, Origin(""))
            shown = (image_name(image.index), sample, image.shape, image.scores, origin.name, origin.pixel_size)
            cards.append(Card(*shown, image.wrong, image.annotated if image.scores else 1.0))
        return cards

    def table(self) -> list[dict[str, str | float]]:
        """Rows of the images, of their mean, of always predicting the majority class, and of Otsu's threshold."""
        summary = self.summary()
        last = {"mean": summary["mean"], f"all {summary['majority_class']}": summary["majority"]}
        last["otsu"] = summary["baseline_otsu"]
        return self.rows + [{"image": name, "sample": ""} | scores for name, scores in last.items() if scores]
