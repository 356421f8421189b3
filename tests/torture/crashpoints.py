"""SIGKILL, or a full disk, at each single file operation of each program."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from .cases import Case, Fault, Part, Start, check_end
from .processes import Ended, run
from .targets import Reference, Training, measure

NAMES = ("database", "add", "test", "tif", "npy", "zarr", "pyramid", "png", "objects")
EPOCHS = 2
FAILURES = ("kill", "full")
OPERATIONS = ("rename", "replace", "unlink", "mkdir", "rmdir", "truncate", "ftruncate", "link", "symlink", "fsync")
REMOVING = ("unlink", "rmdir")
WRITING = set("wax+")  # letters in the mode of a file that is opened for writing


def cases(start: Start) -> list[Case]:
    """One case for each operation of each program, killed and failed."""
    root = start.folder.with_name("crash-reference")
    training = Training.unbroken(start, root / "training", EPOCHS)
    made = []
    num = _count("main", training.argv, partial(start.copy, root / "count", "datasets"), root / "count")
    for failure in FAILURES:
        made += [Case(f"training {failure}", partial(cut_training, start, training, failure, n)) for n in range(num)]
    for name in NAMES:
        reference = measure(name, start, root)
        folder, target = root / f"count-{name}", reference.target
        num = _count(target.program, target.argv, partial(reference.copy, folder), folder)
        for failure in FAILURES:
            made += [Case(f"{name} {failure}", partial(cut_target, reference, failure, n)) for n in range(num)]
    return made


def _count(program: str, argv: list[str], prepare: Callable[[], None], folder: Path) -> int:
    """Number of file operations of a program."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare()
    note = folder.with_name(f"{folder.name}.operations")
    run(program, argv, folder, Tripwire(folder, -1, "kill", note).install)
    return len(note.read_text())


def cut_training(
    start: Start, training: Training, failure: str, number: int, folder: Path, _rng: Random
) -> list[Fault]:
    """Cut a training off at one operation, and resume it."""
    start.copy(folder, "datasets")
    ended = run("main", training.argv, folder, Tripwire(folder, number, failure).install)
    faults = _check_failure(ended, failure) + training.check_cut(folder)
    if ended.status:
        ended = run("main", training.next_argv(folder), folder)
        faults += check_end(ended)
    return faults + training.check_done(folder, ended)


def cut_target(reference: Reference, failure: str, number: int, folder: Path, _rng: Random) -> list[Fault]:
    """Cut a program off at one operation, look at what is left, and run it again."""
    reference.copy(folder)
    ended = run(reference.target.program, reference.target.argv, folder, Tripwire(folder, number, failure).install)
    return _check_failure(ended, failure) + reference.check_cut(folder) + reference.check_again(folder)


def _check_failure(ended: Ended, failure: str) -> list[Fault]:
    """Faults in how a program ended: killed, or with one line about the disk, or well where it could do without."""
    return check_end(ended, (0, 1) if failure == "full" else (0, -signal.SIGKILL))


@dataclass
class Tripwire:
    """Counts the file operations in a folder, and cuts the process off before one of them.

    Attributes
    ----------
    number : int
        Of the operation, from 0; -1 for none.
    failure : {"kill", "full"}
        SIGKILL, or the error of a full disk.
    note : Path, optional
        Gets a byte for each operation.
    """

    folder: Path
    number: int
    failure: str
    note: Path | None = None

    def install(self) -> None:
        """Put it before the functions of `os` and `open` in this process."""
        self.count, self.lock = 0, threading.Lock()
        for name in OPERATIONS:
            setattr(os, name, self._guarded(getattr(os, name), lambda *_: True))
        os.open = self._guarded(os.open, _opens_for_writing)
        builtins.open = io.open = self._guarded(io.open, _opens_in_mode)

    def _guarded(self, function: Callable, concerns: Callable[..., bool]) -> Callable:
        def guarded(path: Any, *args: Any, **kwargs: Any) -> Any:
            if concerns(*args, *kwargs.values()) and self._lies_inside(path, kwargs.get("dir_fd")):
                self._pass(path, function.__name__ in REMOVING)
            return function(path, *args, **kwargs)

        return guarded

    def _pass(self, path: Any, removes: bool) -> None:
        """Count an operation, or end here; on a full disk what removes something succeeds."""
        with self.lock:
            mine, self.count = self.count == self.number, self.count + 1
            if self.note:
                descriptor = OPEN(self.note, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.write(descriptor, b".")
                os.close(descriptor)
        if mine and self.failure == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if mine and not removes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), None if isinstance(path, int) else os.fspath(path))

    def _lies_inside(self, path: Any, folder: int | None) -> bool:
        """Whether a path or descriptor is of the folder."""
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        elif folder is not None:
            path = Path(f"/proc/self/fd/{folder}").readlink() / os.fspath(path)
        return Path(os.path.abspath(os.fsdecode(path))).is_relative_to(self.folder)  # noqa: PTH100


OPEN = os.open  # before any tripwire


def _opens_for_writing(flags: int, *_: Any) -> bool:
    """Whether these flags of `os.open` change something."""
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _opens_in_mode(*arguments: Any) -> bool:
    """Whether `open` is called for writing; the mode is its first argument that is a text."""
    mode = next((argument for argument in arguments if isinstance(argument, str)), "r")
    return bool(WRITING & set(mode))


PART = Part("crashpoints", cases, quick=32)
