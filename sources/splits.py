"""Which samples are for training, validation and testing: contiguous or random."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from config import NO_LABEL, DatabaseFlags
from dataset import IGNORE, SPLITS
from sources.labels import Classes
from sources.pairing import Pair
from utils import UserError

Splits = dict[str, list[Pair]]


def split_pairs(pairs: list[Pair], classes: Classes, flags: DatabaseFlags) -> tuple[Splits, list[str]]:
    """Assign images to the splits; those without an annotated pixel are left out.

    Parameters
    ----------
    pairs : list of Pair
        Images and labels.
    classes : Classes
        The classes of the labels.
    flags : DatabaseFlags
        `split`, `num_val`, `num_test`, `seed` and `label`.

    Returns
    -------
    splits : dict of list of Pair
        The samples of each split.
    notes : list of str
        Lines for the report.

    Raises
    ------
    UserError
        No image is left for training.
    """
    kept = pairs
    if classes.ignore is not None:
        shown = tqdm(pairs, desc="annotation", disable=None, leave=False)
        kept = [pair for pair in shown if _is_annotated(pair, classes)]
    left_out = _left_out(len(pairs) - len(kept))
    numbers = split_numbers(len(kept), flags, "".join(f"; {line}" for line in left_out))
    splits = {split: [kept[i] for i in members] for split, members in numbers.items()}
    return splits, left_out


def split_numbers(num: int, flags: DatabaseFlags, hint: str = "") -> dict[str, np.ndarray]:
    """Numbers of the samples of each split, in order, of so many samples.

    Raises
    ------
    UserError
        None is left for training; the message ends with the hint.
    """
    order = np.arange(num)
    if flags.split == "random":
        order = np.random.default_rng(flags.seed).permutation(num)
    tenth = max(1, round(num / 10))
    num_val, num_test = (tenth if number < 0 else number for number in (flags.num_val, flags.num_test))
    if flags.label == NO_LABEL:  # such images can only be tested
        num_val, num_test = 0, num
    elif num - num_val - num_test < 1:
        what = f"{num} image(s), {num_val} for validation, {num_test} for testing"
        raise UserError(f"{what}: none is left for training: lower --num_val or --num_test{hint}")
    blocks = np.split(order, [num - num_val - num_test, num - num_test])
    return {split: np.sort(block) for split, block in zip(SPLITS, blocks, strict=True)}


def _left_out(num: int) -> list[str]:
    """Line of the report for images without an annotated pixel."""
    return [f"left out: {num} image(s) without an annotated pixel"] if num else []


def _is_annotated(pair: Pair, classes: Classes) -> bool:
    """Whether any pixel of an image is annotated."""
    return pair.label is None or bool((classes.indices(pair.label) != IGNORE).any())
