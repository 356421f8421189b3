"""Which channels, series and sections of a file are read: `--channel`, `--series` and `--section`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from images.rows import Frames, Series, listed
from utils import FlagError, UserError, name_hint

RANGE = r"(-?[0-9]{0,18})(?:(-|:)([0-9]{0,18})(?::([1-9][0-9]{0,17}))?)?"


@dataclass(frozen=True)
class Choice:
    """What to read of each file; empty texts choose all, of what is read by default.

    Numbers are counted from 0, and comma-separated: `3`, `0,2,5`, `0-9` (with 9), `0:10` (without 10), `5:`, `::2`.

    Attributes
    ----------
    channel : str
        Numbers or names of channels, in the order in which they become the channels of an image.
    series : str
        Numbers or names of series.
    section : str
        Numbers of sections along Z; without Z of the frames in their order.

    Raises
    ------
    FlagError
        The text of `section` is not a list of numbers and ranges.
    """

    channel: str = ""
    series: str = ""
    section: str = ""

    def __post_init__(self) -> None:
        wrong = [part for part in self.section.split(",") if self.section and not _is_range(part)]
        if wrong:
            raise FlagError(f"--section {self.section}: {wrong[0]!r} is no number or range such as 3, 0-9 or 0:10")

    @property
    def takes_all_frames(self) -> bool:
        """Whether it leaves out no frame."""
        return not self.series and not self.section

    def series_numbers(self, path: Path, found: Frames) -> list[int]:
        """Numbers of the series to read, in the order of the file."""
        if not self.series and found.ambiguous:
            raise UserError(found.ambiguous)
        if not self.series:
            return [number for number, series in enumerate(found.series) if series.by_default and not series.problem]
        numbers = sorted(set(_numbers(path, "series", self.series, [series.name for series in found.series])))
        for number in numbers:
            if found.series[number].problem:
                raise UserError(f"{found.series_name(path, number)}: {found.series[number].problem}")
        return numbers

    def frames(self, path: Path, found: Frames) -> list[int]:
        """Indices of the frames to read, in the order of the file."""
        chosen: list[int] = []
        for number in self.series_numbers(path, found):
            name, first = found.series_name(path, number), found.first_frame(number)
            chosen += [first + index for index in self._of_series(name, found.series[number])]
        return chosen

    def _of_series(self, name: str, series: Series) -> list[int]:
        """Indices of frames in a series."""
        if not self.section and not series.missing:
            return list(range(series.num_frame))
        sections = np.arange(series.num_frame)
        if "Z" in series.axes:
            sections = np.indices(series.lengths)[series.axes.index("Z")].ravel()
        there = np.setdiff1d(np.arange(series.num_frame), series.missing)
        if not self.section:
            raise _incomplete(name, series, sections[there])
        numbers = _numbers(name, "section", self.section, [""] * (int(sections.max()) + 1))
        chosen = there[np.isin(sections[there], numbers)].tolist()
        if not chosen:
            raise _incomplete(name, series, sections[there])
        return chosen

    def channels(self, path: Path, found: Frames, index: int) -> tuple[int, ...]:
        """Channels of a frame to read; empty: all."""
        if not self.channel:
            return ()
        num, number = found.images[index].shape[2], found.series_of(index)
        names: Sequence[str] = [""] * num
        if not all(_range(part.strip(), num) for part in self.channel.split(",")):  # names need the metadata
            named = found.series[number].geometry().channels
            names = named if len(named) == num else names
        return tuple(_numbers(found.series_name(path, number), "channel", self.channel, names))


def _incomplete(name: str, series: Series, sections: np.ndarray) -> UserError:
    """Refusal of a series of which frames are missing; `sections` are those of which there are any."""
    there, advice = sorted({*sections.tolist()}), series.lacks
    if there:
        is_run = len(there) == there[-1] - there[0] + 1 > 1
        advice += (
            f", or read what is there by --section {f'{there[0]}-{there[-1]}' if is_run else ','.join(map(str, there))}"
        )
    return UserError(f"{name}: {len(series.missing)} of {series.num_frame} images are missing: {advice}")


def _is_range(text: str) -> bool:
    """Whether a text is a number or a range.

    Examples
    --------
    >>> [_is_range(text) for text in ("3", "0-9", "0:10", "::2", "-1", "", "-", "a", "1-", "9-1")]
    [True, True, True, True, True, False, False, False, False, True]
    """
    found = re.fullmatch(RANGE, text.strip())
    if not found:
        return False
    first, mark, last, _ = found.groups()
    return mark == ":" or bool(first.strip("-") and (mark is None or last))


def _numbers(where: Path | str, what: str, text: str, names: Sequence[str]) -> list[int]:
    """Numbers that a comma-separated text of numbers, ranges and names chooses from all; each once."""
    chosen: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        found = _range(part, len(names))
        if not found:
            found = [number for number, name in enumerate(names) if name == part != ""]
        if not found:
            found = [number for number, name in enumerate(names) if name.lower() == part.lower() != ""]
        if not found:
            advice = f"{_what_there_is(what, names)}: {name_hint(part, names)}choose from these by --{what}"
            raise UserError(f"{where}: no {what} {part}: {advice}")
        chosen += found
    return list(dict.fromkeys(chosen))


def _range(text: str, count: int) -> range | list[int]:
    """Numbers of a text, all below a count; empty if it is another text, or one of them does not exist."""
    if not _is_range(text):
        return []
    first, mark, last, step = re.fullmatch(RANGE, text).groups()  # type: ignore[union-attr]
    low = int(first or 0)
    if mark is None:
        numbers = range(low, low + 1)
    else:
        high = int(last) + (mark == "-") if last else count
        numbers = range(low, high, int(step or 1))
    return numbers if len(numbers) and low >= 0 and numbers[-1] < count else []


def _what_there_is(what: str, names: Sequence[str]) -> str:
    """All numbers and names, for a message.

    Examples
    --------
    >>> _what_there_is("channel", ["DAPI", "GFP"]), _what_there_is("section", [""] * 30)
    ('it has 2, 0 (DAPI), 1 (GFP)', 'it has 30, 0 to 29')
    """
    if len(names) == 1 and not names[0]:
        return f"it has one {what}, 0"
    if not any(names):
        return f"it has {len(names)}, 0 to {len(names) - 1}"
    shown = [f"{number} ({name})" if name else str(number) for number, name in enumerate(names)]
    return f"it has {len(names)}, {listed(shown)}"
