"""Images of cameras that say how they were held: EXIF orientation, and the tag of TIFF."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from images.memory import ByteCache, check_size
from images.rows import LazyImage, Rows

TAG = 274  # in EXIF and in TIFF
# Orientation -> whether rows and columns are exchanged, and then the order of the rows and of the columns reversed
TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
NOTE = "turned as its EXIF orientation says, which is how viewers show it"

_turned = ByteCache(2**28)  # images whose rows are columns of the file


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """View of pixels (H, W, ...) as they were seen by the camera.

    Examples
    --------
    >>> turn(np.array([[1, 2, 3], [4, 5, 6]]), 6).tolist()
    [[4, 1], [5, 2], [6, 3]]
    """
    swapped, up, back = TURNS.get(orientation, (False, False, False))
    pixels = pixels.swapaxes(0, 1) if swapped else pixels
    return pixels[:: -1 if up else 1, :: -1 if back else 1]


def orientation_of(image: Any) -> int:
    """Orientation of a picture that Pillow has opened; 1 if it is none that exists. The pixels are not decoded."""
    from PIL import Image

    try:
        orientation = Image.Image.getexif(image).get(TAG, 1)
    except Exception:  # damaged EXIF raises all kinds of exceptions, and does not matter
        return 1
    return orientation if orientation in TURNS else 1


def turned(path: Path, image: Rows, orientation: int) -> Rows:
    """Image as the camera saw it, turned when rows are read; as a whole if its rows are columns of the file."""
    if isinstance(image, np.ndarray):
        return turn(image, orientation)
    swapped, up, _ = TURNS[orientation]
    height, width, channels = image.shape
    key = object()  # of the turned image in the cache
    is_missing = getattr(image, "is_missing", False)

    def read_rows(top: int, bottom: int) -> np.ndarray:
        if up:
            top, bottom = height - bottom, height - top
        return turn(np.asarray(image[top:bottom]), orientation)

    def read_columns(top: int, bottom: int) -> np.ndarray:
        return _turned.get(key, lambda: turn(np.asarray(image[:]), orientation))[top:bottom]

    if not swapped:
        return LazyImage(image.shape, image.dtype, read_rows, is_missing=is_missing)
    check_size(path, math.prod(image.shape) * image.dtype.itemsize, copies=2)
    return LazyImage((width, height, channels), image.dtype, read_columns, is_missing=is_missing)
