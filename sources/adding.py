"""Add annotated images to a database, whose classes and sets stay as they are."""

from __future__ import annotations

import glob
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from config import LAPTOP, Config, DatabaseFlags
from exchange import atomic_folder, finish_exchange
from images.notes import say_notes
from images.profile import NUM_SAMPLED, by_name, common_names, compare, have_palette, make_profile
from images.readers import Frame, forget_files, geometries_of
from images.selection import Choice
from images.writers import is_predicted
from locks import locked
from rules import is_number
from samples import (
    DISTANCE,
    ENTRIES,
    IGNORE,
    SAMPLES,
    SPLIT_NAMES,
    SPLITS,
    UNLABELLED,
    digest_of,
    is_database,
    list_unlabelled,
)
from sources.database import OTHER_NAME
from sources.known import Known, Place
from sources.labels import Classes, Label, Reading, fit_classes
from sources.numbered import border_number
from sources.pairing import Pair, check_pairs, list_pairs, with_context
from sources.scan import is_colour, numbers_in, typed
from sources.writing import (
    Contents,
    Entries,
    Files,
    Job,
    Show,
    sample_entries,
    source_entries,
    sources_of,
    write_sample_of,
    write_samples,
)
from utils import MOST_NAMED, UserError, echo, folder_hint, spread


@dataclass(frozen=True)
class Addition:
    """What becomes of new images."""

    added: list[Pair]
    replaced: list[tuple[Place, Pair]]  # samples that get a new label
    to: str  # split of those that are added


def add_images(flags: DatabaseFlags, show: Show) -> None:
    """Add the images that `--add` names to the database, and write its description and page again."""
    folder = Path(flags.dir_data) / flags.name_data
    if not is_database(folder):
        hint = folder_hint(folder, ("--name_data",), is_database)
        raise UserError(f"{folder}: no database there: {hint}make one with --input IMAGES, or check --name_data")
    with locked(folder, OTHER_NAME):
        finish_exchange(folder, ENTRIES)
        known = Known.load(folder)
        if not known.info.class_values:
            raise UserError(f"{folder}: made with --label none, it has no classes: make it again with --label LABELS")
        pairs, notes = _read_pairs(flags, known)
        classes = _fit_labels(flags, known, [pair.label for pair in pairs if pair.label])
        if classes.ignore is not None:
            annotated = [pair for pair in pairs if (classes.indices(pair.label) != IGNORE).any()]
            num, pairs = len(pairs) - len(annotated), annotated
            notes += [f"left out: {num} image(s) without an annotated pixel"] if num else []
        addition = _sort(pairs, known, classes, flags)
        with atomic_folder(folder, ENTRIES, OTHER_NAME) as new_folder:
            lines = _write(new_folder, known, addition, classes, notes, show)
            forget_files()  # Windows can't rename a memory-mapped file
    echo(f"{folder}: {lines}")
    echo(f"look at it: open {folder / 'index.html'}")
    echo(flags.next_step(Config, mode="train", **(_last_training(flags.name_data) or LAPTOP)))


def _read_pairs(flags: DatabaseFlags, known: Known) -> tuple[list[Pair], list[str]]:
    """New images with their labels, as the database has its images, and lines for the report."""
    choice, info = Choice(flags.channel, flags.series, flags.section), known.info
    pairs = list_pairs(flags.add, flags.label, choice, labelled_only=flags.labelled_only)
    frames, channel_notes = by_name([pair.input for pair in pairs], info.profile)
    say_notes(channel_notes)
    pairs = [replace(pair, input=frame) for pair, frame in zip(pairs, frames, strict=True)]
    pairs, notes = _corrected([pair for pair in with_context(pairs, info.context) if pair.label])
    pairs = check_pairs(pairs)
    num = pairs[0].image().shape[2]
    if {num, info.num_own} == {1, 3} and (num == 1 or not any(is_colour(pair.image()) for pair in pairs)):
        pairs, num = [replace(pair, channels=info.num_own) for pair in pairs], info.num_own
        notes.append(f"the new images are converted to {'RGB' if num == 3 else 'grey'}, as the database has them")
    _check_images(pairs, known)
    return pairs, notes


def _corrected(pairs: list[Pair]) -> tuple[list[Pair], list[str]]:
    """Pairs but for labels that are as predict wrote them, and a line about these."""
    edited = [pair for pair in pairs if not (isinstance(pair.label, Frame) and is_predicted(pair.label.path))]
    num = len(pairs) - len(edited)
    ways = "save in an editor those that you corrected or found right"
    if not edited:
        raise UserError(f"{pairs[0].label} and all others: labels as predict wrote them: {ways}")
    return edited, [f"left out: {num} label(s) as predict wrote them: {ways}"] if num else []


def _check_images(pairs: list[Pair], known: Known) -> None:
    """Refuse new images of another number of channels, type or grey scale than those of the database."""
    info, image, frames = known.info, pairs[0].image(), [pair.input for pair in pairs]
    old = next(file for files in known.files.values() for file in files).open()[0]
    for what, new, expected, advice in (
        ("channel(s)", image.shape[2], info.num_own, "choose them with --channel"),
        ("pixels", image.dtype.name, old.dtype.name, "convert them"),
    ):
        if new != expected:
            raise UserError(f"{frames[0]}: {new} {what}, the database has {expected}: {advice}")
    if info.profile:
        sizes = [geometry.pixel_size for geometry in geometries_of(frames) if geometry.pixel_size]
        some = (pairs[n].image() for n in spread(len(pairs), NUM_SAMPLED))
        profile = make_profile(some, common_names(frames), sizes, have_palette(frames))
        std, source = info.std[info.own_channels], str(frames[0])
        source += f" and {len(pairs) - 1} more image(s)" if len(pairs) > 1 else ""
        for line in compare(info.profile, profile, std, source, by_data=True, ways="scale them to these"):
            echo(f"warning: {line}")


def _fit_labels(flags: DatabaseFlags, known: Known, labels: list[Label]) -> Classes:
    """Classes of the database, and how the new labels are read: as its labels were."""
    info, reading = known.info, _reading(known, flags.background, labels)
    ignore = "" if info.ignore is None else typed(info.ignore)
    if ignore and flags.ignore not in ("", ignore):
        raise UserError(f"--ignore {flags.ignore}: in the database it is {ignore}: leave it out")
    ignore = ignore or flags.ignore
    classes = fit_classes(labels, info, reading, ignore)
    of_background = ([0], [reading.background]) if reading.objects else ()
    if ignore in map(typed, info.class_values) or numbers_in(ignore) in of_background:
        raise UserError(f"--ignore {ignore}: a class of the database has that value: choose another")
    return classes


def _reading(known: Known, background: str, labels: list[Label]) -> Reading:
    """How the labels of the database were read; an older one tells it by its classes, but not which background."""
    values, entry = known.info.class_values, known.entries.get("labels")
    rules = {
        "threshold": lambda value: value is None or is_number(value),
        "objects": lambda value: isinstance(value, bool),
        "background": is_number,
        "indices": lambda value: isinstance(value, bool),
    }
    entry = {"indices": False} | entry if isinstance(entry, dict) else entry
    if isinstance(entry, dict) and entry.keys() == rules.keys() and all(rules[name](entry[name]) for name in rules):
        reading = Reading(**entry)
    else:
        texts = [value for value in values if isinstance(value, str)]
        above = [text.removeprefix("> ") for text in texts if text.startswith("> ")]
        reading = Reading(float(above[0]) if above else None, objects=sorted(texts) == ["background", "object"])
    if reading.objects:
        return reading._replace(background=_background_number(reading.background, background, labels))
    if background:
        raise UserError(f"--background {background}: the classes of the database stay: leave it out")
    return reading


def _background_number(expected: float, typed_number: str, labels: list[Label]) -> float:
    """Number of the background of labels that number their objects, which predict writes as 0; asks if unsure."""
    if typed_number:
        return (numbers_in(typed_number) or [0])[0]
    numbers = [label.read()[..., 0] for label in labels if isinstance(label, Frame)]  # others are masks of one object
    number = border_number(numbers) if numbers else expected
    if number is None:  # cells without a gap: 0 is the background if it is there, as in labels of predict
        number = 0.0 if expected and any((image == 0).any() for image in numbers) else expected
    if number != expected:
        what = f"the background of the labels seems to be {number:g}, that of the database is {expected:g}"
        raise UserError(f"{what}: say which it is in these, with --background {number:g} or --background {expected:g}")
    return expected


def _sort(pairs: list[Pair], known: Known, classes: Classes, flags: DatabaseFlags) -> Addition:
    """Tell images that the database has from others; refuses the former without `--replace`, and copies."""
    addition = Addition([], [], flags.to)
    first: dict[bytes, Pair] = {}
    there: list[str] = []
    for pair in pairs:
        image = pair.image()
        copy = first.setdefault(digest_of(image), pair)
        if copy is not pair:
            raise UserError(f"{pair.input} has the pixels of {copy.input}: leave one of them out")
        if places := known.find(image):
            label = classes.indices(pair.label)
            others = [place for place in places if not _is_label_of(place, label[place.window])]
            addition.replaced.extend((place, replace(pair, window=place.window)) for place in others)
            there += [f"{pair.input} ({place})" for place in places]
        else:
            addition.added.append(pair)
    if there and not flags.replace:
        more = f" and {len(there) - MOST_NAMED} more" if len(there) > MOST_NAMED else ""
        what = f"in the database already: {', '.join(there[:MOST_NAMED])}{more}"
        raise UserError(f"{what}: leave them out, or add --replace, which gives them their new labels")
    return addition


def _is_label_of(place: Place, label: np.ndarray) -> bool:
    """Whether a sample has this label (H, W) already."""
    old = place.file.open()[1]
    return old is not None and np.array_equal(old, label)


def _write(new_folder: Path, known: Known, addition: Addition, classes: Classes, notes: list[str], show: Show) -> str:
    """Write the old samples and the new ones, and return the report."""
    to, folder = addition.to, new_folder.parent
    replaced = {place.file.input for place, _ in addition.replaced}
    files: Files = {split: [new_folder / split / file.input.name for file in known.files[split]] for split in SPLITS}
    for split in SPLITS:
        _link_samples(folder / split, new_folder / split, replaced)
    for place, pair in addition.replaced:
        path = new_folder / place.split / place.file.input.name
        write_sample_of(pair, path, place.file.open()[0], classes)
    first = 1 + max((int(path.stem) for path in files[to]), default=-1)
    jobs = [(new_folder / to / f"{first + n:05d}.npy", pair) for n, pair in enumerate(addition.added)]
    write_samples(jobs, classes)
    files[to] += [path for path, _ in jobs]
    notes = [_numbers(files, addition), *notes]
    annotated = _annotated_now(folder, known, addition)
    if unlabelled := [file.input for file in list_unlabelled(folder) if file.input not in annotated]:
        _link_samples(folder / UNLABELLED, new_folder / UNLABELLED, annotated)
        files[UNLABELLED] = [new_folder / UNLABELLED / path.name for path in unlabelled]
    notes += [f"{len(annotated)} unlabelled image(s) have a label now"] if annotated else []
    old, entries = known.info.profile, _entries(known, addition, jobs)
    entries["samples"] |= {UNLABELLED: _of_files(known, unlabelled)} if unlabelled else {}
    channels, indexed = (old.channels, old.is_indexed) if old else ([], False)
    contents = Contents(new_folder, files, classes, known.info.context, channels, indexed, entries)
    return contents.complete(notes, [], show)


def _annotated_now(folder: Path, known: Known, addition: Addition) -> set[Path]:
    """Unlabelled samples whose images are added, by their pixels: to whichever set, a training must not see them so."""
    files, added = list_unlabelled(folder), {digest_of(pair.image()) for pair in addition.added}
    images = ((file.input, file.open()[0][..., known.info.own_channels]) for file in files)
    return {path for path, image in images if digest_of(image) in added}


def _of_files(known: Known, paths: list[Path]) -> list[Entries]:
    """Entries of the description of some unlabelled samples."""
    names = {path.name for path in paths}
    return [entry for entry in known.entries.get("samples", {}).get(UNLABELLED, []) if entry.get("file") in names]


def _link_samples(source: Path, target: Path, replaced: set[Path]) -> None:
    """Give the samples of a split, and their distances, a name in another folder too, but for the `replaced` ones."""
    for path in sorted(source.glob("*.npy")):
        is_replaced = path in replaced or path.with_name(path.name.replace(DISTANCE, ".npy")) in replaced
        if re.fullmatch(SAMPLES, path.name) and not is_replaced:
            target.mkdir(exist_ok=True)
            try:
                os.link(path, target / path.name)
            except OSError:  # a file system without links
                shutil.copyfile(path, target / path.name)


def _entries(known: Known, addition: Addition, jobs: list[Job]) -> Entries:
    """Entries of the description with the new samples and sources after the old ones."""
    old, samples = known.entries.get("sources", []), known.entries.get("samples", {})
    pairs = [*addition.added, *(pair for _, pair in addition.replaced)]
    sources = sources_of(pairs, {entry["sha256"]: entry["name"] for entry in old})
    new = [entry for entry in source_entries(sources.values()) if entry not in old]
    lists = {split: [*samples.get(split, [])] for split in SPLITS}
    lists[addition.to] += sample_entries(jobs, sources)
    split = {"split": known.entries["split"]} if "split" in known.entries else {}
    return split | {"sources": [*old, *new], "samples": lists}


def _numbers(files: Files, addition: Addition) -> str:
    """Line with the number of samples of each split, and which splits are as they were."""
    numbers, same = [], []
    for split, of in files.items():
        new = [f"{len(addition.added)} more"] if split == addition.to and addition.added else []
        num = sum(place.split == split for place, _ in addition.replaced)
        new += [f"{num} with a new label"] if num else []
        numbers.append(f"{len(of)} {split}" + (f" ({', '.join(new)})" if new else ""))
        same += [] if new else [SPLIT_NAMES[split]]
    verb = "is as it was" if len(same) == 1 else "are as they were"
    return ", ".join(numbers) + (f": {' and '.join(same)} {verb}" if same else "")


def _last_training(name: str) -> dict[str, Any]:
    """Flags of a training as the newest on the database of this name, which begins with its network; else none."""
    default, values = Config(), {}
    folders = [path.parent for path in Path(default.dir_checkpoint).glob(f"*/{glob.escape(name)}/*.pth")]
    if not folders:
        return {}
    newest = max(folders, key=lambda folder: folder.stat().st_mtime)
    with suppress(OSError):
        lines = (Path(default.dir_log) / newest.parent.name / name / "arg.txt").read_text("utf-8").splitlines()
        typed = dict(line.removeprefix("--").split(maxsplit=1) for line in lines if len(line.split(maxsplit=1)) == 2)
        usual = {flag.removeprefix("--"): str(value) for flag, value in default.as_typed().items()}
        fixed = {"mode", "name_data", "dir_data", "train_continue", "epoch", "init_from"}
        values = {k: v for k, v in typed.items() if k not in fixed and v != usual.get(k, v)}
    return values and values | {"train_continue": False, "init_from": newest.as_posix()}
