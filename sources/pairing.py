"""Pair images with their labels, and check that they can form one database."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from string import digits

import numpy as np
from tqdm import tqdm

from images.readers import ALL, Frame, Source, files_of, is_one_file, list_frames, with_neighbours
from images.rows import listed
from images.selection import Choice
from samples import check_values
from sources.labels import Label, Masks, is_colour
from utils import UserError, echo


@dataclass(frozen=True)
class Pair:
    """An image and the image with its labels, if there is one.

    Attributes
    ----------
    input : Frame
        The image.
    label : Frame, Masks or None
        Its labels.
    stack : tuple of Frame
        The sections that become channels of the sample; empty: the image only.
    channels : int
        1 or 3 to convert the image to grey or RGB; 0: keep its channels.
    window : (slice, slice) or None
        Rows and columns of the image that are the sample; None: all.
    """

    input: Frame
    label: Label | None
    stack: tuple[Frame, ...] = ()
    channels: int = 0
    window: tuple[slice, slice] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the sample."""
        height, width = self.input.open().shape[:2]
        if self.window is None:
            return height, width
        rows, columns = (
            range(*side.indices(length)) for side, length in zip(self.window, (height, width), strict=True)
        )
        return len(rows), len(columns)

    def read(self) -> np.ndarray:
        """Pixels (H, W, C) of the sample: the image, or the sections of `stack` concatenated along the channels."""
        frames = [self.cut(frame.read()) for frame in self.stack or (self.input,)]
        return np.concatenate([_converted(frame, self.channels) for frame in frames], axis=-1)

    def cut(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (H, W, ...) of the sample, of those of the image."""
        return pixels if self.window is None else pixels[self.window]

    @property
    def files(self) -> list[Path]:
        """Files of the image and its labels."""
        labels = self.label.frames if isinstance(self.label, Masks) else [self.label] if self.label else []
        return files_of([self.input, *labels])


def _converted(image: np.ndarray, channels: int) -> np.ndarray:
    """Image with this number of channels: grey repeated three times, or the first of three equal ones; 0: all."""
    if channels > image.shape[2]:
        return np.repeat(image, channels, axis=2)
    return image[..., : channels or None]


def list_pairs(source: Source, target: Source | None, choice: Choice = ALL) -> list[Pair]:
    """Images with their labels: pages of stacks in order, files of folders by name.

    Parameters
    ----------
    source : str, Path or sequence of them
        Stack, folder or pattern of the images.
    target : str, Path, sequence of them or None
        Stack, folder or pattern of their labels; None: no labels.
    choice : Choice
        Channels, series and sections of the images. Labels of all series and sections, or of all sections, are chosen
        like the images; other labels must be those of the chosen images.

    Raises
    ------
    UserError
        There is no image, or an image or a label has no partner.
    """
    images = list_frames(source, choice)
    if target is None:
        return [Pair(image, None) for image in images]
    labels = list_frames(target)
    if choice.takes_all_frames:
        return _pairs(images, labels, source, target)
    for wider in (replace(choice, series="", section=""), replace(choice, section="")):
        whole = _labelled_frames(source, wider, labels, target)
        if len(whole) == len(labels):
            chosen = {(image.path, image.index) for image in images}
            return [
                pair for pair in _pairs(whole, labels, source, target) if (pair.input.path, pair.input.index) in chosen
            ]
    return _pairs(images, labels, source, target)


def _labelled_frames(source: Source, choice: Choice, labels: list[Frame], target: Source) -> list[Frame]:
    """Frames of a wider choice that may have labels; none where that choice is not possible."""
    try:
        images = list_frames(source, choice)
    except UserError:  # such as a file of several data sets, one of which must be chosen
        return []
    return images if _are_stacks(source, target) else _apart(images, labels)


def _pairs(images: list[Frame], labels: list[Frame], source: Source, target: Source) -> list[Pair]:
    """Pairs of images and labels that all have a partner."""
    if not _are_stacks(source, target):
        images = _without_labels(images, labels, source, target)
        return _pairs_by_folder(images, labels) or _pairs_by_name(images, labels, source, target)
    if len(images) != len(labels):
        what = f"{_shown(source)} has {len(images)} pages, {_shown(target)} has {len(labels)}"
        hint = f"{colour_hint(images)}{colour_hint(labels)}"
        raise UserError(f"{what}: each page needs one label{hint}")
    return [Pair(*both) for both in zip(images, labels, strict=True)]


def _are_stacks(source: Source, target: Source) -> bool:
    """Whether images or labels are the pages of one file."""
    return is_one_file(source) or is_one_file(target)


def _shown(source: Source) -> str:
    """Source as shown in a message: what the user gave, or the first of many paths."""
    return str(source) if isinstance(source, str | Path) else f"{len(source)} paths from {source[0]} on"


def colour_hint(frames: list[Frame]) -> str:
    """Advice for a single image with several channels, which may be sections."""
    channels = frames[0].open().shape[2]
    if len(frames) > 1 or channels < 3:
        return ""
    return (
        f"; {frames[0].path} is one image of {channels} channels: if these are sections, save them along Z (ImageJ:"
        " Image > Properties; Python: tifffile.imwrite(path, stack, imagej=True, metadata={'axes': 'ZYX'}))"
    )


def _without_labels(images: list[Frame], labels: list[Frame], source: Source, target: Source) -> list[Frame]:
    """Images without those that the labels' pattern matches too, such as `*_mask.tif` for `*.tif`."""
    rest = _apart(images, labels)
    if not rest:
        raise UserError(
            f"{_shown(target)}: all images of {_shown(source)} are also labels: give only the images to --input"
        )
    if len(rest) < len(images):
        what = f"{len(images) - len(rest)} image(s) of {_shown(source)} are matched by {_shown(target)}"
        echo(f"{what}: used as labels only")
    return rest


def _apart(images: list[Frame], labels: list[Frame]) -> list[Frame]:
    """Images that are not among the labels."""
    places = {(label.path, label.index) for label in labels}
    return [image for image in images if (image.path, image.index) not in places]


def _pairs_by_folder(images: list[Frame], labels: list[Frame]) -> list[Pair]:
    """Pairs of images with one folder each and one mask per object, `ID/images/*` and `ID/masks/*`; else none."""
    of_folder: dict[Path, list[Frame]] = defaultdict(list)
    for label in labels:
        of_folder[label.path.parent.parent].append(label)
    folders = [image.path.parent.parent for image in images]
    if set(folders) != of_folder.keys() or len(set(folders)) < len(images) or len(labels) <= len(images):
        return []
    echo(f"{len(labels)} masks of {len(images)} images: one per object, touching ones separated as by --objects on")
    return [Pair(image, Masks(tuple(of_folder[folder]))) for image, folder in zip(images, folders, strict=True)]


def _pairs_by_name(images: list[Frame], labels: list[Frame], source: Source, target: Source) -> list[Pair]:
    """Pair frames whose files have the same name, or the same varying part of the name, or the same last number.

    Otherwise, files in folders of the same name are paired. The rule that pairs the most frames is used.
    """
    rules: list[tuple[Callable[[Path], str], Callable[[list[str]], list[str]]]]
    rules = [(_stem, list), (_stem, _differences), (_stem, _last_numbers), (_folder, list)]
    ways = [(_keyed(images, *rule), _keyed(labels, *rule)) for rule in rules]
    of_images, of_labels = max(ways, key=lambda way: len(way[0].keys() & way[1].keys()))
    paired = {of[key] for key in of_images.keys() & of_labels.keys() for of in (of_images, of_labels)}
    unpaired = [str(frame) for frame in (*images, *labels) if frame not in paired]
    if unpaired:
        more = f" and {len(unpaired) - 10} more" if len(unpaired) > 10 else ""
        listed = ", ".join(unpaired[:10]) + more
        places = f"an image in {_shown(source)} and its label in {_shown(target)}"
        raise UserError(f"no partner for {listed}: give {places} the same name")
    return [Pair(frame, of_labels[key]) for key, frame in of_images.items()]


def _stem(path: Path) -> str:
    return path.stem


def _folder(path: Path) -> str:
    return path.parent.name


def _keyed(
    frames: list[Frame], name: Callable[[Path], str], parts: Callable[[list[str]], list[str]]
) -> dict[tuple[str, int], Frame]:
    """Frames by a key, made of the name of their file or folder, and their number among the frames of that file."""
    names = parts([name(frame.path) for frame in frames])
    counts: Counter[Path] = Counter()
    keyed = {}
    for text, frame in zip(names, frames, strict=True):
        keyed[text, counts[frame.path]] = frame
        counts[frame.path] += 1
    return keyed


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


def num_common(texts: Iterable[Sequence[str]]) -> int:
    """Number of letters, or of other parts, that all texts begin with."""
    return sum(1 for _ in takewhile(lambda parts: len({*parts}) == 1, zip(*texts, strict=False)))


def _last_numbers(stems: list[str]) -> list[str]:
    """Last number in each name without leading zeros; the name itself if it has none."""
    return [[stem, *re.findall(r"\d+", stem)][-1].lstrip("0") for stem in stems]


def with_context(pairs: list[Pair], context: int) -> list[Pair]:
    """Pairs with the neighbouring sections of their images as additional channels."""
    if not context:
        return pairs
    around = with_neighbours([pair.input for pair in pairs], context)
    return [replace(pair, stack=tuple(frames)) for pair, frames in zip(pairs, around, strict=True)]


def check_pairs(pairs: list[Pair]) -> list[Pair]:
    """Pairs whose images have the same number of channels; a mix of grey and RGB images is converted to one.

    Raises
    ------
    UserError
        Images differ in type or channels, a label in size, or an image can't be used for training.
    """
    kinds: dict[int, list[Frame]] = defaultdict(list)  # by number of channels
    first, blank = pairs[0].input, []
    dtype = first.open().dtype
    for pair in tqdm(pairs, desc="check", disable=None, leave=False):
        image = pair.input.read()
        check_values(pair.input, image, None, 0)
        blank += [pair.input] if image.min() == image.max() else []
        if image.dtype.name != dtype.name:
            raise UserError(f"{pair.input} is {image.dtype.name}, {first} {dtype.name}: convert them to one type")
        kinds[image.shape[2]].append(pair.input)
        for frame in pair.stack:
            if frame.open().shape[:2] != image.shape[:2]:
                what = f"{frame} has shape {frame.open().shape[:2]}, {pair.input} {image.shape[:2]}"
                raise UserError(f"{what}: neighbouring sections of --context must be of one size")
        if pair.label and (size := pair.label.read().shape[:2]) != image.shape[:2]:
            what = f"{pair.label} has (height, width) {size}, {pair.input} {image.shape[:2]}"
            raise UserError(f"{what}: they must agree")
    if blank:
        echo(f"warning: {len(blank)} image(s) have one value everywhere, {listed(blank)}: check how they were saved")
    return pairs if len(kinds) == 1 else _of_one_kind(pairs, kinds)


def _of_one_kind(pairs: list[Pair], kinds: dict[int, list[Frame]]) -> list[Pair]:
    """Pairs with all images as RGB, or as grey if no RGB image contains a colour."""
    if kinds.keys() != {1, 3}:
        shown = ", ".join(f"{frames[0]} has {channels} channel(s)" for channels, frames in kinds.items())
        raise UserError(f"{shown}: convert them to the same number")
    colours = sum(is_colour(frame.read()) for frame in kinds[3])
    if colours:
        echo(f"{len(kinds[1])} image(s) are grey, {len(kinds[3])} RGB: grey images are converted to RGB")
    else:
        echo(f"{len(kinds[1])} image(s) are grey, {len(kinds[3])} RGB without colours: these are converted to grey")
    return [replace(pair, channels=3 if colours else 1) for pair in pairs]
