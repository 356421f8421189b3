"""Run the network on the samples of validation and test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from description import DataInfo, check_samples
from distributed import World
from evaluation.metrics import confusion_matrix
from evaluation.pictures import Pictures, label_picture, probability_picture, row_bands
from images.drawing import input_picture, picture_range
from prediction.predictor import Predictor
from prediction.tiling import Band
from progress import Progress
from samples import IGNORE, SampleFile, check_values
from utils import UserError


@dataclass
class Segmented:
    """A sample and its segmentation."""

    index: int  # number of the sample
    image: np.ndarray  # (H, W, C), mapped from the disk
    label: np.ndarray | None  # (H, W) class indices, `IGNORE` where not annotated; None without any annotated pixel
    probability: np.ndarray  # (H, W) float32 of class 1, or with more than two classes of the most probable one
    classes: np.ndarray  # (H, W) uint8, the most probable class
    loss: float  # mean cross entropy of the annotated pixels; 0 without a label
    matrix: np.ndarray  # (K, K) confusion matrix of the annotated pixels; of zeros without a label
    valid: np.ndarray | None = None  # (H, W) of bool, the annotated pixels; None: all, or there is no label

    def foreground(self, background: int) -> np.ndarray:
        """Probability (H, W) of the one of two classes that is not the background."""
        return self.probability if background == 0 else 1 - self.probability

    def pictures(self, info: DataInfo) -> Pictures:
        """Pictures of the input, the label if there is one, and the output."""
        image = self.image[..., info.own_channels]
        contrast = picture_range(image)
        bands = [input_picture(image[rows].astype(np.float32), contrast) for rows in row_bands(len(image))]
        pictures = {"input": np.concatenate(bands)}
        if self.label is not None:
            pictures["label"] = label_picture(self.label, info.num_class, self.valid)
        if info.num_class == 2:
            drawn = [probability_picture(self.probability[rows]) for rows in row_bands(len(image))]  # in little memory
            return pictures | {"output": np.concatenate(drawn)}
        return pictures | {"output": label_picture(self.classes, info.num_class)}


def _read(file: SampleFile, info: DataInfo) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Image, label and annotated pixels of a sample as in `Segmented`, after checking its values."""
    image, label = file.open(info.class_values)
    check_values(file.input, image, label, info.num_class, partial=info.is_partial)
    if label is None:
        return image, None, None
    label = np.ascontiguousarray(label, np.uint8)
    valid = label != IGNORE if info.is_partial else None
    if valid is None or valid.all():
        return image, label, None
    return (image, label, valid) if valid.any() else (image, None, None)


def checked_samples(files: list[SampleFile], info: DataInfo, *, labelled: bool) -> list[SampleFile]:
    """The samples, if each can be used, and has an annotated pixel where `labelled` ones are needed."""
    check_samples(files, info, labelled=labelled)
    for file in files:
        _, label, _ = _read(file, info)
        if labelled and label is None:
            raise UserError(f"{file.input}: no pixel is annotated, so it has no scores: make the database again")
    return files


def have_foreground(files: list[SampleFile], info: DataInfo, background: int) -> bool:
    """Whether any label has an annotated pixel of another class than the background."""
    labels = (_read(file, info)[1] for file in files)
    return any(label is not None and np.isin(label, (background, IGNORE), invert=True).any() for label in labels)


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

    `tta` and `tile` are those of `predict_array`. `stop` is called after each band; True ends the iteration, and the
    image stays unfinished.
    """
    info = predictor.info
    indices = range(world.rank, len(files), world.size)
    with Progress(len(indices), "score") as progress:
        for index in indices:
            image, label, valid = _read(files[index], info)
            probability, classes = np.empty(image.shape[:2], np.float32), np.empty(image.shape[:2], np.uint8)
            matrix = np.zeros((info.num_class, info.num_class), np.int64)
            segmented = Segmented(index, image, label, probability, classes, 0.0, matrix, valid)
            try:
                bands = predictor.bands(image, predictor.tile_grid(image.shape, tile), tta=tta, every_class=True)
                with closing(bands.compute()) as computed:
                    for band in computed:
                        if stop():
                            return
                        _add_band(segmented, band)
                        progress.update(len(image[band.rows]) / len(image))
            except UserError as error:
                raise type(error)(f"{files[index].input}: {error}") from error
            yield segmented


def _add_band(image: Segmented, band: Band) -> None:
    """Enter the probability (K, h, W) of some rows, and what it adds to the loss and the confusion matrix."""
    rows, values, num_class = band.rows, band.values, len(image.matrix)
    image.classes[rows] = values.argmax(0)
    image.probability[rows] = values[1] if num_class == 2 else values.max(0)
    if image.label is None:
        return
    valid = np.s_[:] if image.valid is None else image.valid[rows]
    num_valid = image.label.size if image.valid is None else int(image.valid.sum())
    label = image.label[rows][valid]  # (h, W), or (P,) annotated pixels
    image.matrix += confusion_matrix(label, image.classes[rows][valid], num_class)
    of_label = np.take_along_axis(values[:, valid], label[None].astype(np.int64), 0)  # probability of the label's class
    cross_entropy = np.log(np.maximum(of_label[0], np.finfo(np.float32).tiny)).sum(dtype=np.float64)
    image.loss -= float(cross_entropy) / num_valid
