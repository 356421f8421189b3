"""The threshold of a network: whose probability it is of, and where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from utils import FlagError

if TYPE_CHECKING:
    from prediction.predictor import Predictor

FEW_IMAGES, FEW_OBJECTS = 3, 100  # fewer tell little about a threshold


def of_foreground(threshold: float, background: int) -> float:
    """Threshold of the foreground from that of class 1, and the other way round.

    >>> of_foreground(0.3, background=0), of_foreground(0.3, background=1)
    (0.3, 0.7)
    """
    return threshold if background == 0 else round(1 - threshold, 6)


def origin_of(*members: Sequence[int] | None) -> str:
    """Where the threshold of a checkpoint, or the mean of several, comes from, by their entries `chosen_on`.

    >>> origin_of([3, 120]), origin_of(None), origin_of([0, 0], None)
    ('chosen on the validation images', 'that of the checkpoint', 'mean of: none was chosen, that of the checkpoint')
    """
    if len(members) > 1:
        return f"mean of: {', '.join(dict.fromkeys(map(origin_of, members)))}"
    (chosen_on,) = members
    if chosen_on is None:
        return "that of the checkpoint"
    num_image, num_object = chosen_on
    if not num_image:
        return "none was chosen"
    if num_image < FEW_IMAGES or num_object < FEW_OBJECTS:
        return f"chosen on little ({num_image} validation image(s), {num_object} objects): try others with --threshold"
    return "chosen on the validation images"


def at_threshold(predictor: Predictor, threshold: float | None, flag: str = "--threshold") -> Predictor:
    """Predictor whose foreground is where its probability is above a threshold; None: as it is."""
    if threshold is None:
        return predictor
    if predictor.info.num_class > 2:
        what = f"of {predictor.info.num_class} classes the most probable one counts, there is no threshold"
        raise FlagError(f"{flag} {threshold:g}: {what}: leave it out")
    if not 0 <= threshold <= 1:
        raise FlagError(f"{flag} {threshold:g}: must lie in [0, 1]")
    return replace(predictor, threshold=of_foreground(threshold, predictor.background), threshold_origin=flag)
