"""Images of cameras that say how they were held: EXIF orientation, and the tag of TIFF."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from images.memory import ByteCache, check_size
from images.rows import Readable, Rows

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
_numbers = itertools.count()


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
    """Image as it was seen by the camera; an array stays one."""
    if isinstance(image, np.ndarray):
        return turn(image, orientation)
    return Turned(path, image, orientation)


class Turned(Readable):
    """Image (H, W, C) that is turned when rows are read; decoded as a whole if its rows are columns of the file."""

    def __init__(self, path: Path, image: Rows, orientation: int) -> None:
        self._image, self._orientation, self._number = image, orientation, next(_numbers)
        self._swapped, self._up, _ = TURNS[orientation]
        height, width, channels = image.shape
        self.shape, self.dtype = (width, height, channels) if self._swapped else image.shape, image.dtype
        if self._swapped:
            check_size(path, math.prod(self.shape) * self.dtype.itemsize, copies=2)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        if self._swapped:
            return _turned.get(self._number, partial(self._turn, slice(None)))[rows]
        top, bottom, step = rows.indices(self.shape[0])
        if self._up:
            top, bottom = self.shape[0] - max(bottom, top), self.shape[0] - top
        return self._turn(slice(top, bottom))[::step]

    def _turn(self, rows: slice) -> np.ndarray:
        return turn(np.asarray(self._image[rows]), self._orientation)
