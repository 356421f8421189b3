"""Make a database of .npy samples from image stacks or folders of images.

datasets/em/train-volume.tif and train-labels.tif:  python run_make_database.py --name_data em
two folders, or two stacks:  python run_make_database.py --name_data mine --input IMAGES --label LABELS
a synthetic stack:           python run_make_database.py --name_data demo --synthetic
synthetic nuclei:            python run_make_database.py --name_data nuclei --synthetic --phantom nuclei
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from string import digits
from typing import Any

import numpy as np
import tifffile
from tqdm import tqdm

import isbi
import phantom
from config import Flags, at_least, flag, parse
from dataset import SPLITS, DataInfo, SampleFile, check_values, describe, write_sample
from images import Frame, Source, list_frames, sha256, with_neighbours
from labels import Classes, find_classes
from losses import border_distance
from utils import UserError, atomic_folder, program, say

NO_LABEL, OTHER_NAME = "none", "choose another --name_data"
N = {"nargs": "?", "const": 30, "metavar": "N"}
SPLIT_KINDS = ("contiguous", "random")
VOLUME, LABELS = "train-volume.tif", "train-labels.tif"
FOLDERS = ("images", "labels")  # where synthetic images of different sizes go
CLASS_NAMES = {"em": ["membrane", "cell"], "nuclei": ["background", "nucleus"], "rare": ["background", "nucleus"]}


@dataclass(frozen=True)
class DatabaseFlags(Flags):
    """All flags of `run_make_database.py`."""

    dir_data: str = flag("./datasets", "where the databases lie", "database")
    name_data: str = flag("em", "name of the data, a folder", "database")
    overwrite: bool = flag(False, "replace a database that is there", "database", nargs="?", const="on")

    input: str = flag(
        "", "stack, folder or pattern of images (default: train-volume.tif in the database)", "source", nargs="+"
    )
    label: str = flag("", "their labels, or 'none' (default: train-labels.tif in the database)", "source", nargs="+")
    threshold: float = flag(float("nan"), "make two classes: label values above it are class 1", "source")
    objects: bool = flag(False, "make two classes of labels that number the objects", "source")
    class_names: str = flag("", "names of the classes in the order of their values, with commas", "source")
    synthetic: int = flag(0, "draw a stack of N sections (30 if left out), and use it", "source", rule=at_least(0), **N)
    phantom: str = flag("em", "what to draw: rare is nuclei on 2 % of the pixels", "source", choices=(*CLASS_NAMES,))
    size: int = flag(256, "height and width of a synthetic section [px]", "source", rule=at_least(32))
    download: bool = flag(False, "fetch the ISBI 2012 EM stack and use it", "source", nargs="?", const="on")
    url: str = flag(isbi.URL, "where to fetch it", "source")

    context: int = flag(0, "neighbours above and below a section that it sees as channels", "source", rule=at_least(0))

    num_val: int = flag(-1, "samples for validation; -1: a tenth, at least one", "split", rule=at_least(-1))
    num_test: int = flag(-1, "samples for the test; -1: a tenth, at least one", "split", rule=at_least(-1))
    split: str = flag("contiguous", "blocks in the order of the stack, or mixed", "split", choices=SPLIT_KINDS)
    seed: int = flag(0, "seed of the random split and of the synthetic stack", "split", rule=at_least(0))


@dataclass(frozen=True)
class Pair:
    """An image and the image with its labels, if there is one; `stack` are the frames that become its channels."""

    input: Frame
    label: Frame | None
    stack: tuple[Frame, ...] = ()

    def read(self) -> np.ndarray:
        """Pixels (H, W, C) of the sample: the image, or the sections around it one after another."""
        return np.concatenate([frame.read() for frame in self.stack], axis=-1) if self.stack else self.input.read()


@program
def main(argv: list[str] | None = None) -> None:
    """Make a database as the flags say.

    Parameters
    ----------
    argv : list of str, optional
        Arguments without the program's name; default: those of the process.
    """
    flags = parse(DatabaseFlags, argv, __doc__)
    folder = Path(flags.dir_data) / flags.name_data
    if not flags.overwrite and any((folder / name).exists() for name in (*SPLITS, "dataset.json")):
        raise UserError(f"{folder} holds a database: add --overwrite to replace it, or choose another --name_data")
    _make_sources(flags, folder)
    pairs = _with_context(_pairs(flags, folder), flags.context)
    splits = _split(pairs, flags)
    _check_images(pairs)
    classes = find_classes([pair.label for pair in pairs if pair.label], flags.threshold, flags.objects)
    names = _class_names(flags, classes)
    with atomic_folder(folder, [*SPLITS, "dataset.json"], OTHER_NAME) as partial:
        files = _write_samples(partial, splits, classes)
        info = describe((SampleFile(file).open() for file in files["train"] or files["test"]), classes.values, names)
        info = replace(info, context=flags.context)
        text = json.dumps(asdict(info) | _provenance(flags, pairs, splits), indent=1)
        (partial / "dataset.json").write_text(text + "\n", "utf-8")
    _report(folder, splits, info)


def _make_sources(flags: DatabaseFlags, folder: Path) -> None:
    """Draw or fetch the stacks that the flags ask for."""
    if flags.download and not _is_isbi(folder):
        _refuse_to_replace(flags, [folder / name for name in isbi.PIXELS])
        isbi.download(folder, flags.url)
    if flags.synthetic:
        stacks = phantom.PHANTOMS[flags.phantom](flags.synthetic, flags.size, flags.seed)
        paths = _default_sources(flags, folder)
        _refuse_to_replace(flags, paths)
        with atomic_folder(folder, [path.name for path in paths], OTHER_NAME) as partial:
            for path, stack in zip(paths, stacks, strict=True):
                _write_stack(partial / path.name, stack)


def _default_sources(flags: DatabaseFlags, folder: Path) -> list[Path]:
    """Where images and labels lie when the flags don't say."""
    return [folder / name for name in (FOLDERS if flags.synthetic and flags.phantom != "em" else (VOLUME, LABELS))]


def _write_stack(path: Path, stack: Sequence[np.ndarray]) -> None:
    """Write images of one size as a TIFF stack, others as a folder of TIFF files."""
    options = {"photometric": "minisblack"}  # else 3 or 4 sections would be taken for RGB
    if path.suffix:
        tifffile.imwrite(path, stack, **options)
        return
    path.mkdir()
    for number, image in enumerate(stack):
        tifffile.imwrite(path / f"{number:04d}.tif", image, **options)


def _is_isbi(folder: Path) -> bool:
    """Whether the challenge's stacks lie there already."""
    return all((folder / n).is_file() and isbi.pixel_hash(folder / n) == pixels for n, pixels in isbi.PIXELS.items())


def _refuse_to_replace(flags: DatabaseFlags, paths: list[Path]) -> None:
    there = [str(path) for path in paths if path.exists()]
    if there and not flags.overwrite:
        raise UserError(f"{' and '.join(there)} would be replaced: choose another --name_data, or add --overwrite")


def _pairs(flags: DatabaseFlags, folder: Path) -> list[Pair]:
    """Images with their labels: pages in order, or the files of two folders by name."""
    given = zip((flags.input, flags.label), _default_sources(flags, folder), strict=True)
    source, target = (path or _there(default) for path, default in given)
    images = list_frames(source)
    if flags.label == NO_LABEL:
        return [Pair(image, None) for image in images]
    labels = list_frames(target)
    if not any(isinstance(path, str) and Path(path).is_file() for path in (source, target)):
        return _pairs_by_name(images, labels, source, target)
    if len(images) != len(labels):
        raise UserError(
            f"{source} has {len(images)} pages, {target} has {len(labels)}: they must have one label a page"
            f"{_colour_hint(images)}{_colour_hint(labels)}"
        )
    return [Pair(*both) for both in zip(images, labels, strict=True)]


def _there(path: Path) -> str:
    """Where images or labels lie when no flag says it; they must be there."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: put the stack there, or name it by --input and --label")
    return str(path)


def _colour_hint(frames: list[Frame]) -> str:
    """What may be wrong with a single colour image: `tifffile.imwrite` takes three or four sections for one."""
    if len(frames) > 1 or frames[0].open().shape[2] < 3:
        return ""
    return f"; {frames[0].path} is one colour image: if these are sections, save them with photometric='minisblack'"


def _with_context(pairs: list[Pair], context: int) -> list[Pair]:
    """Pairs whose images have their neighbours in the stack as further channels."""
    if not context:
        return pairs
    around = with_neighbours([pair.input for pair in pairs], context)
    return [replace(pair, stack=tuple(frames)) for pair, frames in zip(pairs, around, strict=True)]


def _pairs_by_name(images: list[Frame], labels: list[Frame], source: Source, target: Source) -> list[Pair]:
    """Pair frames whose files have one name, the type apart; or names that differ by what all have; or one number."""
    ways = [[_keyed(frames, parts) for frames in (images, labels)] for parts in (list, _differences, _last_numbers)]
    of_images, of_labels = max(ways, key=lambda way: len(way[0].keys() & way[1].keys()))
    paired = {of[key] for key in of_images.keys() & of_labels.keys() for of in (of_images, of_labels)}
    lonely = [str(frame) for frame in (*images, *labels) if frame not in paired]
    if lonely:
        more = f" and {len(lonely) - 10} more" if len(lonely) > 10 else ""
        listed = ", ".join(lonely[:10]) + more
        raise UserError(f"no partner for {listed}: give an image in {source} and its label in {target} the same name")
    return [Pair(frame, of_labels[key]) for key, frame in of_images.items()]


def _keyed(frames: list[Frame], parts: Callable[[list[str]], list[str]]) -> dict[tuple[str, int], Frame]:
    """Frames by a part of their file's name, and their number in it."""
    names = parts([frame.path.stem for frame in frames])
    return {(name, frame.index): frame for name, frame in zip(names, frames, strict=True)}


def _differences(stems: list[str]) -> list[str]:
    """Names without the beginning and the end that all have, which cut no number, and without leading zeros.

    Examples
    --------
    >>> _differences(["21_manual1", "22_manual1"]), _differences(["cell007", "cell012"])
    (['21', '22'], ['7', '12'])
    """
    first = _beginning(stems).rstrip(digits)
    last = _beginning([stem[::-1] for stem in stems])[::-1].lstrip(digits)
    return [stem.removeprefix(first).removesuffix(last).lstrip("0") for stem in stems]


def _beginning(names: list[str]) -> str:
    """What all names begin with."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same)


def _last_numbers(stems: list[str]) -> list[str]:
    """Last number in each name, without leading zeros; the name if there is none."""
    return [[stem, *re.findall(r"\d+", stem)][-1].lstrip("0") for stem in stems]


def _split(pairs: list[Pair], flags: DatabaseFlags) -> dict[str, list[Pair]]:
    """Share the pairs out; what has no label can only be tested."""
    if pairs[0].label is None:
        return {"train": [], "val": [], "test": pairs}
    tenth = max(1, round(len(pairs) / 10))
    num_val, num_test = (tenth if number < 0 else number for number in (flags.num_val, flags.num_test))
    num_train = len(pairs) - num_val - num_test
    if num_train < 1:
        what = f"{len(pairs)} image(s), {num_val} for validation, {num_test} for the test"
        hint = _colour_hint([pair.input for pair in pairs])
        raise UserError(f"{what}: none is left to train on: lower --num_val or --num_test{hint}")
    order = np.arange(len(pairs))
    if flags.split == "random":
        order = np.random.default_rng(flags.seed).permutation(len(pairs))
    blocks = np.split(order, [num_train, num_train + num_val])
    return {split: [pairs[i] for i in np.sort(block)] for split, block in zip(SPLITS, blocks, strict=True)}


def _check_images(pairs: list[Pair]) -> None:
    """Refuse images that don't go together, or that can't be trained on."""
    first = pairs[0].input.read()
    for pair in _progress(pairs, "check"):
        image = pair.input.read()
        check_values(pair.input, image, None, 0)
        if (image.dtype, image.shape[2]) != (first.dtype, first.shape[2]):
            what = f"{image.dtype} with {image.shape[2]} channels, {pairs[0].input} {first.dtype} with {first.shape[2]}"
            raise UserError(f"{pair.input} is {what}: convert them to one type")
        for frame in pair.stack:
            if frame.open().shape != image.shape:
                what = f"{frame} has shape {frame.open().shape}, {pair.input} {image.shape}"
                raise UserError(f"{what}: neighbours of --context must be of one size")
        if pair.label and pair.label.read().shape[:2] != image.shape[:2]:
            sizes = f"{pair.label.read().shape[:2]}, {pair.input} {image.shape[:2]}"
            raise UserError(f"{pair.label} has (height, width) {sizes}: they must agree")


def _class_names(flags: DatabaseFlags, classes: Classes) -> list[str]:
    """Names as the flag gives them, else those of a stack we know, else the values."""
    if flags.class_names:
        names = [name.strip() for name in flags.class_names.split(",")]
        if len(set(names)) != len(classes.values) or not all(re.fullmatch(r"[\w -]+", name) for name in names):
            what = f"the labels have {len(classes.values)} classes, {classes.values}"
            raise UserError(f"--class_names {flags.class_names}: {what}: give each one name of letters and digits")
        return names
    if flags.synthetic or flags.download:
        return CLASS_NAMES[flags.phantom]
    return [_name(value) for value in classes.values]


def _name(value: Any) -> str:
    """Name of a class that has none: its value, or its colour as in HTML."""
    return "#" + bytes(value).hex() if isinstance(value, list) else str(value)


def _write_samples(folder: Path, splits: dict[str, list[Pair]], classes: Classes) -> dict[str, list[Path]]:
    """Write all samples, and return their files."""
    files: dict[str, list[Path]] = {split: [] for split in splits}
    jobs = [(split, number, pair) for split, pairs in splits.items() for number, pair in enumerate(pairs)]
    for split, number, pair in _progress(jobs, "write"):
        (folder / split).mkdir(exist_ok=True)
        files[split].append(folder / split / f"{number:05d}.npy")
        label = None if pair.label is None else classes.indices(pair.label.read()).astype(np.uint8)
        write_sample(files[split][-1], pair.read(), label)
        if split == "train" and len(classes.values) == 2:  # once here, and not before each training
            np.save(SampleFile(files[split][-1]).distance, border_distance(label))
    return files


def _provenance(flags: DatabaseFlags, pairs: list[Pair], splits: dict[str, list[Pair]]) -> dict[str, Any]:
    """Where the samples come from."""
    frames = [frame for pair in pairs for frame in (pair.input, pair.label) if frame]
    sources = dict.fromkeys(frame.path for frame in frames)
    return {
        "split": {"kind": flags.split, "seed": flags.seed},
        "sources": [{"name": path.name, "sha256": sha256(path)} for path in sources],
        "samples": {
            split: [
                {"file": f"{number:05d}.npy", "source": pair.input.path.name, "frame": pair.input.index}
                for number, pair in enumerate(members)
            ]
            for split, members in splits.items()
        },
    }


def _report(folder: Path, splits: dict[str, list[Pair]], info: DataInfo) -> None:
    """Say what was made."""
    image = next(pair for members in splits.values() for pair in members).input.read()
    sizes = {pair.input.read().shape[:2] for members in splits.values() for pair in members}
    shown = ", ".join(f"{height} x {width}" for height, width in sorted(sizes)[:5]) + (" ..." if len(sizes) > 5 else "")
    say(f"{folder}: " + ", ".join(f"{len(members)} {split}" for split, members in splits.items()))
    say(f"images: {shown} px, {info.nch_in} channel(s) of {image.dtype}")
    for index, value in enumerate(info.class_values):
        role = " (foreground)" if info.num_class == 2 and index == 1 else ""
        name, share = info.class_names[index], info.class_share[index]
        meaning = "" if value == name else f"labels {value}, " if isinstance(value, str) else f"label value {value}, "
        say(f"class {index}{role}: {name}, {meaning}{share:.1%} of pixels")
    say(f"mean {_numbers(info.mean)}, standard deviation {_numbers(info.std)}")


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _progress(items: list, what: str) -> Iterable:
    return tqdm(items, desc=what, disable=None, leave=False)


if __name__ == "__main__":
    sys.exit(main())
