"""What the readers of image files return: frames (H, W, C) whose pixels are read when their rows are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils import UserError, is_out_of_memory

MAX_FRAMES = 10**6  # a file that says it holds more is damaged


class Rows(Protocol):
    """An image (H, W, C), of which `image[top:bottom]` reads no more than these rows need."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and number of channels."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the pixels."""

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""


class Readable:
    """Base of images (H, W, C) that are read by rows: all of them, as an array."""

    shape: tuple[int, int, int]
    dtype: np.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        raise NotImplementedError

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All pixels."""
        return self[:].astype(dtype or self.dtype, copy=False)


class Converted(Readable):
    """Image whose rows are converted when they are read.

    Parameters
    ----------
    image : Rows
        As stored.
    convert : callable
        Makes pixels (h, W, C) of stored ones.
    """

    def __init__(self, image: Rows, convert: Callable[[np.ndarray], np.ndarray]) -> None:
        self._image, self._convert = image, convert
        self._mmap = getattr(image, "_mmap", None)
        sample = convert(np.zeros((1, 1, image.shape[2]), image.dtype))
        self.shape, self.dtype = (*image.shape[:2], sample.shape[2]), sample.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        return self._convert(np.asarray(self._image[rows]))


@dataclass
class Frames:
    """What one file holds.

    Attributes
    ----------
    images : list of Rows
        Each frame.
    stacks : list of int
        Number of the Z stack that each frame is of.
    files : set of Path
        Files that they are read from, where those are not the one that was named alone.
    """

    images: list[Rows] = field(default_factory=list)
    stacks: list[int] = field(default_factory=list)
    files: set[Path] = field(default_factory=set)

    def add(self, images: Sequence[Rows], stacks: list[int]) -> None:
        """Add the frames of a series, whose stacks are none of those that are there."""
        first = max(self.stacks, default=-1) + 1
        self.images += images
        self.stacks += [first + stack for stack in stacks]


def check_count(path: Path, lengths: tuple[int, ...]) -> None:
    """Refuse a file that claims more frames than there can be, before an object is made for each."""
    if math.prod(lengths) > MAX_FRAMES:
        raise UserError(f"{path}: claims {math.prod(lengths)} images, at most {MAX_FRAMES} are read: check the file")


@contextmanager
def naming(what: str, advice: str) -> Iterator[None]:
    """Turn whatever a library raises, as a damaged file makes it stumble, into one line.

    Parameters
    ----------
    what : str
        File and what may be wrong with it.
    advice : str
        What to do.

    Raises
    ------
    UserError
        Says what, why and what to do; other `UserError`s pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError(f"{what.partition(': ')[0]}: does not fit in memory: close other programs") from error
        advice = "pip install imagecodecs" if "imagecodecs" in str(error) else advice
        raise UserError(f"{what} ({one_line(error)}): {advice}") from error


def one_line(error: Exception) -> str:
    """What a library says of a damaged file, in one line and without NumPy's advice to trust it."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    text = " ".join(text.split("allow_pickle")[0].split())
    return (text[:300] + "...") * (len(text) > 300) or text or type(error).__name__


def plain(pixels: np.ndarray) -> np.ndarray:
    """Pixels in this machine's byte order; one bit becomes 0 and 255."""
    if pixels.dtype == bool:
        return pixels * np.uint8(255)
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def split(pixels: np.ndarray, axes: str, path: Path) -> list[np.ndarray]:
    """Cut an array with named axes into views (H, W, C); S and C are channels, all but Y and X are frames."""
    channels = [axis for axis in axes if axis in "SC"]
    if len(channels) > 1 or "Y" not in axes or "X" not in axes:
        raise UserError(f"{path}: axes {axes} are not understood: save pages of Y, X and at most one channel axis")
    order = [axes.index(axis) for axis in ("Y", "X", *channels)]
    others = [i for i in range(len(axes)) if i not in order]
    pixels = pixels.transpose(others + order)
    if not channels:
        pixels = pixels[..., None]
    return [pixels[place] for place in np.ndindex(pixels.shape[:-3])]


def stack_numbers(axes: str, lengths: tuple[int, ...]) -> list[int]:
    """Which Z stack each frame belongs to; frames along Z are of one, those along any other axis are not.

    An axis without a meaning (`Q` and `I` of tifffile) counts as Z where there is no Z.

    Examples
    --------
    >>> stack_numbers("TZ", (2, 3)), stack_numbers("ZT", (3, 2)), stack_numbers("T", (3,)), stack_numbers("I", (3,))
    ([0, 0, 0, 3, 3, 3], [0, 1, 0, 1, 0, 1], [0, 1, 2], [0, 0, 0])
    """
    numbers = np.arange(math.prod(lengths)).reshape(lengths)
    along = max(axes.rfind(axis) for axis in ("Z" if "Z" in axes else "QI"))
    first = numbers if along < 0 else numbers.take([0], along)
    return np.broadcast_to(first, lengths).ravel().tolist()
