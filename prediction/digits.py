"""The numbers of the objects in a picture: white digits with a black rim."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

# the rows of each digit, of 3 x 5 px: the three bits of an octal digit are the pixels of a row
ROWS = ("75557", "26227", "71747", "71717", "55711", "74717", "74757", "71222", "75757", "75717")
DIGITS = np.array([[[int(row) & bit for bit in (4, 2, 1, 0)] for row in rows] for rows in ROWS]) > 0  # with a gap
OVERLAP = 2  # [px] by which a number may be higher or wider than its object: 10 px hold three digits
FRACTION, LARGEST = 3, 6  # a number takes a third of a large object, and has pixels of this side at most


def digits_of(number: int) -> np.ndarray:
    """Picture (5, W) bool of a number.

    >>> for row in digits_of(17).astype(int): print("".join(".#"[pixel] for pixel in row))
    .#..###
    ##....#
    .#...#.
    .#...#.
    ###..#.
    """
    return DIGITS[[int(digit) for digit in str(number)]].swapaxes(0, 1).reshape(5, -1)[:, :-1]


class ObjectNumbers:
    """Draws the numbers of the objects of an image whose picture is made band by band.

    A number stands in the first band that has room for it in its object, since what follows is not known; an object
    too small for its number has none.
    """

    def __init__(self) -> None:
        self._drawn: set[int] = set()

    def draw(self, picture: np.ndarray, objects: np.ndarray, black: int = 0, white: int = 255) -> None:
        """Draw into the next band of the picture (h, W, 3), or (h, W) with a palette, of these objects (h, W)."""
        ink = np.zeros(objects.shape, bool)
        for number, box in enumerate(ndimage.find_objects(objects), 1):
            if box is not None and number not in self._drawn and _draw(ink, objects[box] == number, box, number):
                self._drawn.add(number)
        picture[ndimage.binary_dilation(ink, np.ones((3, 3)))] = black
        picture[ink] = white


def _draw(ink: np.ndarray, inside: np.ndarray, box: tuple[slice, slice], number: int) -> bool:
    """Draw the digits of a number into the part of an object that a box holds, if there is room for them."""
    size = np.array([5, 4 * len(str(number)) - 1])
    if (size > np.array(inside.shape) + OVERLAP).any() or (size + 2 > ink.shape).any():  # with its rim
        return False
    area = inside.sum(1).cumsum()
    row = int(area.searchsorted(area[-1] / 2))  # as much of the object is above it as below
    runs = _runs(inside[row])
    left, right = runs[(runs[:, 1] - runs[:, 0]).argmax()]
    column = (left + right) // 2
    (top, bottom), *_ = [run for run in _runs(inside[:, column]) if run[0] <= row < run[1]]
    room = np.array([bottom - top, right - left])
    if (room + OVERLAP < size).any():
        return False
    scale = int((room // FRACTION // size).min().clip(1, LARGEST))
    digits = digits_of(number).repeat(scale, 0).repeat(scale, 1)
    centre = np.array([box[0].start + (top + bottom) // 2, box[1].start + column])
    first = (centre - size * scale // 2).clip(1, ink.shape - size * scale - 1)
    ink[first[0] : first[0] + len(digits), first[1] : first[1] + digits.shape[1]] |= digits
    return True


def _runs(line: np.ndarray) -> np.ndarray:
    """First index of each run of True in a line (N,), and the index after its last, (R, 2)."""
    padded = np.zeros(len(line) + 2, bool)
    padded[1:-1] = line
    return np.flatnonzero(padded[1:] != padded[:-1]).reshape(-1, 2)
