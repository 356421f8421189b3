"""What an entry of a file of ours may be: the rules of descriptions and checkpoints are made of these. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

LARGEST = sys.float_info.max


def is_number(value: Any, low: float = -LARGEST, high: float = LARGEST) -> bool:
    """Whether a value is a finite number in a closed interval.

    Examples
    --------
    >>> [is_number(value) for value in (1, -1.5, True, float("nan"), float("inf"), 10**400, "1")]
    [True, True, False, False, False, False, False]
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def is_integer(value: Any, low: int = 0, high: int = 2**63 - 1) -> bool:
    """Whether a value is a whole number in a closed interval."""
    return isinstance(value, int) and is_number(value, low, high)


def is_list(values: Any, is_item: Callable[[Any], bool], num: int | None = None) -> bool:
    """Whether a value is a list, whose items keep a rule; `num` is their number, if that matters."""
    return isinstance(values, list) and num in (None, len(values)) and all(map(is_item, values))


def is_table(values: Any, is_item: Callable[[Any], bool] = lambda _: True) -> bool:
    """Whether a value is a dictionary whose keys are texts and whose values keep a rule."""
    return isinstance(values, dict) and all(isinstance(key, str) and is_item(item) for key, item in values.items())
