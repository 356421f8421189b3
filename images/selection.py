"""Which channels, series and sections of a file are read: `--channel`, `--series` and `--section`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from images.rows import Frames, Series, listed
from utils import FlagError, UserError, name_hint

RANGE = r"(?P<first>-?[0-9]{1,18})?(?:(?P<mark>-|:)(?P<last>[0-9]{0,18})(?::(?P<step>[1-9][0-9]{0,17}))?)?"


@dataclass(frozen=True)
class Choice:
    """What to read of each file; empty texts choose all that is read by default.

    Numbers are counted from 0, and comma-separated: `3`, `0,2,5`, `0-9` (with 9), `0:10` (without 10), `5:`, `::2`.
    """

    channel: str = ""  # numbers or names of channels, in the order in which they become the channels of an image
    series: str = ""  # numbers or names of series
    section: str = ""  # numbers of sections along Z; without Z of the frames in their order

    def __post_init__(self) -> None:
        wrong = [part for part in self.section.split(",") if self.section and not _match_range(part)]
        if wrong:
            raise FlagError(f"--section {self.section}: {wrong[0]!r} is no number or range such as 3, 0-9 or 0:10")

    @property
    def takes_all_frames(self) -> bool:
        """Whether it leaves out no frame."""
        return not self.series and not self.section

    def series_numbers(self, path: Path, content: Frames) -> list[int]:
        """Numbers of the series to read, in the order of the file."""
        if not self.series and content.ambiguous:
            raise UserError(content.ambiguous)
        if not self.series:
            return [number for number, series in enumerate(content.series) if series.by_default and not series.problem]
        numbers = sorted(set(_numbers(path, "series", self.series, [series.name for series in content.series])))
        for number in numbers:
            if content.series[number].problem:
                raise UserError(f"{content.series_name(path, number)}: {content.series[number].problem}")
        return numbers

    def frames(self, path: Path, content: Frames) -> list[int]:
        """Indices of the frames to read, in the order of the file."""
        indices: list[int] = []
        for number in self.series_numbers(path, content):
            name, first = content.series_name(path, number), content.first_frame(number)
            indices += [first + index for index in self._of_series(name, content.series[number])]
        return indices

    def _of_series(self, name: str, series: Series) -> list[int]:
        """Indices of frames in a series; of one that lacks frames only if sections are chosen that it has."""
        if not self.section and not series.missing:
            return list(range(series.num_frame))
        sections = np.arange(series.num_frame)
        if "Z" in series.axes:
            sections = np.indices(series.lengths)[series.axes.index("Z")].ravel()
        present = np.setdiff1d(np.arange(series.num_frame), series.missing)
        if self.section:
            numbers = _numbers(name, "section", self.section, [""] * (int(sections.max()) + 1))
            if indices := present[np.isin(sections[present], numbers)].tolist():
                return indices
        numbers, advice = sorted({*sections[present].tolist()}), series.lacks
        if numbers:
            is_run = len(numbers) == numbers[-1] - numbers[0] + 1 > 1
            text = f"{numbers[0]}-{numbers[-1]}" if is_run else ",".join(map(str, numbers))
            advice += f", or read what is there by --section {text}"
        raise UserError(f"{name}: {len(series.missing)} of {series.num_frame} images are missing: {advice}")

    def channels(self, path: Path, content: Frames, index: int) -> tuple[int, ...]:
        """Channels of a frame to read; empty: all."""
        if not self.channel:
            return ()
        num, number = content.images[index].shape[2], content.series_of(index)
        names: Sequence[str] = [""] * num
        if not all(_range(part, num) for part in self.channel.split(",")):  # names need the metadata
            named = content.series[number].geometry().channels
            names = named if len(named) == num else names
        return tuple(_numbers(content.series_name(path, number), "channel", self.channel, names))


def _match_range(text: str) -> re.Match | None:
    """Parts of a number or a range; None if a text is neither.

    >>> [bool(_match_range(text)) for text in ("3", "0-9", "0:10", "::2", "-1", "", "-", "a", "1-", "9-1", "-:5")]
    [True, True, True, True, True, False, False, False, False, True, False]
    """
    match = re.fullmatch(RANGE, text.strip())
    if match and (match["mark"] == ":" or (match["first"] and (not match["mark"] or match["last"]))):
        return match
    return None


def _range(text: str, count: int) -> range | list[int]:
    """Numbers of a text, all below a count; empty if it is another text, or one of them does not exist."""
    match = _match_range(text)
    if not match:
        return []
    low = int(match["first"] or 0)
    if match["mark"] is None:
        numbers = range(low, low + 1)
    else:
        high = int(match["last"]) + (match["mark"] == "-") if match["last"] else count
        numbers = range(low, high, int(match["step"] or 1))
    return numbers if len(numbers) and low >= 0 and numbers[-1] < count else []


def _numbers(where: Path | str, what: str, text: str, names: Sequence[str]) -> list[int]:
    """Numbers that a comma-separated text of numbers, ranges and names chooses from all; each once."""
    chosen: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        numbers = (
            _range(part, len(names))
            or [number for number, name in enumerate(names) if name and name == part]
            or [number for number, name in enumerate(names) if name and name.lower() == part.lower()]
        )
        if not numbers:
            advice = f"{_what_there_is(what, names)}: {name_hint(part, names)}choose from these by --{what}"
            raise UserError(f"{where}: no {what} {part}: {advice}")
        chosen += numbers
    return list(dict.fromkeys(chosen))


def _what_there_is(what: str, names: Sequence[str]) -> str:
    """All numbers and names, for a message.

    >>> _what_there_is("channel", ["DAPI", "GFP"]), _what_there_is("section", [""] * 30)
    ('it has 2, 0 (DAPI), 1 (GFP)', 'it has 30, 0 to 29')
    """
    if len(names) == 1 and not names[0]:
        return f"it has one {what}, 0"
    if not any(names):
        return f"it has {len(names)}, 0 to {len(names) - 1}"
    entries = [f"{number} ({name})" if name else str(number) for number, name in enumerate(names)]
    return f"it has {len(names)}, {listed(entries)}"
