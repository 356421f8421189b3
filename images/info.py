"""What files hold, and how they are read: `run_make_database.py --info`."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from images.memory import HARMLESS
from images.profile import profile_of
from images.readers import Source, frames_of_file, list_files, read_file
from images.rows import Frames, Rows, Series
from images.selection import Choice
from utils import UserError, echo

MAX_SERIES = 50  # printed of a file


def show_info(source: Source, choice: Choice) -> None:
    """Print what files hold, and how they are read with a choice of channels, series and sections.

    A file that can't be read, or is damaged at its end, is an error after the others are printed.
    """
    errors: list[UserError] = []
    for file, inner in list_files(source):
        try:
            for line in _lines(file, inner, choice):
                echo(line)
        except UserError as error:
            errors.append(error)
    for other in errors[:-1]:
        echo(f"error: {other}", sys.stderr)
    if errors:
        raise errors[-1]


def _lines(path: Path, inner: str, choice: Choice) -> Iterator[str]:
    """Lines about one file, or about the data set `inner` in it if that is not empty."""
    content = read_file(path)
    num = len(content.series)
    yield f"{path}: {content.kind}, {num} series" if num > 1 else f"{path}: {content.kind}"
    for note in content.notes:
        yield f"  note: {note}"
    for number, series in enumerate(content.series[:MAX_SERIES]):
        yield from _series_lines(content, number, series)
    if num > MAX_SERIES:
        yield f"  ... and {num - MAX_SERIES} more series"
    if choice == Choice() and content.ambiguous and not inner:
        yield f"  to be read, one must be chosen: {content.ambiguous.partition(': ')[2]}"
        return
    frames = frames_of_file(path, inner, choice)
    images = [frame.open() for frame in frames]
    kinds = Counter((*image.shape, image.dtype.name) for image in images)
    texts = [f"{num} image(s) of {h} x {w} px, {c} channel(s) of {dtype}" for (h, w, c, dtype), num in kinds.items()]
    more = f"; and {len(texts) - 5} more kinds" if len(texts) > 5 else ""
    yield f"  read as {'; '.join(texts[:5])}{more}{_check_end(images[-1])}"
    if len({image.shape[2] for image in images}) == 1 and all(map(_is_small, images)):
        profile = profile_of(frames)
        ranges = [f"{low:.4g} to {high:.4g}" for low, high in zip(profile.low, profile.high, strict=True)]
        grey = "; the colours are grey everywhere" if profile.is_grey else ""
        grey += "; they are the indices of a palette of colours" if profile.is_indexed else ""
        yield f"  grey values in use, of each channel: {'; '.join(ranges)}{grey}"


def _series_lines(content: Frames, number: int, series: Series) -> Iterator[str]:
    name = f' "{series.name}"' if series.name else ""
    if series.problem:
        yield f"  series {number}{name}: {series.problem}"
        return
    geometry, image = series.geometry(), content.images[content.first_frame(number)]
    height, width, channels = image.shape
    lengths = {**dict(zip(series.axes, series.lengths, strict=True)), "C": channels, "Y": height, "X": width}
    axes = ", ".join(f"{axis} {length}" for axis, length in lengths.items())
    levels = f", {series.levels} levels, the first is read" if series.levels > 1 else ""
    left_out = "" if series.by_default else ", left out unless it is chosen"
    yield f"  series {number}{name}: {axes}, {image.dtype.name}{levels}{left_out}"
    if len(geometry.channels) == channels and any(geometry.channels):
        names = ", ".join(f"{number} {name}" for number, name in enumerate(geometry.channels))
        yield f"    channels: {names}"
    sizes = [f"{axis} {geometry.pixel[axis]:.6g}" for axis in "XYZ" if axis in geometry.pixel]
    size = f"{', '.join(sizes)} micron" if sizes else ""
    size += f"{', else ' if sizes else ''}unknown ({geometry.unknown})" if geometry.unknown else ""
    interval = f", {geometry.interval:.6g} s between two times" if geometry.interval else ""
    yield f"    pixel size: {size}{interval}"


def _check_end(image: Rows) -> str:
    """Read the last row, where a truncated file is damaged; of a large image return the message that it was not."""
    if not _is_small(image):
        return f"; not checked for damage, since an image has over {HARMLESS // 2**20} MiB"
    image[image.shape[0] - 1 : image.shape[0]]
    return ""


def _is_small(image: Rows) -> bool:
    """Whether an image may be decoded as a whole, as pictures must be."""
    return math.prod(image.shape) * image.dtype.itemsize <= HARMLESS
