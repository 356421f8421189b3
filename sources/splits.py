"""Which samples are for training, validation and testing: blocks, folds, or regions of each image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from config import NO_LABEL, OF_SPLIT, DatabaseFlags
from flags import fold_numbers
from progress import tracked
from samples import IGNORE, SPLITS, digest_of, is_database
from sources.known import Known
from sources.labels import Classes
from sources.pairing import Pair
from utils import UserError, echo

MIN_REGION = 32  # [px] least length of a region along the side that is cut
MARGIN, SMALL_MARGIN = 32, 8  # [px] dropped between two regions, the second where there is less than LARGE
LARGE = 512  # [px] from the first to the last annotated pixel along the side that is cut

Splits = dict[str, list[Pair]]


def split_pairs(
    pairs: list[Pair], classes: Classes, flags: DatabaseFlags, known: Known | None = None
) -> tuple[Splits, list[str]]:
    """Samples of each split, without images that have no annotated pixel, and lines for the report.

    Images of the database `known` stay in their splits.
    """
    profiles: list[tuple[Pair, np.ndarray]] = []
    annotated, left_out = pairs, []
    if flags.split == "region" or classes.ignore is not None:
        profiles = [(pair, _profile(pair, classes)) for pair in tracked(pairs, "annotation")]
        profiles = [(pair, profile) for pair, profile in profiles if profile.any()]
        annotated = [pair for pair, _ in profiles]
    if len(annotated) < len(pairs):
        left_out = [f"left out: {len(pairs) - len(annotated)} image(s) without an annotated pixel"]
    if flags.split == "region":
        splits, note = _regions(profiles, flags)
        return splits, [note, *left_out, *(_cut_elsewhere(splits, known) if known else [])]
    if known:
        splits, note = _as_before(annotated, known)
        if note and not splits["train"]:
            what = f"all {len(annotated)} image(s) were in the validation or test of the database"
            raise UserError(f"{what}: add others for the training, or name --split contiguous to split them again")
        if note:
            return splits, [note, *left_out]
    numbers = split_numbers(len(annotated), flags, "".join(f"; {line}" for line in left_out))
    splits = {split: [annotated[i] for i in members] for split, members in numbers.items()}
    num, num_train = len(annotated), len(splits["train"])
    few = f"of {num} images {num_train} train: to train on all add --num_val 0 --num_test 0, or --split region"
    is_few = 2 * num_train < num and not flags.given(*OF_SPLIT) and flags.label != NO_LABEL
    return splits, ([f"fold {flags.fold}"] if flags.fold else []) + left_out + ([few] if is_few else [])


def known_splits(folder: Path, flags: DatabaseFlags) -> tuple[Known | None, DatabaseFlags]:
    """The database that is replaced, if its splits stay, and the flags of that split; naming one splits again."""
    kept = flags.overwrite and not (flags.synthetic or flags.label == NO_LABEL)
    if not kept or not is_database(folder) or (flags.given(*OF_SPLIT) and flags.split != "region"):
        return None, flags
    try:
        known = Known.load(folder)
    except UserError as error:
        echo(f"note: the images are split again, since the old database can't be read: {error}")
        return None, flags
    split = known.entries.get("split")
    is_region = isinstance(split, dict) and split.get("kind") == "region"
    if is_region and flags.split == "auto":
        num_val, num_test = (-1 if known.files[split] else 0 for split in ("val", "test"))
        flags = replace(flags, split="region", num_val=num_val, num_test=num_test)
    return known if is_region == (flags.split == "region") and known.info.class_values else None, flags


def _as_before(pairs: list[Pair], known: Known) -> tuple[Splits, str]:
    """Images of a database in their splits, and others in the training, with a line for the report."""
    splits: Splits = {split: [] for split in SPLITS}
    places = [known.find(pair.image()) for pair in tracked(pairs, "splits")]
    for pair, of_pair in zip(pairs, places, strict=True):
        splits[of_pair[0].split if of_pair else "train"].append(pair)
    num_new = places.count([])
    what = f"{len(pairs) - num_new} image(s) stay in the set where they were"
    return splits, f"{what}, {num_new} new in train; --split contiguous splits again" if num_new < len(pairs) else ""


def _cut_elsewhere(splits: Splits, known: Known) -> list[str]:
    """Line on regions of the earlier validation and test that are not those of the new database."""
    new = {(split, digest_of(pair.image())) for split in SPLITS for pair in splits[split]}
    old = {(place.split, digest) for digest, places in known.places.items() for place in places}
    num = len({each for each in old - new if each[0] != "train"})
    what = f"{num} region(s) of the validation and the test are cut elsewhere, or gone"
    return [f"{what}: scores can't be compared with those before"] if num else []


def split_numbers(num: int, flags: DatabaseFlags, hint: str = "") -> dict[str, np.ndarray]:
    """Numbers of the samples of each split, in order, of so many samples; messages end with the hint."""
    order = np.arange(num)
    if flags.split == "random":
        order = np.random.default_rng(flags.seed).permutation(num)
    if flags.fold:  # one of N parts for the test, the one before it for validation
        number, total = fold_numbers(flags.fold)
        if total > num:
            raise UserError(f"--fold {flags.fold}: {num} image(s): N must be at most that{hint}")
        parts = np.array_split(order, total)
        test, val = parts.pop(number - 1), parts.pop(number - 2)  # -1 is the last part
        blocks = [np.concatenate(parts), val, test]
    else:
        tenth = max(1, round(num / 10))
        num_val, num_test = (tenth if number < 0 else number for number in (flags.num_val, flags.num_test))
        if flags.label == NO_LABEL:  # such images can only be tested
            num_val, num_test = 0, num
        elif num - num_val - num_test < 1:
            what = f"{num} image(s), {num_val} for validation, {num_test} for testing"
            advice = "lower --num_val or --num_test, or cut the images by --split region"
            raise UserError(f"{what}: none is left for training: {advice}{hint}")
        blocks = np.split(order, [num - num_val - num_test, num - num_test])
    return {split: np.sort(block) for split, block in zip(SPLITS, blocks, strict=True)}


def _profile(pair: Pair, classes: Classes) -> np.ndarray:
    """Number of annotated pixels at each position along the longer side."""
    axis = int(np.argmax(pair.shape))
    if classes.ignore is None or pair.label is None:
        return np.full(pair.shape[axis], pair.shape[1 - axis])
    return (classes.indices(pair.label) != IGNORE).sum(1 - axis)


def _regions(profiles: list[tuple[Pair, np.ndarray]], flags: DatabaseFlags) -> tuple[Splits, str]:
    """Samples that are regions of the images, and a line for the report."""
    # pages of a file, or of a 2.5D stack, are cut at the same position: neighbouring sections look alike, so that the
    # network would train on what it is tested on
    groups: dict[tuple, list[tuple[Pair, np.ndarray]]] = defaultdict(list)
    for pair, profile in profiles:
        groups[None if flags.context else pair.input.path, pair.shape].append((pair, profile))
    wanted = [split for split in SPLITS if split == "train" or getattr(flags, f"num_{split}") != 0]
    splits: Splits = {split: [] for split in SPLITS}
    margins = set()
    for members in groups.values():
        weight = np.sum([profile for _, profile in members], axis=0)
        margins.add(margin_of(weight))
        for split, region in cut_regions(weight, wanted, str(members[0][0].input)).items():
            for pair, profile in members:
                if profile[region].any():
                    window = (slice(None), region) if np.argmax(pair.shape) else (region, slice(None))
                    splits[split].append(replace(pair, window=window))
    dropped = " or ".join(f"{margin} px" for margin in sorted(margins, reverse=True))
    cut = f"regions of {len(profiles)} image(s), cut along the longer side"
    return splits, f"{cut}; {dropped} between them are dropped"


def margin_of(weight: np.ndarray) -> int:
    """Length [px] that is dropped between two regions, so that they do not look alike."""
    annotated = np.flatnonzero(weight)
    return MARGIN if annotated[-1] - annotated[0] + 1 >= LARGE else SMALL_MARGIN


def cut_regions(weight: np.ndarray, wanted: Sequence[str], name: str) -> dict[str, slice]:
    """Cut the side of an image with (L,) annotated pixels at each position into a region for each of the wanted splits.

    Validation and test have a tenth of the annotated pixels each, and at least `MIN_REGION` px.

    Examples
    --------
    >>> cut_regions(np.full(1000, 7), ["train", "val", "test"], "slide.tif")
    {'train': slice(0, 736, None), 'val': slice(768, 868, None), 'test': slice(900, 1000, None)}
    """
    margin = margin_of(weight)
    before = np.concatenate([[0], np.cumsum(weight, dtype=np.int64)])  # annotated pixels before each position
    regions, stop = {}, len(weight)
    for split in reversed(wanted):
        # the last position from which on a tenth lies before `stop`; -1 if there is none
        start = int(np.searchsorted(10 * before, 10 * before[max(stop, 0)] - before[-1], side="right")) - 1
        start = min(start, stop - MIN_REGION)
        if start < 0:
            side = f"{len(weight)} px long, {np.count_nonzero(weight)} px of it annotated"
            parts = f"{len(wanted)} regions of {MIN_REGION} px and a tenth of the annotation, {margin} px between them"
            raise UserError(f"{name}: the longer side, {side}, is too short for {parts}: use another --split")
        regions[split] = slice(0 if split == wanted[0] else start, stop)
        stop = start - margin
    return {split: regions[split] for split in wanted}
