"""Values of the classes in label images, as run_make_database.py reads them."""

from __future__ import annotations

from math import ceil, floor

import numpy as np

from description import DataInfo

TYPES = (np.uint8, np.uint16, np.float32, np.float64)  # that Fiji opens
MARGIN = 1e-5  # the name of a class has six digits of its threshold


def label_values(info: DataInfo) -> np.ndarray | None:
    """Grey value (K,) or colour (K, 3) of each class in the smallest type that has it; None: objects are numbered.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> for values in ([0, 255], [0, 1000], [-1, 2], [[0, 0, 0], [255, 0, 0]], ["> 300", "<= 300"], ["a", "b"]):
    ...     array = label_values(SimpleNamespace(class_values=values, ignore=255))
    ...     print(array is not None and (array.dtype.name, array.tolist()))
    ('uint8', [0, 255])
    ('uint16', [0, 1000])
    ('float32', [-1.0, 2.0])
    ('uint8', [[0, 0, 0], [255, 0, 0]])
    ('uint16', [302, 0])
    False
    """
    values = [_by_threshold(value, info.ignore) if isinstance(value, str) else value for value in info.class_values]
    if None in values:
        return None
    return next(np.array(values, dtype) for dtype in TYPES if _holds(dtype, values) or dtype is TYPES[-1])


def _by_threshold(name: str, ignore: object) -> int | None:
    """Value on its side of the threshold that a class of `--threshold` is named after; None for other names.

    It is not that of pixels that are not annotated.
    """
    side, _, text = name.partition(" ")
    if side not in ("<=", ">"):
        return None
    threshold = float(text)
    margin = abs(threshold) * MARGIN
    if side == "<=":
        value = min(0, floor(threshold - margin))
        return value - (value == ignore)
    value = max(255, ceil(threshold + margin) + 1)
    return value + (value == ignore)


def _holds(dtype: type, values: list) -> bool:
    """Whether a type has all of these values."""
    array = np.array(values, np.float64)
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return bool(((array >= limits.min) & (array <= limits.max) & (array == np.floor(array))).all())
    return bool((array.astype(dtype) == array).all())
