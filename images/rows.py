"""Frames (H, W, C) as the readers of image files return them: pixels are read when rows are requested."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from images.geometry import Geometry
from utils import UserError, is_out_of_memory

STACKED = "TZIQ"  # axes along which the frames of a series are counted; along others, each index is a series
MAX_FRAMES = 10**6  # a file that claims more is damaged
# what packages say of a codec that is missing, and of files that are intact but which they can't read
NEEDS_CODECS = r"requires the '?imagecodecs|No module named '?imagecodecs"
UNSUPPORTED = (
    r"not (yet )?(supported|implemented|available|registered|a known)|unsupported|could not import|unknown codec"
)
ABORTED = "copy the file again, unless its acquisition was aborted"  # advice where images are missing
# names of the series of a whole-slide image that are not the image
AUXILIARY = ("label", "macro", "thumbnail", "overview", "map", "label image", "macro image")


class UnsupportedError(UserError):
    """An intact image is of a kind that is not read; the other series of its file may be."""


class Rows(Protocol):
    """An image (H, W, C), such as an array; `image[top:bottom]` reads only what these rows need."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and number of channels."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the pixels."""

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""


@dataclass(eq=False)
class LazyImage:
    """Image (H, W, C) whose rows are read by a function when they are requested."""

    shape: tuple[int, int, int]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]  # rows (h, W, C) between two indices, at least one
    is_missing: bool = False  # the file lacks it, and it is never read: an acquisition was aborted, or a file is absent
    _mmap: Any = None  # memory map of its file, by NumPy's name for it, so that cached pages can be dropped

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        top, bottom, step = rows.indices(self.shape[0])
        if self.is_missing:
            raise UserError(f"the file lacks this image: {ABORTED}")
        if top >= bottom:
            return np.empty((0, *self.shape[1:]), self.dtype)
        return self.read(top, bottom)[::step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All pixels."""
        return self[:].astype(dtype or self.dtype, copy=False)


def converted(image: Rows, convert: Callable[[np.ndarray], np.ndarray]) -> LazyImage:
    """Image whose stored pixels (h, W, C) are converted when they are read."""
    sample = convert(np.zeros((1, 1, image.shape[2]), image.dtype))
    shape = (*image.shape[:2], sample.shape[2])

    def read(top: int, bottom: int) -> np.ndarray:
        return convert(np.asarray(image[top:bottom]))

    is_missing = getattr(image, "is_missing", False)
    return LazyImage(shape, sample.dtype, read, is_missing, getattr(image, "_mmap", None))


@dataclass
class Series:
    """One image of a file, or one stack, such as a position of the stage, a scene or a data set."""

    name: str = ""  # in the file; may be empty
    axes: str = ""  # of its frames, slowest first, such as "TZ"; empty for one frame
    lengths: tuple[int, ...] = ()  # of these axes; their product is the number of frames
    geometry: Callable[[], Geometry] = Geometry  # reads axes, pixel size and names of the channels
    levels: int = 1  # number of resolutions; the first is read
    by_default: bool = True  # read unless others are chosen; not so the label and the thumbnail of a slide
    missing: tuple[int, ...] = ()  # indices of frames that the file lacks; left out of a choice of sections
    lacks: str = ""  # what to do about these
    problem: str = ""  # why it can't be read: it then has no frames, and is refused if it is chosen

    @property
    def num_frame(self) -> int:
        """Number of frames."""
        return 0 if self.problem else math.prod(self.lengths)


def _positions(axes: str, lengths: tuple[int, ...], apart: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Name, and indices of the frames, of each position along the axes `apart`.

    Examples
    --------
    >>> [(name, indices.tolist()) for name, indices in _positions("ZR", (2, 3), ["R"])]
    [('R0', [0, 3]), ('R1', [1, 4]), ('R2', [2, 5])]
    """
    indices = np.arange(math.prod(lengths)).reshape(lengths)
    sizes = dict(zip(axes, lengths, strict=True))
    for numbers in np.ndindex(*(sizes[axis] for axis in apart)):
        position = dict(zip(apart, numbers, strict=True))
        name = " ".join(f"{axis}{number}" for axis, number in position.items())
        yield name, indices[tuple(position.get(axis, slice(None)) for axis in axes)]


def _geometry_of_position(geometry: Callable[[], Geometry], axes: str, lengths: tuple[int, ...]) -> Geometry:
    """Geometry of one position of a series."""
    return replace(geometry(), axes=axes, lengths=lengths, labels=())


@dataclass
class Frames:
    """Frames of one file."""

    images: list[Rows] = field(default_factory=list)
    stacks: list[int] = field(default_factory=list)  # number of the Z stack of each frame; -1 if it is missing
    files: set[Path] = field(default_factory=set)  # that the frames are read from, if more than the one named
    series: list[Series] = field(default_factory=list)  # in the order of their frames
    kind: str = ""  # format as users see it
    named: bool = False  # outputs are named after the series, such as the wells of a plate
    ambiguous: str = ""  # why one of the series must be chosen; empty: all are read by default
    palette: np.ndarray | None = None  # colours (N, 3) uint8 of a TIFF whose pixels are their indices
    notes: list[str] = field(default_factory=list)  # what users should know of the file, though it is read

    def add(self, images: Sequence[Rows], series: Series) -> None:
        """Add the frames of a series, as new stacks; of positions, angles and the like each is a series of its own."""
        apart = [axis for axis in series.axes if axis not in STACKED]
        if apart and len(images) > 1:
            self.named = True
            axes = "".join(axis for axis in series.axes if axis in STACKED)
            for position, indices in _positions(series.axes, series.lengths, apart):
                name, lengths = f"{series.name} {position}".strip(), indices.shape
                geometry = partial(_geometry_of_position, series.geometry, axes, lengths)
                part = replace(series, name=name, axes=axes, lengths=lengths, geometry=geometry)
                self.add([images[index] for index in indices.ravel()], part)
            return
        first = max(self.stacks, default=-1) + 1
        is_missing = [getattr(image, "is_missing", False) for image in images]
        stacks = stack_numbers(series.axes, series.lengths) if images else []
        self.images += images
        self.stacks += [-1 if lost else first + stack for lost, stack in zip(is_missing, stacks, strict=True)]
        series.missing = tuple(np.flatnonzero(is_missing).tolist())
        self.series.append(series)

    def add_problem(self, path: Path, name: str, error: Exception, *, by_default: bool) -> None:
        """Add a series that can't be read for an error; one of memory is none of the file."""
        if is_out_of_memory(error):
            raise error
        reason = str(error).removeprefix(f"{path}: ") if isinstance(error, UserError) else ""
        problem = reason or f"can't be read ({one_line(error)}): check the file, or choose another series"
        self.series.append(Series(name, by_default=by_default, problem=problem))

    def notes_of(self, choice_of_series: str) -> list[str]:
        """Notes, also of what is left out: series that can't be read, unless others were chosen, and missing images."""
        notes = list(self.notes)
        for number, series in enumerate(self.series):
            if series.by_default and series.problem and not choice_of_series:
                notes.append(f"series {series.name or number} is left out: {series.problem}")
        for series in self.series:
            if series.missing:
                notes.append(f"{len(series.missing)} of {series.num_frame} images are missing and left out")
        return notes

    @cached_property
    def ends(self) -> list[int]:
        """Index after the last frame of each series; used once all are added."""
        return list(accumulate(series.num_frame for series in self.series))

    def first_frame(self, number: int) -> int:
        """Index of the first frame of a series."""
        return self.ends[number] - self.series[number].num_frame

    def series_of(self, index: int) -> int:
        """Number of the series of a frame."""
        return bisect_right(self.ends, index)

    def series_name(self, path: Path, number: int) -> str:
        """Name of a series of a file in messages; of an only one without a name that of the file."""
        name = self.series[number].name
        if len(self.series) == 1 and not name.startswith("/"):
            return str(path)
        return full_name(path, name or f"series {number}")


def full_name(path: Path | str, series: str) -> str:
    """Name of a series of a file in messages: of a data set of HDF5 as users write it."""
    return f"{path}:{series}" if series.startswith("/") else f"{path}, {series}"


def listed(names: Sequence[object], most: int = 20) -> str:
    """Names for a message, of many the first ones."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def check_count(path: Path, lengths: tuple[int, ...]) -> None:
    """Refuse a file that claims too many frames, before an object is made for each."""
    if math.prod(lengths) > MAX_FRAMES:
        raise UserError(f"{path}: claims {math.prod(lengths)} images, at most {MAX_FRAMES} are read: check the file")


@contextmanager
def reraise_as_user_error(what: str, advice: str) -> Iterator[None]:
    """Turn any exception of a library that reads a damaged file into one line; `what` is `FILE: DEFECT`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        name, text = what.partition(": ")[0], one_line(error)
        if is_out_of_memory(error):
            raise UserError(f"{name}: does not fit in memory: close other programs") from error
        if re.search(NEEDS_CODECS, str(error)):
            raise UserError(f"{name}: {text}: pip install imagecodecs") from error
        if isinstance(error, NotImplementedError | ImportError) or re.search(UNSUPPORTED, str(error), re.IGNORECASE):
            what, advice = f"{name}: of a kind that is not read", "save it as an uncompressed TIFF"
        raise UserError(f"{what} ({text}): {advice}") from error


def one_line(error: Exception) -> str:
    """Message of a library on one line, without NumPy's advice to trust the file (`allow_pickle`)."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    text = " ".join(text.split("allow_pickle")[0].split())
    if len(text) > 300:
        return f"{text[:300]}..."
    return text or type(error).__name__


def to_native(pixels: np.ndarray) -> np.ndarray:
    """Pixels in this machine's byte order and in a type by its usual name; one bit becomes 0 and 255."""
    if pixels.dtype == bool:
        return pixels * np.uint8(255)
    # `str` is "<u8" for uint64 and for np.ulonglong, which torch refuses
    return pixels.astype(np.dtype(pixels.dtype.newbyteorder("=").str), copy=False)


def split(pixels: np.ndarray, axes: str, path: Path) -> list[np.ndarray]:
    """Cut an array with named axes into views (H, W, C); S and C are channels, other axes but Y and X are frames."""
    channels = [axis for axis in axes if axis in "SC"]
    if len(channels) > 1 or "Y" not in axes or "X" not in axes:
        raise UnsupportedError(f"{path}: unsupported axes {axes}: save pages of Y, X and at most one channel axis")
    order = [axes.index(axis) for axis in ("Y", "X", *channels)]
    others = [i for i in range(len(axes)) if i not in order]
    pixels = pixels.transpose(others + order)
    if not channels:
        pixels = pixels[..., None]
    return [pixels[index] for index in np.ndindex(pixels.shape[:-3])]


def stack_numbers(axes: str, lengths: tuple[int, ...]) -> list[int]:
    """Number of the Z stack of each frame: frames along Z share one, frames along other axes do not.

    An axis of unknown meaning (`Q` and `I` of tifffile) counts as Z if there is no Z.

    Examples
    --------
    >>> stack_numbers("TZ", (2, 3)), stack_numbers("ZT", (3, 2)), stack_numbers("T", (3,)), stack_numbers("I", (3,))
    ([0, 0, 0, 3, 3, 3], [0, 1, 0, 1, 0, 1], [0, 1, 2], [0, 0, 0])
    """
    numbers = np.arange(math.prod(lengths)).reshape(lengths)
    along = max(axes.rfind(axis) for axis in ("Z" if "Z" in axes else "QI"))
    first = numbers if along < 0 else numbers.take([0], along)
    return np.broadcast_to(first, lengths).ravel().tolist()
