"""Notes on files that are read all the same: one line for each kind, however many files it is of."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import echo

_printed: set[tuple[Path | None, str]] = set()  # file, or None for any, and note
_hearing = threading.RLock()  # Python's filters of warnings are those of all threads


def say_notes(notes: Iterable[tuple[Path, str]]) -> None:
    """Print each note with the first of its files and the number of the others; none twice of a file."""
    files: dict[str, list[Path]] = {}
    for path, note in notes:
        if (path.absolute(), note) not in _printed:
            _printed.add((path.absolute(), note))
            files.setdefault(note, []).append(path)
    for note, paths in files.items():
        others = f" and {len(paths) - 1} more file(s)" if len(paths) > 1 else ""
        _print(f"note: {paths[0]}{others}: {note}")


def say_once(path: Path, note: str) -> None:
    """Print a note on pixels that are being read; not again for other files."""
    if not {(None, note), (path.absolute(), note)} & _printed:
        _printed.add((None, note))
        _print(f"note: {path}: {note} (said of the first such file alone)")


def _print(line: str) -> None:
    """Print a line in the first process of several."""
    if os.environ.get("RANK", "0") == "0":
        echo(line)


@contextmanager
def captured_warnings() -> Iterator[list[str]]:
    """Warnings of Python's packages meanwhile, each on one line and once; none is printed."""
    texts: list[str] = []
    with _hearing, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield texts
        finally:
            texts += dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught)
