"""Pair images with their labels, and check that they can form one database."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from string import digits

import numpy as np

from images.readers import ALL, Frame, Source, files_of, is_one_file, list_frames, with_neighbours
from images.rows import listed
from images.selection import Choice
from progress import tracked
from samples import check_values
from sources.labels import Label, Masks
from sources.scan import is_colour
from utils import UserError, echo, num_common


@dataclass(frozen=True)
class Pair:
    """An image and the image with its labels, if there is one."""

    input: Frame
    label: Label | None
    stack: tuple[Frame, ...] = ()  # sections that become channels of the sample; empty: the image only
    channels: int = 0  # 1 or 3 to convert the image to grey or RGB; 0: all channels as they are
    window: tuple[slice, slice] = (slice(None), slice(None))  # rows and columns of the image that are the sample

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the image."""
        height, width = self.input.open().shape[:2]
        return height, width

    def read(self) -> np.ndarray:
        """Pixels (H, W, C) of the sample: the image, or the sections of `stack` concatenated along the channels."""
        sections = []
        for frame in self.stack or (self.input,):
            pixels = frame.read()[self.window]
            if self.channels > pixels.shape[2]:  # grey becomes RGB
                pixels = np.repeat(pixels, self.channels, axis=2)
            sections.append(pixels[..., : self.channels or None])  # of RGB without colours, one is enough
        return np.concatenate(sections, axis=-1)

    def image(self) -> np.ndarray:
        """Pixels (H, W, C) of the sample without its neighbouring sections."""
        return replace(self, stack=()).read()

    @property
    def files(self) -> list[Path]:
        """Files of the image and its labels."""
        labels = self.label.frames if isinstance(self.label, Masks) else [self.label] if self.label else []
        return files_of([self.input, *labels])


def list_pairs(
    source: Source, target: Source | None, choice: Choice = ALL, *, labelled_only: bool = False
) -> list[Pair]:
    """Images with their labels: pages of stacks in order, files of folders by name.

    With `labelled_only`, files may have no label.

    Labels of all series and sections, or of all sections, are chosen like the images; other labels must be those of the
    chosen images.
    """
    images = list_frames(source, choice)
    if target is None:
        return [Pair(image, None) for image in images]
    labels, labelled = list_frames(target), images
    are_stacks = is_one_file(source) or is_one_file(target)
    wider = (replace(choice, series="", section=""), replace(choice, section=""))
    for other in () if choice.takes_all_frames else wider:
        try:
            candidates = list_frames(source, other)
        except UserError:  # such as a file of several data sets, one of which must be chosen
            continue
        if not are_stacks:
            candidates = _without_labels(candidates, labels)
        if len(candidates) == len(labels):
            labelled = candidates
            break
    names = [str(of) if isinstance(of, str | Path) else f"{len(of)} paths from {of[0]} on" for of in (source, target)]
    if are_stacks:
        pairs = _pairs_of_stacks(labelled, labels, names)
    else:
        pairs = _pairs_of_files(labelled, labels, names, labelled_only)
    chosen = {(image.path, image.index) for image in images}
    return [pair for pair in pairs if (pair.input.path, pair.input.index) in chosen]


def _pairs_of_stacks(images: list[Frame], labels: list[Frame], names: list[str]) -> list[Pair]:
    """Pairs of pages in their order; `names` are those of the sources of images and labels."""
    if len(images) != len(labels):
        what = f"{names[0]} has {len(images)} pages, {names[1]} has {len(labels)}"
        raise UserError(f"{what}: each page needs one label{colour_hint(images)}{colour_hint(labels)}")
    return [Pair(image, label) for image, label in zip(images, labels, strict=True)]


def _pairs_of_files(images: list[Frame], labels: list[Frame], names: list[str], labelled_only: bool) -> list[Pair]:
    """Pairs of files by folder or name; `names` are those of the sources of images and labels."""
    unlabelled = _without_labels(images, labels)
    if not unlabelled:
        raise UserError(f"{names[1]}: all images of {names[0]} are also labels: give only the images to --input")
    if len(unlabelled) < len(images):
        what = f"{len(images) - len(unlabelled)} image(s) of {names[0]} are matched by {names[1]}"
        echo(f"{what}: used as labels only")
    by_folder = _pairs_by_folder(unlabelled, labels, labelled_only)
    return by_folder or _pairs_by_name(unlabelled, labels, names, labelled_only)


def colour_hint(frames: list[Frame]) -> str:
    """Advice for a single image with several channels, which may be sections."""
    channels = frames[0].open().shape[2]
    if len(frames) > 1 or channels < 3:
        return ""
    return (
        f"; {frames[0].path} is one image of {channels} channels: if these are sections, save them along Z (ImageJ:"
        " Image > Properties; Python: tifffile.imwrite(path, stack, imagej=True, metadata={'axes': 'ZYX'}))"
    )


def _without_labels(images: list[Frame], labels: list[Frame]) -> list[Frame]:
    """Images without those that are also labels, such as `*_mask.tif` among `*.tif`."""
    also_labels = {(label.path, label.index) for label in labels}
    return [image for image in images if (image.path, image.index) not in also_labels]


def _pairs_by_folder(images: list[Frame], labels: list[Frame], labelled_only: bool) -> list[Pair]:
    """Pairs of images with one folder each and one mask per object, `ID/images/*` and `ID/masks/*`; else none."""
    masks: dict[Path, list[Frame]] = defaultdict(list)
    for label in labels:
        masks[label.path.parent.parent].append(label)
    folders = [image.path.parent.parent for image in images]
    of_all = masks.keys() <= {*folders} if labelled_only else masks.keys() == {*folders}
    if not of_all or len(set(folders)) < len(images) or len(labels) <= len(masks):
        return []
    echo(f"{len(labels)} masks of {len(masks)} images: one per object, touching ones separated as by --objects on")
    pairs = zip(images, folders, strict=True)
    return [Pair(image, Masks(tuple(masks[folder])) if folder in masks else None) for image, folder in pairs]


def _pairs_by_name(images: list[Frame], labels: list[Frame], names: list[str], labelled_only: bool) -> list[Pair]:
    """Pairs of frames with equal keys, by the rule of `KEYS` that pairs the most; `names` are those of both sources."""
    ways = [(_by_key(images, rule, labelled_only), _by_key(labels, rule)) for rule in KEYS]
    of_images, of_labels = max(ways, key=lambda way: len(way[0].keys() & way[1].keys()))
    label_of = {of_images[key]: of_labels[key] for key in of_images.keys() & of_labels.keys()}
    no_label = [frame for frame in images if frame not in label_of]
    with_image = {*label_of.values()}
    no_image = [label for label in labels if label not in with_image]
    unpaired = [str(frame) for frame in (*([] if labelled_only else no_label), *no_image)]
    if unpaired:
        more = f" and {len(unpaired) - 10} more" if len(unpaired) > 10 else ""
        advice = f"give an image in {names[0]} and its label in {names[1]} the same name"
        advice += "" if no_image else ", or add --labelled_only to leave out images without a label"
        raise UserError(f"no partner for {', '.join(unpaired[:10])}{more}: {advice}")
    return [Pair(frame, label_of.get(frame)) for frame in images]


def _by_key(
    frames: list[Frame], rule: Callable[[list[Path]], list[str]], unique: bool = False
) -> dict[tuple[str, int], Frame]:
    """Frames by the key of their file, and their number among the frames of that file; `unique`: where one has it."""
    counts: Counter[Path] = Counter()
    frames_of: dict[tuple[str, int], list[Frame]] = defaultdict(list)
    for key, frame in zip(rule([frame.path for frame in frames]), frames, strict=True):
        frames_of[key, counts[frame.path]].append(frame)
        counts[frame.path] += 1
    return {key: members[-1] for key, members in frames_of.items() if len(members) == 1 or not unique}


def _differences(stems: list[str]) -> list[str]:
    """Names without their common prefix and suffix, which never split a number, and without leading zeros.

    Examples
    --------
    >>> _differences(["21_manual1", "22_manual1"]), _differences(["cell007", "cell012"])
    (['21', '22'], ['7', '12'])
    """
    prefix = stems[0][: num_common(stems)].rstrip(digits)
    backwards = [stem[::-1] for stem in stems]
    suffix = backwards[0][: num_common(backwards)][::-1].lstrip(digits)
    return [stem.removeprefix(prefix).removesuffix(suffix).lstrip("0") for stem in stems]


def _last_number(stem: str) -> str:
    """Last number in a name without leading zeros; the name itself if it has none."""
    return [stem, *re.findall(r"\d+", stem)][-1].lstrip("0")


KEYS: list[Callable[[list[Path]], list[str]]] = [  # what a file and its label have in common
    lambda paths: [path.stem for path in paths],
    lambda paths: _differences([path.stem for path in paths]),
    lambda paths: [_last_number(path.stem) for path in paths],
    lambda paths: [path.parent.name for path in paths],
]


def with_context(pairs: list[Pair], context: int) -> list[Pair]:
    """Pairs with the neighbouring sections of their images as additional channels."""
    stacks = with_neighbours([pair.input for pair in pairs], context)
    return [replace(pair, stack=tuple(frames)) for pair, frames in zip(pairs, stacks, strict=True)]


def left_out(pairs: list[Pair]) -> list[str]:
    """Line for the report on the images that `--labelled_only` leaves out."""
    num = sum(pair.label is None for pair in pairs)
    what = f"left out: {num} image(s) without a label, which predict can segment, and --unlabelled learns from"
    return [what] if num else []


def check_pairs(pairs: list[Pair]) -> list[Pair]:
    """Pairs that can form one database; a mix of grey and RGB images is converted to one."""
    by_channels: dict[int, list[Frame]] = defaultdict(list)
    first, blank = pairs[0].input, []
    dtype = first.open().dtype
    for pair in tracked(pairs, "check"):
        image = pair.input.read()
        check_values(pair.input, image, None, 0)
        blank += [pair.input] if image.min() == image.max() else []
        if image.dtype.name != dtype.name:
            raise UserError(f"{pair.input} is {image.dtype.name}, {first} {dtype.name}: convert them to one type")
        by_channels[image.shape[2]].append(pair.input)
        for frame in pair.stack:
            if frame.open().shape[:2] != image.shape[:2]:
                what = f"{frame} has shape {frame.open().shape[:2]}, {pair.input} {image.shape[:2]}"
                raise UserError(f"{what}: neighbouring sections of --context must be of one size")
        if pair.label and (size := pair.label.read().shape[:2]) != image.shape[:2]:
            what = f"{pair.label} has (height, width) {size}, {pair.input} {image.shape[:2]}"
            raise UserError(f"{what}: they must agree")
    if blank:
        echo(f"warning: {len(blank)} image(s) have one value everywhere, {listed(blank)}: check how they were saved")
    return pairs if len(by_channels) == 1 else _convert(pairs, by_channels)


def _convert(pairs: list[Pair], by_channels: dict[int, list[Frame]]) -> list[Pair]:
    """Pairs with all images as RGB, or as grey if no RGB image contains a colour."""
    if by_channels.keys() != {1, 3}:
        numbers = ", ".join(f"{frames[0]} has {channels} channel(s)" for channels, frames in by_channels.items())
        raise UserError(f"{numbers}: convert them to the same number")
    has_colours = any(is_colour(frame.read()) for frame in by_channels[3])
    change = ": grey images are converted to RGB" if has_colours else " without colours: these are converted to grey"
    echo(f"{len(by_channels[1])} image(s) are grey, {len(by_channels[3])} RGB{change}")
    return [replace(pair, channels=3 if has_colours else 1) for pair in pairs]
