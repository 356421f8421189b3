"""Make a database: draw, download or find the images, check and split them, and write the samples."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import tifffile

from config import LAPTOP, NO_LABEL, SPLIT, Config, DatabaseFlags
from exchange import atomic_folder, finish_exchange
from images.profile import common_names, have_palette
from images.readers import forget_files
from images.selection import Choice
from locks import locked
from samples import DISTANCE, ENTRIES, SPLITS, UNLABELLED, digest_of
from sources import isbi, phantom
from sources.labels import Classes, Masks, choose_background, find_classes, numbers_in
from sources.pairing import Pair, check_pairs, colour_hint, left_out, list_pairs, with_context
from sources.splits import Splits, known_splits, split_numbers, split_pairs
from sources.touching import touching_share
from sources.writing import Contents, Show, sample_entries, source_entries, sources_of, write_samples
from utils import FlagError, UserError, echo, folder_hint

OTHER_NAME = "choose another --name_data"
STACKS, FOLDERS = ("train-volume.tif", "train-labels.tif"), ("images", "labels")
DRAWN = r"\d+\.tif"  # names of synthetic images in a folder
CLASS_NAMES = {"em": ["membrane", "cell"], "nuclei": ["background", "nucleus"], "rare": ["background", "nucleus"]}
NUM_SEEN = 64  # label images that are asked whether their objects touch
MAX_DRAWN = 2**30  # [px] of a synthetic stack


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
    known, flags = known_splits(new_folder.parent, flags)
    labels = None if target == NO_LABEL else target
    listed = list_pairs(source, labels, choice, labelled_only=flags.labelled_only)
    pairs = [pair for pair in with_context(listed, flags.context) if pair.label or not flags.labelled_only]
    if flags.split != "region" and not known:  # at once, not after all pixels are read
        split_numbers(len(pairs), flags, colour_hint([pair.input for pair in pairs]))
    unlabelled = with_context(list_pairs(flags.unlabelled, None, choice), flags.context) if flags.unlabelled else []
    checked = check_pairs([*pairs, *unlabelled])
    pairs, unlabelled = checked[: len(pairs)], checked[len(pairs) :]
    classes = _classes(pairs, flags)
    splits, notes = split_pairs(pairs, classes, flags, known)
    if unlabelled:
        splits[UNLABELLED], more = _not_in(splits, unlabelled)
        notes += more
    contents = _write_contents(new_folder, flags, checked, splits, classes)
    if known and "split" in known.entries:  # whose sets stay
        contents.entries["split"] = known.entries["split"]
    notes += left_out(listed) if flags.labelled_only else []
    numbers = ", ".join(f"{len(of)} {split}" for split, of in splits.items())
    return contents.complete([numbers, *notes], _touching(pairs, classes, flags), show)


def _not_in(splits: Splits, pairs: list[Pair]) -> tuple[list[Pair], list[str]]:
    """Images that are in no split, by their pixels, and a line for the report on the others."""
    whole = (replace(pair, window=(slice(None), slice(None))) for of in splits.values() for pair in of)
    known = {digest_of(pair.image()) for pair in whole}
    others = [pair for pair in pairs if digest_of(pair.image()) not in known]
    if not others:
        raise UserError(f"--unlabelled: all {len(pairs)} image(s) are in the sets of the database: name others")
    num = len(pairs) - len(others)
    return others, [f"not among the unlabelled: {num} image(s) of the sets"] if num else []


def _write_contents(
    folder: Path, flags: DatabaseFlags, pairs: list[Pair], splits: Splits, classes: Classes
) -> Contents:
    """Write the samples; return what the description is made of."""
    files = {split: [folder / split / f"{number:05d}.npy" for number in range(len(of))] for split, of in splits.items()}
    jobs = {split: [*zip(files[split], splits[split], strict=True)] for split in splits}
    write_samples([job for of_split in jobs.values() for job in of_split], classes)
    sources = sources_of(pairs)
    kind = SPLIT[1] if flags.split == SPLIT[0] else flags.split
    entries = {
        "split": {"kind": kind, "seed": flags.seed} | ({"fold": flags.fold} if flags.fold else {}),
        "sources": source_entries(sources.values()),
        "samples": {split: sample_entries(of_split, sources) for split, of_split in jobs.items()},
    }
    frames = [pair.input for pair in splits["train"] or splits["test"]]
    return Contents(folder, files, classes, flags.context, common_names(frames), have_palette(frames), entries)


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
