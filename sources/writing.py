"""What a database consists of: samples, the description with where they come from, the page, and the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from description import DataInfo, describe
from files import sha256
from images.profile import NUM_SAMPLED, compare, make_profile
from images.readers import read_geometry
from images.statistics import Moments
from progress import tracked
from samples import IGNORE, UNLABELLED, SampleFile, write_sample
from sources.labels import Classes
from sources.pairing import Pair
from training.weight_map import loss_of, save_distance
from utils import names_below, spread

Files = dict[str, list[Path]]  # of the samples of each split
Show = Callable[[Path, DataInfo, Files, list[str]], list[str]]  # writes the page; returns what looks wrong
Job = tuple[Path, Pair]  # a sample to write
Entries = dict[str, Any]  # of dataset.json


def write_samples(jobs: list[Job], classes: Classes) -> None:
    """Write the sample of each pair to its path, whose folder is that of its split."""
    for path, pair in tracked(jobs, "write"):
        write_sample_of(pair, path, pair.read(), classes)


def write_sample_of(pair: Pair, path: Path, image: np.ndarray, classes: Classes) -> None:
    """Write a sample with this image and the label of a pair."""
    path.parent.mkdir(exist_ok=True)
    label = None if pair.label is None else classes.indices(pair.label)[pair.window].astype(np.uint8)
    write_sample(path, image, label)
    if path.parent.name == "train" and label is not None and loss_of("auto", len(classes.values)) == "wbce":
        save_distance(SampleFile(path), label)  # computed once, so that a training need not


@dataclass(frozen=True)
class Contents:
    """A new database whose samples are written."""

    folder: Path
    files: Files
    classes: Classes
    context: int
    channels: list[str]  # names of those of the images; empty: unknown
    indexed: bool  # some of the images have a palette of colours
    entries: Entries  # of dataset.json, besides the description of the samples

    def complete(self, notes: list[str], warnings: list[str], show: Show) -> str:
        """Write the description and the page, and return the report, which has these lines, too."""
        moments = Moments()
        info = self._describe(moments)
        known = {name: value for name, value in asdict(info).items() if value is not None}
        text = json.dumps(known | {"labels": self.classes.reading._asdict()} | self.entries, indent=1)
        (self.folder / "dataset.json").write_text(text + "\n", "utf-8")
        if info.is_partial:
            notes = [*notes, f"annotated: {', '.join(annotated_shares(self.files))}"]
        if self.classes.left:
            num, left = np.sum([*self.classes.left.values()], axis=0)
            notes = [*notes, f"objects: {num} numbered, {left} left after a gap between those that touch"]
        warnings = show(self.folder, info, self.files, [*warnings, *self._unlike(info)])
        lines = report(self.files, info, [*notes, *(f"warning: {line}" for line in warnings)])
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (info.mean, moments.std.tolist()))
        return f"{lines}\nmean {mean}, standard deviation {std}"

    def _unlike(self, info: DataInfo) -> list[str]:
        """Lines on how the unlabelled images differ from those of the training."""
        files = self.files.get(UNLABELLED, [])
        if not files or info.profile is None:
            return []
        some = (SampleFile(files[n]).open()[0][..., info.own_channels] for n in spread(len(files), NUM_SAMPLED))
        sizes = [entry["pixel_size"] for entry in self.entries["samples"][UNLABELLED] if "pixel_size" in entry]
        profile = make_profile(some, self.channels, sizes, self.indexed)
        return compare(info.profile, profile, info.std[info.own_channels], "the unlabelled images", by_data=False)

    def _describe(self, moments: Moments) -> DataInfo:
        """Description of the samples of the training, or of the test if there are no others."""
        split = "train" if self.files["train"] else "test"
        files, classes = self.files[split], self.classes
        samples = (SampleFile(file).open() for file in tracked(files, "measure"))
        info = describe(samples, classes.values, classes.names, self.context, moments)
        some = (SampleFile(files[n]).open()[0][..., info.own_channels] for n in spread(len(files), NUM_SAMPLED))
        sizes = [entry["pixel_size"] for entry in self.entries["samples"][split] if "pixel_size" in entry]
        profile = make_profile(some, self.channels, sizes, self.indexed)
        info = replace(info, ignore=classes.ignore, profile=profile, gap=classes.gap)
        return info.checked(files[0], "scale the images, and save them again")


def annotated_shares(files: Files) -> list[str]:
    """Fraction of the labelled pixels of each split that is annotated, in words."""
    shares = []
    for split, paths in files.items():
        labels = (SampleFile(path).open()[1] for path in paths)
        counts = [(int((label != IGNORE).sum()), label.size) for label in labels if label is not None]
        valid, num = map(sum, zip(*counts, strict=True)) if counts else (0, 0)
        shares += [f"{valid / num:.1%} of {split}"] if num else []
    return shares


def report(files: Files, info: DataInfo, notes: list[str]) -> str:
    """Lines that describe the database."""
    first = SampleFile((files["train"] or files["test"])[0]).open()[0]
    sizes = sorted({SampleFile(path).open()[0].shape[:2] for paths in files.values() for path in paths})
    sides = ", ".join(f"{height} x {width}" for height, width in sizes[:5]) + (" ..." if len(sizes) > 5 else "")
    lines = [*notes, f"images: {sides} px, {info.nch_in} channel(s) of {first.dtype.name}"]
    pixels = "annotated pixels" if info.is_partial else "pixels"
    for index, value in enumerate(info.class_values):
        role = {0: " (background)", 1: " (foreground)" if info.num_class == 2 else ""}.get(index, "")
        words = f"{info.class_names[index]}, " + ("" if isinstance(value, str) else f"label value {value}, ")
        lines += [f"class {index}{role}: {words}{info.class_share[index]:.1%} of {pixels}"]
    return "\n".join(lines)


class Source(NamedTuple):
    """A file of images or labels, as the description names it."""

    name: str
    sha256: str
    pixel_size: tuple[float, float] | None  # height and width [µm] of an image, if the file gives it


def sources_of(pairs: Sequence[Pair], taken: Mapping[str, str] | None = None) -> dict[Path, Source]:
    """Files of images and labels; `taken` are the names by SHA-256 of the sources that a database has already."""
    taken = taken or {}
    images = {pair.input.path: read_geometry([pair.input]).pixel_size for pair in pairs}
    others = dict.fromkeys(path for pair in pairs for path in pair.files if path not in images)
    hashes = {path: sha256(path) for path in tracked([*images, *others], "hash")}
    names = {path: taken[digest] for path, digest in hashes.items() if digest in taken}
    for paths in (images, others):
        names |= names_below([path for path in paths if path not in names], taken.values())
    return {path: Source(names[path], digest, images.get(path)) for path, digest in hashes.items()}


def sample_entries(jobs: Iterable[Job], sources: Mapping[Path, Source]) -> list[Entries]:
    """What the description tells of each sample: file, source, page, channels, region, pixel size."""
    entries = []
    for path, pair in jobs:
        source = sources[pair.input.path]
        size = {"pixel_size": list(source.pixel_size)} if source.pixel_size else {}
        entries.append({"file": path.name, "source": source.name} | _origin(pair) | size)
    return entries


def source_entries(sources: Iterable[Source]) -> list[Entries]:
    """What the description tells of each source."""
    return [{"name": source.name, "sha256": source.sha256} for source in sources]


def _origin(pair: Pair) -> Entries:
    """What a sample is of its file: page, series such as a well, chosen channels; rows or columns of a region."""
    frame = pair.input
    entries: Entries = {"frame": frame.index}
    if frame.series:
        entries |= {"series": frame.series, "frame_of_series": frame.index_in_series}
    if frame.channels:
        entries["channels"] = list(frame.channels)
    for name, side in zip(("rows", "columns"), pair.window, strict=True):
        if side.stop is not None:
            entries[name] = [side.start, side.stop - 1]
    return entries
