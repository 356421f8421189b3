"""What a database shows of itself: numbers of its samples, and what looks wrong, in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from description import DataInfo, Origin
from evaluation.hints import FEW, hint
from images.statistics import LABEL_TILE, ObjectSizes
from progress import tracked
from samples import IGNORE, NUM_ROW, SPLIT_NAMES, SampleFile, digest_of
from utils import printable, spread

NUM_PIXEL = 2**18  # of an image, evenly spaced, that grey values are taken from
NUM_BIN = 64  # of a histogram
NUM_MEASURED = 100  # samples of a split whose objects and grey values are measured, evenly spaced
RARE = 1e-4  # share of the pixels below which a class may be a slip of the annotation
NEAR = 0.1  # standard deviations of an image that foreground and background differ by at least
THIN = 2  # [px] narrower objects can't be parted by a border of their own
NUM_NAMED = 3  # images that a warning names


@dataclass(frozen=True)
class Sample:
    """What is measured of one sample."""

    file: Path
    name: str  # of the original image
    shape: tuple[int, int]
    digest: bytes  # of the pixels of the image
    counts: np.ndarray | None  # (K,) pixels of each class; None without a label
    contrast: float | None = None  # mean of foreground less background [standard deviations]; None: not measured
    grey: np.ndarray = field(default_factory=lambda: np.zeros(0))  # values of the first channel, and of which class
    grey_class: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    areas: list[np.ndarray] = field(default_factory=list)  # [px] of the objects of each class
    num_object: int = 0  # of the foreground
    num_thin: int = 0  # of these, objects that are narrower than `THIN`


@dataclass(frozen=True)
class Review:
    """All samples of a database, and what looks wrong."""

    info: DataInfo
    samples: dict[str, list[Sample]]
    warnings: list[str]

    def shares(self, split: str) -> list[float]:
        """Share of the annotated pixels of each class in a split; empty without labels."""
        counts = [sample.counts for sample in self.samples[split] if sample.counts is not None]
        total = np.sum(counts, axis=0) if counts else np.zeros(0)
        return (total / total.sum()).tolist() if total.sum() else []

    def annotated(self, split: str) -> float:
        """Share of the pixels of a split that are annotated."""
        counts = [(each.counts.sum(), math.prod(each.shape)) for each in self.samples[split] if each.counts is not None]
        annotated, total = np.sum(counts, axis=0) if counts else (0, 1)
        return float(annotated / total)

    def areas(self, class_index: int) -> np.ndarray:
        """Areas [px] of the objects of a class in the samples that were measured, sorted."""
        found = [each.areas[class_index] for of in self.samples.values() for each in of if each.areas]
        return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def histogram(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Edges (NUM_BIN + 1,) of grey values, and for each class the share (NUM_BIN,) of its pixels between them.

        Of the first channel of the section itself; one line of all pixels without labels.
        """
        measured = [each for of in self.samples.values() for each in of if len(each.grey)]
        grey, classes = (np.concatenate([getattr(each, name) for each in measured]) for name in ("grey", "grey_class"))
        low, high = np.percentile(grey, (0.1, 99.9))
        if (grey == np.floor(grey)).all():  # bins of as many numbers each, else the line is a comb
            low, high = low - 0.5, low - 0.5 + NUM_BIN * math.ceil((high - low + 1) / NUM_BIN)
        edges = np.linspace(low, high if high > low else low + 1, NUM_BIN + 1)
        lines = [
            np.histogram(np.clip(grey[classes == k], low, high), edges)[0] for k in range(self.info.num_class or 1)
        ]
        return edges, [line / max(line.sum(), 1) for line in lines]


def review(
    info: DataInfo,
    files: Mapping[str, Sequence[Path]],
    origins: Callable[[str], Mapping[str, Origin]],
    notes: Sequence[str] = (),
) -> Review:
    """Measure the samples of each split; `notes` are warnings of what made them, which come first."""
    samples = {}
    for split, paths in files.items():
        of_split = origins(split)
        measured = {*spread(len(paths), NUM_MEASURED)}
        samples[split] = [
            _measure(info, path, of_split.get(path.name, Origin(path.name)).name, full=number in measured)
            for number, path in enumerate(tracked(paths, f"page, {split}"))
        ]
    rules = (_without_class, _rare, _few, _one_image, _turned, _thin, _twice)
    return Review(info, samples, [*notes, *(line for rule in rules for line in rule(info, samples))])


def _measure(info: DataInfo, path: Path, name: str, *, full: bool) -> Sample:
    """Measure one sample; `full`: also its objects and grey values."""
    image, label = SampleFile(path).open()
    counts = np.zeros(IGNORE + 1, np.int64)
    if label is not None:
        for top in range(0, len(label), NUM_ROW):  # in little memory
            counts += np.bincount(label[top : top + NUM_ROW].ravel(), minlength=IGNORE + 1)
    of_classes = None if label is None else counts[: info.num_class]
    sample = Sample(path, printable(name), image.shape[:2], digest_of(image), of_classes)
    return replace(sample, **_grey_values(info, image, label), **_objects(info, label)) if full else sample


def _grey_values(info: DataInfo, image: np.ndarray, label: np.ndarray | None) -> dict[str, Any]:
    """Grey values and their classes on a grid of the sample, and the contrast between foreground and background."""
    step = max(math.ceil(math.sqrt(image.shape[0] * image.shape[1] / NUM_PIXEL)), 1)
    grey = np.asarray(image[::step, ::step, info.own_channels.start], np.float64).ravel()
    if label is None:
        return {"grey": grey, "grey_class": np.zeros(len(grey), np.uint8)}
    classes = np.asarray(label[::step, ::step]).ravel()
    found: dict[str, Any] = {"grey": grey[classes != IGNORE], "grey_class": classes[classes != IGNORE]}
    inside, outside = grey[(classes > 0) & (classes != IGNORE)], grey[classes == 0]
    if len(inside) and len(outside) and grey.std() > 0:
        found["contrast"] = float((inside.mean() - outside.mean()) / grey.std())
    return found


def _objects(info: DataInfo, label: np.ndarray | None) -> dict[str, Any]:
    """Areas of the uncut objects of each class, and how many of the foreground are narrower than `THIN`."""
    if label is None:
        return {}
    sizes, num_object, num_thin = ObjectSizes(info.num_class), 0, 0
    part = np.asarray(label[:LABEL_TILE, :LABEL_TILE])  # objects look the same everywhere
    sizes.add(part)
    for k in range(1, info.num_class):
        regions, num = ndimage.label(part == k)
        is_wide = ndimage.binary_erosion(part == k, np.ones((THIN, THIN)), border_value=1)
        num_object += num
        num_thin += num - len(np.unique(regions[is_wide & (regions > 0)]))
    areas = [np.array(of_class, np.int64) for of_class in sizes.areas]
    return {"areas": areas, "num_object": num_object, "num_thin": num_thin}


Samples = Mapping[str, Sequence[Sample]]


def _named(samples: Sequence[Sample]) -> str:
    """The first of some images by name, and how many there are."""
    names = ", ".join(sample.name for sample in samples[:NUM_NAMED])
    return names + (f" and {len(samples) - NUM_NAMED} more" if len(samples) > NUM_NAMED else "")


def _total(samples: Sequence[Sample]) -> np.ndarray | None:
    """Pixels of each class of all samples; None without labels."""
    counts = [sample.counts for sample in samples if sample.counts is not None]
    return np.sum(counts, axis=0) if counts else None


def _without_class(info: DataInfo, samples: Samples) -> list[str]:
    """A split that lacks a class can't teach it, or can't score it."""
    lines = []
    for split, of_split in samples.items():
        total = _total(of_split)
        missing = [] if total is None else np.flatnonzero(total == 0).tolist()
        names = [f"class {k} ({info.class_names[k]})" for k in missing]
        lines += [
            f"no {SPLIT_NAMES[split]} sample has {name}: choose another --split, or annotate more" for name in names
        ]
    return lines


def _rare(info: DataInfo, samples: Samples) -> list[str]:
    """A class of hardly any pixels is a slip of the annotation more often than a class."""
    totals = [total for of_split in samples.values() if (total := _total(of_split)) is not None]
    if not totals or info.num_class < 3:
        return []
    total = np.sum(totals, axis=0)
    rare = [k for k in range(info.num_class) if 0 < total[k] < RARE * total.sum()]
    names = ", ".join(f"{info.class_names[k]} ({total[k]} px)" for k in rare)
    what = "have hardly a pixel, as slips of an annotation or blurred edges do"
    return [f"classes {names} {what}: check the values of the labels"] if rare else []


def _few(info: DataInfo, samples: Samples) -> list[str]:
    """Two classes with hardly an object to learn from."""
    labelled = [sample for sample in samples.get("train", ()) if sample.counts is not None]
    few = 0 < sum(sample.num_object for sample in labelled) < FEW and len(labelled) <= NUM_MEASURED
    return [hint("few")] if few and info.num_class == 2 else []


def _one_image(_info: DataInfo, samples: Samples) -> list[str]:
    """A network that has seen one image knows one."""
    labelled = [sample for sample in samples.get("train", ()) if sample.counts is not None]
    if len(labelled) != 1:
        return []
    return ["one training image: the network will know no other light, focus or density: annotate parts of several"]


def _turned(_info: DataInfo, samples: Samples) -> list[str]:
    """Images whose foreground is brighter than its background where it is darker in the others, or the reverse."""
    measured = [each for of_split in samples.values() for each in of_split if each.contrast is not None]
    if len(measured) < 3:
        return []
    contrast = np.array([each.contrast for each in measured])
    side = np.sign(np.median(contrast))
    others = (contrast * side < -NEAR).nonzero()[0]
    if abs(np.median(contrast)) < 2 * NEAR or not 0 < len(others) <= len(measured) / 4:
        return []
    usual = "brighter" if side > 0 else "darker"
    what = f"the foreground is {usual} than the background, but not in {_named([measured[n] for n in others])}"
    return [f"{what}: are their labels swapped, turned or shifted?"]


def _thin(_info: DataInfo, samples: Samples) -> list[str]:
    """Objects that a border of one pixel on each side would take whole."""
    measured = [each for of_split in samples.values() for each in of_split if each.areas]
    num_thin, num = (sum(getattr(each, name) for each in measured) for name in ("num_thin", "num_object"))
    if not num_thin or num_thin < 0.05 * num:
        return []
    return [f"{num_thin} of {num} objects are narrower than {THIN} px: are they specks, or the images too small?"]


def _twice(_info: DataInfo, samples: Samples) -> list[str]:
    """Images that lie in two splits: the network would be scored on what it has learnt by heart."""
    lines = []
    splits = list(samples)
    for number, one in enumerate(splits):
        for other in splits[number + 1 :]:
            seen = {sample.digest for sample in samples[one]}
            both = [sample for sample in samples[other] if sample.digest in seen]
            if both:
                what = f"{len(both)} image(s) of {other} lie in {one}, too ({_named(both)})"
                lines.append(f"{what}, so the scores tell nothing of new images: remove the copies")
    return lines
