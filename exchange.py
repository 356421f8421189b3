"""Folders whose entries are replaced together: all old ones or all new ones, also after a power cut."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from files import cannot_write, discard, explain_write_errors, flush_folders, is_own_folder, publish
from locks import locked, signature
from utils import MOST_NAMED, UserError, echo, printable

# An exchange in four steps, each of them on the disk before the next one begins:
#   1. the new entries and a note are written into PARTIAL
#   2. PARTIAL is renamed to NEW: from here on, whoever reads the folder completes the exchange
#   3. the old entries move to NEW/REPLACED, and then the new ones to where they were
#   4. NEW is renamed to PARTIAL: the exchange has ended, and PARTIAL is removed
PARTIAL, NEW, REPLACED = ".partial", ".new", ".replaced"
PROVIDED = ".provided"  # the note: names of the entries, and which of them have a new one


@contextmanager
def atomic_folder(parent: str | os.PathLike, names: Mapping[str, str], advice: str) -> Iterator[Path]:
    """Fill a temporary folder whose entries replace those of `parent` together, at the end; an error leaves the old."""
    # `names` maps the files and folders that are written there to a regular expression: of the names in an old folder
    # that are the program's. Others are the user's, and stay. Old entries go even if no new one was written.
    parent = Path(parent)
    partial, exchange = parent / PARTIAL, Exchange(parent, names)
    with locked(parent, advice):
        finish_exchange(parent, names)
        try:
            discard(partial)
            partial.mkdir()
            yield partial
            exchange.provided = [name for name in names if (partial / name).exists()]
            note = {"names": dict(names), "provided": exchange.provided, "by": signature()}
            (partial / PROVIDED).write_text(json.dumps(note), "utf-8")
            exchange.run()
        except OSError as error:
            if error.filename and not Path(error.filename).absolute().is_relative_to(parent.absolute()):
                raise  # an error of the caller, outside this folder
            raise cannot_write(parent, error) from error
        finally:
            discard(partial)
    exchange.note_foreign()


@contextmanager
def reading(folder: Path, names: Mapping[str, str], advice: str) -> Iterator[None]:
    """Keep other processes from replacing the entries of an `atomic_folder`, after completing a cut off exchange."""
    while True:
        finish_exchange(folder, names)
        with locked(folder, advice, shared=True):
            if not is_own_folder(folder / NEW):  # else a writer was killed between the two lines above
                yield
                return


def finish_exchange(parent: Path, names: Mapping[str, str]) -> None:
    """Complete an exchange that a killed process began, and print a note; call it before the entries are read."""
    new = parent / NEW
    if not is_own_folder(new):
        return
    if not os.access(parent, os.W_OK):
        what = f"{parent}: the exchange of its files was cut off, and this account can't complete it"
        raise UserError(f"{what}: any program that reads the folder does, for an account that may write there")
    with locked(parent, "run this again later"), explain_write_errors(parent):
        if not (new / PROVIDED).is_file():  # only its removal is left to do, or another process has completed it
            discard(new)
            return
        exchange, begun_by = _read_note(new / PROVIDED, parent, names)
        exchange.complete()
        discard(parent / PARTIAL)
        echo(f"note: {parent}: the exchange of its files was cut off, and is complete now; begun by {begun_by}")
        exchange.note_foreign()


def _read_note(note: Path, parent: Path, names: Mapping[str, str]) -> tuple[Exchange, str]:
    """The exchange that a note describes, which may be of other entries than the caller's, and who began it."""
    try:
        noted = json.loads(note.read_text("utf-8"))
        patterns, provided = noted["names"], noted["provided"]
        if isinstance(patterns, list):  # of an earlier version, which removed all that it replaced
            patterns = {name: names.get(name, ".*") for name in patterns}
        for pattern in patterns.values():
            re.compile(pattern)
        if all(Path(name).name == name for name in (*patterns, *provided)):
            return Exchange(parent, patterns, list(provided)), printable(str(noted.get("by", "an earlier version")))
    except (ValueError, KeyError, TypeError, AttributeError, re.error):
        pass
    raise UserError(f"{note} is damaged: remove {note.parent}, and run again what writes {note.parent.parent}")


@dataclass
class Exchange:
    """Exchange of the entries of a folder for those in its `NEW`."""

    parent: Path
    names: Mapping[str, str]  # as for `atomic_folder`
    provided: list[str] = field(default_factory=list)  # names for which there is a new entry
    foreign: list[str] = field(default_factory=list)  # the user's entries, which were moved to the new folders

    def run(self) -> None:
        """Make `PARTIAL` the folder of new entries, and complete the exchange, or undo it if that fails."""
        try:
            publish(self.parent / PARTIAL, self.parent / NEW)
            self.complete()
        except BaseException as error:
            if not (self.parent / NEW).exists():
                raise  # it has not begun, or is complete
            try:
                self._undo()
            except OSError as second:
                reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
                what = f"{self.parent}: the exchange of its files failed ({reason}), nor could it be undone ({second})"
                raise UserError(
                    f"{what}: the next command that uses this folder, whoever runs it, completes it"
                ) from error
            raise

    def complete(self) -> None:
        """Put the new entries in place of the old ones; can be repeated after an interruption at any point."""
        (self.parent / NEW / REPLACED).mkdir(exist_ok=True)
        for name in self.names:
            path, new, old = self._paths(name)
            to_replace = os.path.lexists(new) or name not in self.provided
            if to_replace and os.path.lexists(path) and not os.path.lexists(old):
                path.rename(old)
        self._flush()  # or after a power cut a new entry could stand where the old one was not moved away
        for name in self.names:
            path, new, old = self._paths(name)
            if os.path.lexists(new):
                new.rename(path)
            self.foreign += self._carry(name, old, path)
        self._flush()
        self._end()

    def _undo(self) -> None:
        """Put the old entries back, all of which are in `REPLACED` or where they were."""
        for name in self.names:
            path, new, old = self._paths(name)
            is_new = name in self.provided and not os.path.lexists(new)
            if is_new and os.path.lexists(path):
                self._carry(name, path, old)
                path.rename(new)
            elif os.path.lexists(old) and os.path.lexists(path):  # what is not the program's, alone
                self._carry(name, path, old)
                path.rmdir()
            if os.path.lexists(old):
                old.rename(path)
        self._flush()
        self._end()

    def _paths(self, name: str) -> tuple[Path, Path, Path]:
        """Where an entry is read, where the new one is before the exchange, and where the old one is after it."""
        return self.parent / name, self.parent / NEW / name, self.parent / NEW / REPLACED / name

    def _carry(self, name: str, source: Path, target: Path) -> list[str]:
        """Move what is not the program's from one folder to another, which is created if missing; return the names."""
        if not is_own_folder(source):
            return []
        foreign = [entry.name for entry in os.scandir(source) if not re.fullmatch(self.names[name], entry.name)]
        if foreign:
            target.mkdir(exist_ok=True)
            for entry in foreign:
                (source / entry).rename(target / entry)
            flush_folders(source, target)
        return [f"{name}/{entry}" for entry in sorted(foreign) if not entry.startswith(".")]

    def _flush(self) -> None:
        """Have all renames on the disk."""
        folders = (self.parent, self.parent / NEW, self.parent / NEW / REPLACED)
        flush_folders(*(folder for folder in folders if folder.exists()))

    def _end(self) -> None:
        """Say by one rename that the exchange has ended, and only what is left over is to be removed."""
        discard(self.parent / PARTIAL)
        (self.parent / NEW).rename(self.parent / PARTIAL)
        flush_folders(self.parent)

    def note_foreign(self) -> None:
        """Print what was carried over, if anything was."""
        if self.foreign:
            names = ", ".join(self.foreign[:MOST_NAMED]) + (", ..." if len(self.foreign) > MOST_NAMED else "")
            echo(f"note: {self.parent}: kept what this program did not write: {names}")
