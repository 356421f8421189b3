"""Make a database: draw, download or find the images, check and split them, and write the samples."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from config import LAPTOP, NO_LABEL, Config, DatabaseFlags
from description import DataInfo, describe
from exchange import atomic_folder, finish_exchange
from images.profile import profile_of
from images.readers import Frame, forget_files, read_geometry, sha256
from images.selection import Choice
from images.statistics import Moments
from locks import locked
from progress import tracked
from samples import DISTANCE, ENTRIES, IGNORE, SPLITS, SampleFile, write_sample
from sources import isbi, phantom
from sources.labels import Classes, Masks, choose_background, find_classes, numbers_in
from sources.pairing import Pair, check_pairs, colour_hint, list_pairs, with_context
from sources.splits import Splits, split_numbers, split_pairs
from sources.touching import touching_share
from training.weight_map import loss_of, save_distance
from utils import FlagError, UserError, echo, folder_hint, names_below

OTHER_NAME = "choose another --name_data"
STACKS, FOLDERS = ("train-volume.tif", "train-labels.tif"), ("images", "labels")
DRAWN = r"\d+\.tif"  # names of synthetic images in a folder
CLASS_NAMES = {"em": ["membrane", "cell"], "nuclei": ["background", "nucleus"], "rare": ["background", "nucleus"]}
NUM_SEEN = 64  # label images that are asked whether their objects touch
MAX_DRAWN = 2**30  # [px] of a synthetic stack

Files = dict[str, list[Path]]  # of the samples of each split
Show = Callable[[Path, DataInfo, Files, list[str]], list[str]]  # writes the page; returns what looks wrong


def make_database(flags: DatabaseFlags, show: Show) -> None:
    """Make a database as the flags of `run_make_database.py` say, and the page that shows it."""
    if flags.synthetic * flags.size**2 > MAX_DRAWN:
        raise FlagError(f"--synthetic {flags.synthetic} --size {flags.size}: over {MAX_DRAWN} pixels: lower one")
    choice = Choice(flags.channel, flags.series, flags.section)
    folder = Path(flags.dir_data) / flags.name_data
    with locked(folder, OTHER_NAME):
        finish_exchange(folder, ENTRIES)
        if not flags.overwrite and any((folder / name).exists() for name in ENTRIES):
            raise UserError(f"{folder} contains a database: add --overwrite to replace it, or {OTHER_NAME}")
        if flags.download and not isbi.is_there(folder):
            _refuse_to_replace(flags, folder, isbi.PIXELS)
            isbi.download(folder, flags.url)
        # stacks, or folders if the sizes differ
        names = FOLDERS if flags.synthetic and flags.phantom != "em" else STACKS
        drawn = names if flags.synthetic else ()
        _refuse_to_replace(flags, folder, drawn)
        _refuse_foreign_samples(folder)
        with atomic_folder(folder, ENTRIES | dict.fromkeys(drawn, DRAWN), OTHER_NAME) as new_folder:
            if drawn:
                _draw(flags, [new_folder / name for name in names])
            defaults = [(new_folder if drawn else folder) / name for name in names]
            lines = _write_database(new_folder, flags, choice, defaults, show)
            forget_files()  # Windows can't rename a memory-mapped file
    echo(f"{folder}: {lines}")
    echo(f"look at it: open {folder / 'index.html'}")
    if flags.label != NO_LABEL:
        echo(flags.next_step(Config, mode="train", **LAPTOP))


def _refuse_to_replace(flags: DatabaseFlags, folder: Path, names: Iterable[str]) -> None:
    existing = [str(folder / name) for name in names if (folder / name).exists()]
    if existing and not flags.overwrite:
        raise UserError(f"{' and '.join(existing)} would be replaced: {OTHER_NAME}, or add --overwrite")


def _refuse_foreign_samples(folder: Path) -> None:
    """Refuse to leave files that would be samples of the new database, or to remove them: they are the user's."""
    for split in SPLITS:
        for path in sorted((folder / split).glob("*.npy")):
            if not (re.fullmatch(ENTRIES[split], path.name) or path.name.endswith(DISTANCE)):
                what = f"{path}: not a sample of this program's, but it would be one of the new database"
                raise UserError(f"{what}: move it, or {OTHER_NAME}")


def _draw(flags: DatabaseFlags, paths: list[Path]) -> None:
    """Write synthetic images and their labels: of one size as a TIFF stack, others as a folder of TIFF files."""
    write = partial(tifffile.imwrite, photometric="minisblack")  # else 3 or 4 sections would be saved as RGB
    images_and_labels = phantom.PHANTOMS[flags.phantom](flags.synthetic, flags.size, flags.seed)
    for path, images in zip(paths, images_and_labels, strict=True):
        if isinstance(images, np.ndarray):
            write(path, images)
            continue
        path.mkdir()
        for number, image in enumerate(images):
            write(path / f"{number:04d}.tif", image)


def _write_database(new_folder: Path, flags: DatabaseFlags, choice: Choice, defaults: list[Path], show: Show) -> str:
    """Write samples and description, and return the report; `defaults` are images and labels that no flag names."""
    source = flags.input or _existing(defaults[0], "--input IMAGES")
    target = flags.label or _existing(defaults[1], "--label LABELS, or --label none")
    pairs = with_context(list_pairs(source, None if target == NO_LABEL else target, choice), flags.context)
    if flags.split != "region":  # at once, not after all pixels are read
        split_numbers(len(pairs), flags, colour_hint([pair.input for pair in pairs]))
    pairs = check_pairs(pairs)
    classes = _classes(pairs, flags)
    splits, notes = split_pairs(pairs, classes, flags)
    files, annotated = _write_samples(new_folder, splits, classes)
    samples = (SampleFile(file).open() for file in tracked(files["train"] or files["test"], "measure"))
    moments = Moments()
    info = describe(samples, classes.values, classes.names, flags.context, moments)
    profile = profile_of([pair.input for pair in splits["train"] or splits["test"]])
    info = replace(info, ignore=classes.ignore, profile=profile, gap=classes.gap).checked(
        pairs[0].input.path, "scale the images, and save them again"
    )
    entries = {name: value for name, value in asdict(info).items() if value is not None}
    text = json.dumps(entries | _provenance(flags, pairs, splits), indent=1)
    (new_folder / "dataset.json").write_text(text + "\n", "utf-8")
    if info.is_partial:
        fractions = [f"{valid / num:.1%} of {split}" for split, (valid, num) in annotated.items() if num]
        notes.append(f"annotated: {', '.join(fractions)}")
    if classes.left:
        num, left = np.sum([*classes.left.values()], axis=0)
        notes.append(f"objects: {num} numbered, {left} left after a gap between those that touch")
    warnings = show(new_folder, info, files, _touching(pairs, classes, flags))
    lines = _report(files, info, pairs[0].input.open().dtype, [*notes, *(f"warning: {line}" for line in warnings)])
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (info.mean, moments.std.tolist()))
    return f"{lines}\nmean {mean}, standard deviation {std}"


def _existing(path: Path, flag: str) -> str:
    """Default path of images or labels, which must exist if no flag names others."""
    if not path.exists():
        hint = folder_hint(path.parent, ("--name_data",), lambda other: (other / path.name).exists())
        raise UserError(f"{path}: no such file or folder: {hint}give {flag}, or put the stack there")
    return str(path)


def _classes(pairs: list[Pair], flags: DatabaseFlags) -> Classes:
    """Classes of the labels, named and ordered as the flags say."""
    labels = [pair.label for pair in pairs if pair.label]
    if not labels:
        return Classes([], [], lambda label: label.read()[..., 0])
    objects = flags.objects or isinstance(labels[0], Masks)
    numbered = flags.objects and len(numbers_in(flags.background)) == 1  # one of the objects, not of the two classes
    try:
        classes = find_classes(labels, flags.threshold, objects, flags.ignore, flags.background if numbered else "")
    except UserError as error:
        if len(np.unique(pairs[0].input.read())) > 2:
            raise
        what = f"{pairs[0].input} has two values at most, as a label: are --input and --label swapped?"
        raise UserError(f"{error}; {what}") from error
    classes = classes._replace(names=_class_names(flags, classes))
    classes = choose_background(classes, "" if numbered else flags.background, flags.foreground)
    is_named = flags.class_names or flags.synthetic or flags.download or objects
    return classes if is_named or len(classes.values) != 2 else classes._replace(names=["background", "foreground"])


def _touching(pairs: list[Pair], classes: Classes, flags: DatabaseFlags) -> list[str]:
    """Warning of masks whose objects seem to touch."""
    labels = [pair.label for pair in pairs if pair.label]
    if len(classes.values) != 2 or flags.objects or isinstance(labels[0], Masks) or flags.synthetic or flags.download:
        return []
    share = touching_share(classes.indices(label) == 1 for label in labels[:: -(-len(labels) // NUM_SEEN)])
    what = f"{share:.0%} of the objects look like several that touch, which masks can't teach to part"
    return [f"{what}: number the objects in the label images, and add --objects on"] if share else []


def _class_names(flags: DatabaseFlags, classes: Classes) -> list[str]:
    """Names in the order of the values: of the flag, of a synthetic image or the downloaded one, or the values."""
    if not flags.class_names:
        return CLASS_NAMES[flags.phantom] if flags.synthetic or flags.download else classes.names
    names = [name.strip() for name in flags.class_names.split(",")]
    are_names = all(re.fullmatch(r"[\w -]+", name) for name in names)
    if len(set(names)) != len(names) or len(names) != len(classes.values) or not are_names:
        what = f"the labels have {len(classes.values)} classes, {classes.values}"
        raise UserError(f"--class_names {flags.class_names}: {what}: give each a different name of letters and digits")
    return names


def _write_samples(folder: Path, splits: Splits, classes: Classes) -> tuple[Files, dict[str, np.ndarray]]:
    """Write all samples; return their files, and of each split the number of annotated and of all labelled pixels."""
    files: Files = {split: [] for split in splits}
    annotated = {split: np.zeros(2, int) for split in splits}
    jobs = [(split, number, pair) for split, pairs in splits.items() for number, pair in enumerate(pairs)]
    for split, number, pair in tracked(jobs, "write"):
        path = folder / split / f"{number:05d}.npy"
        path.parent.mkdir(exist_ok=True)
        files[split].append(path)
        label = None
        if pair.label is not None:
            label = classes.indices(pair.label)[pair.window].astype(np.uint8)
            annotated[split] += np.count_nonzero(label != IGNORE), label.size
        write_sample(path, pair.read(), label)
        if split == "train" and label is not None and loss_of("auto", len(classes.values)) == "wbce":
            save_distance(SampleFile(path), label)  # computed once, so that a training need not
    return files, annotated


def _provenance(flags: DatabaseFlags, pairs: list[Pair], splits: Splits) -> dict[str, Any]:
    """Origin of the samples: split, source files with hashes, and source of each sample."""
    sizes: dict[Path, dict[str, list[float]]] = {}
    files: dict[Path, None] = {}
    for pair in pairs:
        files |= dict.fromkeys(pair.files)
        if pair.input.path not in sizes:  # the file is still open
            sizes[pair.input.path] = _pixel_size(pair.input)
    names = names_below(list(sizes))
    sources = names | names_below([path for path in files if path not in names])
    samples = {
        split: [
            {"file": f"{number:05d}.npy", "source": names[pair.input.path]} | _origin(pair) | sizes[pair.input.path]
            for number, pair in enumerate(members)
        ]
        for split, members in splits.items()
    }
    return {
        "split": {"kind": flags.split, "seed": flags.seed} | ({"fold": flags.fold} if flags.fold else {}),
        "sources": [{"name": name, "sha256": sha256(path)} for path, name in tracked(sources.items(), "hash")],
        "samples": samples,
    }


def _origin(pair: Pair) -> dict[str, Any]:
    """What a sample is of its file: page, series such as a well, chosen channels; rows or columns of a region."""
    frame = pair.input
    entries: dict[str, Any] = {"frame": frame.index}
    if frame.series:
        entries |= {"series": frame.series, "frame_of_series": frame.index_in_series}
    if frame.channels:
        entries["channels"] = list(frame.channels)
    for name, side in zip(("rows", "columns"), pair.window, strict=True):
        if side.stop is not None:
            entries[name] = [side.start, side.stop - 1]
    return entries


def _pixel_size(frame: Frame) -> dict[str, list[float]]:
    """Height and width of a pixel [µm]; empty if the file doesn't give them."""
    size = read_geometry([frame]).pixel_size
    return {"pixel_size": list(size)} if size else {}


def _report(files: Files, info: DataInfo, dtype: np.dtype, notes: list[str]) -> str:
    """Lines that describe the database."""
    sizes = sorted({SampleFile(path).open()[0].shape[:2] for paths in files.values() for path in paths})
    sides = ", ".join(f"{height} x {width}" for height, width in sizes[:5]) + (" ..." if len(sizes) > 5 else "")
    lines = [", ".join(f"{len(members)} {split}" for split, members in files.items()), *notes]
    lines += [f"images: {sides} px, {info.nch_in} channel(s) of {dtype.name}"]
    pixels = "annotated pixels" if info.is_partial else "pixels"
    for index, value in enumerate(info.class_values):
        role = {0: " (background)", 1: " (foreground)" if info.num_class == 2 else ""}.get(index, "")
        name = info.class_names[index]
        words = name if name == value else f"{name}, label value {value}"
        lines += [f"class {index}{role}: {words}, {info.class_share[index]:.1%} of {pixels}"]
    return "\n".join(lines)
