"""Make a database: draw, download or find the images, check and split them, and write the samples."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from tqdm import tqdm

from config import NO_LABEL, DatabaseFlags
from description import DataInfo, describe
from exchange import atomic_folder, finish_exchange
from images.readers import Frame, forget_files, read_geometry, sha256
from images.selection import Choice
from images.statistics import Moments
from locks import locked
from samples import DISTANCE, ENTRIES, IGNORE, SPLITS, SampleFile, write_sample
from sources import isbi, phantom
from sources.labels import Classes, Label, Masks, choose_background, find_classes, is_number
from sources.pairing import Pair, check_pairs, colour_hint, list_pairs, num_common, with_context
from sources.splits import Splits, split_numbers, split_pairs
from sources.touching import touching_share
from training.weight_map import loss_of, save_distance
from utils import FlagError, UserError, echo, folder_hint

OTHER_NAME = "choose another --name_data"
DRAWN = r"\d+\.tif"  # names of synthetic images in a folder
CLASS_NAMES = {"em": ["membrane", "cell"], "nuclei": ["background", "nucleus"], "rare": ["background", "nucleus"]}
NUM_SEEN = 64  # label images that are asked whether their objects touch
MAX_DRAWN = 2**30  # [px] of a synthetic stack
PRINTED = 25  # [µm] of a pixel at 1016 dpi: larger ones are of a print, as of 72 dpi, which many programs write


def make_database(flags: DatabaseFlags) -> None:
    """Make a database as the flags of `run_make_database.py` say.

    Parameters
    ----------
    flags : DatabaseFlags
        The flags.

    Raises
    ------
    UserError
        The images or labels can't be used, the database exists already, or another program uses it.
    """
    choice = Choice(flags.channel, flags.series, flags.section)
    folder = Path(flags.dir_data) / flags.name_data
    with locked(folder, OTHER_NAME):
        finish_exchange(folder, ENTRIES)
        if not flags.overwrite and any((folder / name).exists() for name in ENTRIES):
            raise UserError(
                f"{folder} contains a database: add --overwrite to replace it, or choose another --name_data"
            )
        if flags.download and not _is_isbi(folder):
            _refuse_to_replace(flags, [folder / name for name in isbi.PIXELS])
            isbi.download(folder, flags.url)
        drawn = _names_to_draw(flags, folder)
        _refuse_foreign_samples(folder)
        with atomic_folder(folder, ENTRIES | dict.fromkeys(drawn, DRAWN), OTHER_NAME) as new_folder:
            if drawn:
                _draw(flags, new_folder)
            lines = _write_database(new_folder, flags, choice, new_folder if drawn else folder)
            forget_files()  # Windows can't rename a memory-mapped file
    echo(f"{folder}: {lines}")


def _refuse_foreign_samples(folder: Path) -> None:
    """Refuse to keep files that would be samples of the new database, or to remove them: they are the user's."""
    for split in SPLITS:
        for path in sorted((folder / split).glob("*.npy")):
            if not (re.fullmatch(ENTRIES[split], path.name) or path.name.endswith(DISTANCE)):
                what = f"{path}: not a sample of this program's, but it would be one of the new database"
                raise UserError(f"{what}: move it, or {OTHER_NAME}")


def _write_database(new_folder: Path, flags: DatabaseFlags, choice: Choice, default_folder: Path) -> str:
    """Write samples and description, and return the report; images not given by flags are in the default folder."""
    images, labels = (default_folder / name for name in _default_names(flags))
    source = flags.input or _existing(images, "--input IMAGES")
    target = None if flags.label == NO_LABEL else flags.label or _existing(labels, "--label LABELS, or --label none")
    pairs = with_context(list_pairs(source, target, choice), flags.context)
    if flags.split != "region":  # at once, not after all pixels are read
        split_numbers(len(pairs), flags, colour_hint([pair.input for pair in pairs]))
    pairs = check_pairs(pairs)
    classes = _classes(pairs, flags)
    splits, notes = split_pairs(pairs, classes, flags)
    files = _write_samples(new_folder, splits, classes)
    samples = (SampleFile(file).open() for file in files["train"] or files["test"])
    moments = Moments()
    info = describe(samples, classes.values, classes.names, flags.context, moments)
    info = replace(info, ignore=classes.ignore).checked(pairs[0].input.path, "scale the images, and save them again")
    entries = {name: value for name, value in asdict(info).items() if value is not None}
    text = json.dumps(entries | _provenance(flags, pairs, splits), indent=1)
    (new_folder / "dataset.json").write_text(text + "\n", "utf-8")
    lines = _report(files, info, pairs[0].input.open().dtype, notes + _annotated_fractions(files, info))
    return f"{lines}\nmean {_numbers(info.mean)}, standard deviation {_numbers(moments.std.tolist())}"


def _default_names(flags: DatabaseFlags) -> tuple[str, str]:
    """Names of images and labels in the database's folder: stacks, or folders if the sizes differ."""
    return (
        ("images", "labels") if flags.synthetic and flags.phantom != "em" else ("train-volume.tif", "train-labels.tif")
    )


def _existing(path: Path, flag: str) -> str:
    """Default path of images or labels, which must exist if no flag names others."""
    if not path.exists():
        hint = folder_hint(path.parent, ("--name_data",), lambda other: (other / path.name).exists())
        raise UserError(f"{path}: no such file or folder: {hint}give {flag}, or put the stack there")
    return str(path)


def _names_to_draw(flags: DatabaseFlags, folder: Path) -> list[str]:
    """Names of the files or folders to draw."""
    if not flags.synthetic:
        return []
    if flags.synthetic * flags.size**2 > MAX_DRAWN:
        raise FlagError(f"--synthetic {flags.synthetic} --size {flags.size}: over {MAX_DRAWN} pixels: lower one")
    names = _default_names(flags)
    _refuse_to_replace(flags, [folder / name for name in names])
    return [*names]


def _draw(flags: DatabaseFlags, folder: Path) -> None:
    """Write synthetic images and their labels."""
    images_and_labels = phantom.PHANTOMS[flags.phantom](flags.synthetic, flags.size, flags.seed)
    for name, images in zip(_default_names(flags), images_and_labels, strict=True):
        _write_images(folder / name, images)


def _write_images(path: Path, images: phantom.Images) -> None:
    """Write images of one size as a TIFF stack, others as a folder of TIFF files."""
    write = partial(tifffile.imwrite, photometric="minisblack")  # else 3 or 4 sections would be saved as RGB
    if isinstance(images, np.ndarray):
        write(path, images)
        return
    path.mkdir()
    for number, image in enumerate(images):
        write(path / f"{number:04d}.tif", image)


def _is_isbi(folder: Path) -> bool:
    """Whether the folder contains the challenge's stacks already."""
    return all((folder / n).is_file() and isbi.pixel_hash(folder / n) == pixels for n, pixels in isbi.PIXELS.items())


def _refuse_to_replace(flags: DatabaseFlags, paths: list[Path]) -> None:
    existing = [str(path) for path in paths if path.exists()]
    if existing and not flags.overwrite:
        raise UserError(f"{' and '.join(existing)} would be replaced: choose another --name_data, or add --overwrite")


def _classes(pairs: list[Pair], flags: DatabaseFlags) -> Classes:
    """Classes of the labels, named and ordered as the flags say."""
    labels = [pair.label for pair in pairs if pair.label]
    if not labels:
        return Classes([], [], lambda label: label.read()[..., 0])
    objects = flags.objects or isinstance(labels[0], Masks)
    numbered = flags.objects and is_number(flags.background)  # one of the objects, not of the two classes
    try:
        classes = find_classes(labels, flags.threshold, objects, flags.ignore, flags.background if numbered else "")
    except UserError as error:
        if len(np.unique(pairs[0].input.read())) > 2:
            raise
        what = f"{pairs[0].input} has two values at most, as a label: are --input and --label swapped?"
        raise UserError(f"{error}; {what}") from error
    if flags.class_names:
        classes = classes._replace(names=_given_names(flags, classes))
    elif flags.synthetic or flags.download:
        classes = classes._replace(names=CLASS_NAMES[flags.phantom])
    classes = choose_background(classes, "" if numbered else flags.background, flags.foreground)
    if len(classes.values) == 2 and not (objects or flags.synthetic or flags.download):
        _hint_at_touching(labels, classes)
    return classes


def _hint_at_touching(labels: list[Label], classes: Classes) -> None:
    """Say so if the objects of masks seem to touch."""
    some = labels[:: -(-len(labels) // NUM_SEEN)]
    if share := touching_share(classes.indices(label) == 1 for label in some):
        what = f"hint: {share:.0%} of the objects look like several that touch, which masks can't teach to part"
        echo(f"{what}: number the objects in the label images, and add --objects on")


def _given_names(flags: DatabaseFlags, classes: Classes) -> list[str]:
    """Names given by the flag, one per class in the order of the values."""
    names = [name.strip() for name in flags.class_names.split(",")]
    if len(set(names)) != len(names) or len(names) != len(classes.values) or not all(map(_is_name, names)):
        what = f"the labels have {len(classes.values)} classes, {classes.values}"
        raise UserError(f"--class_names {flags.class_names}: {what}: give each a different name of letters and digits")
    return names


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[\w -]+", text) is not None


def _write_samples(folder: Path, splits: Splits, classes: Classes) -> dict[str, list[Path]]:
    """Write all samples, and return their paths."""
    files: dict[str, list[Path]] = {split: [] for split in splits}
    jobs = [(split, number, pair) for split, pairs in splits.items() for number, pair in enumerate(pairs)]
    for split, number, pair in tqdm(jobs, desc="write", disable=None, leave=False):
        (folder / split).mkdir(exist_ok=True)
        files[split].append(folder / split / f"{number:05d}.npy")
        label = None if pair.label is None else pair.cut(classes.indices(pair.label)).astype(np.uint8)
        write_sample(files[split][-1], pair.read(), label)
        if split == "train" and label is not None and loss_of("auto", len(classes.values)) == "wbce":
            # computed once, so that a training need not
            save_distance(SampleFile(files[split][-1]), label)
    return files


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
    return {
        "split": {"kind": flags.split, "seed": flags.seed} | ({"fold": flags.fold} if flags.fold else {}),
        "sources": [{"name": name, "sha256": sha256(path)} for path, name in sources.items()],
        "samples": {
            split: [
                {"file": f"{number:05d}.npy", "source": names[pair.input.path]}
                | _place(pair.input)
                | _region(pair)
                | sizes[pair.input.path]
                for number, pair in enumerate(members)
            ]
            for split, members in splits.items()
        },
    }


def names_below(paths: Sequence[Path]) -> dict[Path, str]:
    """Paths below the folder that holds all of these files: their names, if no folders lie between.

    Examples
    --------
    >>> list(names_below([Path("raw/1/images/img.tif"), Path("raw/2/images/img.tif")]).values())
    ['1/images/img.tif', '2/images/img.tif']
    """
    parts = {path: path.absolute().parts for path in paths}
    num = num_common(folders for *folders, _ in parts.values())
    return {path: Path(*of[num:]).as_posix() for path, of in parts.items()}


def _place(frame: Frame) -> dict[str, Any]:
    """Index of a frame in its file, name of its series such as a well and index in it, and the channels if chosen."""
    series = {"series": frame.series, "frame_of_series": frame.index_in_series} if frame.series else {}
    return {"frame": frame.index} | series | ({"channels": list(frame.channels)} if frame.channels else {})


def _pixel_size(frame: Frame) -> dict[str, list[float]]:
    """Height and width of a pixel [µm]; empty if the file doesn't give them."""
    geometry = read_geometry([frame])
    size = [geometry.pixel.get(axis, 0.0) for axis in "YX"]
    return {"pixel_size": size} if geometry.unit == "micron" and 0 < min(size) <= max(size) < PRINTED else {}


def _region(pair: Pair) -> dict[str, list[int]]:
    """First and last row, or column, of a sample that is a region of its image; empty for a whole image."""
    if pair.window is None:
        return {}
    sides = {"rows": pair.window[0], "columns": pair.window[1]}
    return {name: [side.start, side.stop - 1] for name, side in sides.items() if side.stop is not None}


def _annotated_fractions(files: dict[str, list[Path]], info: DataInfo) -> list[str]:
    """Line of the report that says how much of each split is annotated; none if all is."""
    if not info.is_partial:
        return []
    shown = []
    for split, paths in files.items():
        num_valid = num_pixel = 0
        for path in paths:  # one by one: each keeps a file open
            label = SampleFile(path).open()[1]
            if label is not None:
                num_valid, num_pixel = num_valid + int(np.count_nonzero(label != IGNORE)), num_pixel + label.size
        shown += [f"{num_valid / num_pixel:.1%} of {split}"] if num_pixel else []
    return [f"annotated: {', '.join(shown)}"]


def _report(files: dict[str, list[Path]], info: DataInfo, dtype: np.dtype, notes: list[str]) -> str:
    """Lines that describe the database."""
    sizes = sorted({SampleFile(path).open()[0].shape[:2] for paths in files.values() for path in paths})
    shown = ", ".join(f"{height} x {width}" for height, width in sizes[:5]) + (" ..." if len(sizes) > 5 else "")
    lines = [", ".join(f"{len(members)} {split}" for split, members in files.items()), *notes]
    lines += [f"images: {shown} px, {info.nch_in} channel(s) of {dtype.name}"]
    for index, value in enumerate(info.class_values):
        role = {0: " (background)", 1: " (foreground)" if info.num_class == 2 else ""}.get(index, "")
        words = f"{info.class_names[index]}, " + ("" if isinstance(value, str) else f"label value {value}, ")
        pixels = "annotated pixels" if info.is_partial else "pixels"
        lines += [f"class {index}{role}: {words}{info.class_share[index]:.1%} of {pixels}"]
        if not info.class_share[index] and files["train"]:
            lines += [f"warning: no training sample has class {index}: choose another --split, or annotate more"]
    return "\n".join(lines)


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
