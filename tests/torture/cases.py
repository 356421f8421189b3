"""What a part of the suite is made of: cases, the faults that they find, and the folder that all begin with."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from .processes import Ended, run

KINDS = ("lost", "mixed", "traceback", "hang", "over memory", "message")  # columns of the table
GB = 2**30
MEMORY = 2 * GB  # [bytes] no program on tiny data may need more

# a network and data that train in milliseconds
SMALL = ["--gpu_ids", "-1", "--nch_ker", "2", "--ny_load", "64", "--nx_load", "64", "--num_freq_score", "3"]
TRAIN = ["--mode", "train", *SMALL, "--num_freq_save", "1"]
TEST = ["--mode", "test", "--gpu_ids", "-1"]
PREDICT = ["--mode", "predict", "--gpu_ids", "-1", "--tta", "off"]
EPOCHS = 3  # of the checkpoints that each case begins with


@dataclass(frozen=True)
class Fault:
    """One thing that went wrong; `kind` is a column of the table."""

    kind: str
    text: str


@dataclass(frozen=True)
class Case:
    """One trial. `run` gets an empty folder and the case's own random numbers."""

    name: str
    run: Callable[[Path, Random], list[Fault]]
    limit: float = 180.0  # [s] for all of it; the programs in it have limits of their own


@dataclass(frozen=True)
class Part:
    """One row of the table.

    Attributes
    ----------
    cases : callable
        Makes the list of all cases, given the `Start`.
    quick : int
        How many of them `--quick` tries.
    without : callable
        What can't be tried here and why; empty if all can.
    """

    name: str
    cases: Callable[[Start], Sequence[Case]]
    quick: int
    without: Callable[[], str] = str


class Start:
    """Folder with a database, a short training, its log and its test results, which cases copy from.

    Parameters
    ----------
    folder : Path
        Filled once; programs run with their case's folder as the current one, so that the default folders lie in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.must("run_make_database", ["--synthetic", "8", "--size", "64"])
        self.must("main", [*TRAIN, "--num_epoch", str(EPOCHS)])
        self.must("main", [*TEST, "--tta", "off"])

    def must(self, program: str, argv: list[str], folder: Path | None = None) -> Ended:
        """Run a program that has to succeed."""
        ended = run(program, argv, folder or self.folder)
        if ended.status != 0:
            raise RuntimeError(f"{program} {' '.join(argv)} ended with status {ended.status}: {ended.err[-2000:]}")
        return ended

    def copy(self, folder: Path, *parts: str) -> None:
        """Copy `datasets`, `checkpoints`, `log` or `results` into the folder of a case."""
        for part in parts:
            shutil.copytree(self.folder / part, folder / part, symlinks=True)


def digest(path: Path, ignore: Sequence[str] = ()) -> dict[str, str]:
    """SHA-256 of each visible file in a folder, or of a file; empty where there is nothing."""
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    names = {str(file.relative_to(path)): file for file in files if file.is_file() and not file.is_symlink()}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in names.items()
        if not is_hidden(name) and Path(name).name not in ignore
    }


def is_hidden(name: str) -> bool:
    """Whether a relative path is of a partial file, a lock or another thing that no reader looks at."""
    parts = [part for part in Path(name).parts if part != "."]
    return any(part.startswith(".") or part.endswith((".partial", ".old")) for part in parts)


def left_behind(folder: Path) -> list[Fault]:
    """Fault if partial files or locks lie in a folder after a program has ended well."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if is_hidden(str(path.relative_to(folder)))]
    return [Fault("lost", f"left behind: {', '.join(sorted(names)[:5])}")] if names else []


def said(ended: Ended) -> list[str]:
    """Lines on stderr that are neither a warning nor a note."""
    lines = [line for line in ended.err.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(("warning: ", "note: "))]


def last_line(ended: Ended) -> str:
    """End of what a program has said."""
    return (ended.err.strip().splitlines() or [""])[-1][:300]


def check_end(ended: Ended, statuses: Sequence[int] = (0, 1)) -> list[Fault]:
    """Faults in how a program ended: it may fail with one line and one of these statuses, and in no other way."""
    what = ended.command
    if ended.status is None:
        return [Fault("hang", f"{what}: still running after {ended.seconds:.0f} s")]
    faults = []
    if ended.peak > MEMORY:
        faults.append(Fault("over memory", f"{what}: {ended.peak / GB:.1f} GB"))
    if "Traceback" in ended.err or "Traceback" in ended.out:
        return [*faults, Fault("traceback", f"{what}: {_end_of_traceback(ended.err)}")]
    lines = said(ended)
    if ended.status not in statuses:
        shown = " / ".join(lines)[:200]
        faults.append(Fault("traceback" if ended.status < 0 else "message", f"{what}: status {ended.status}: {shown}"))
    elif ended.status > 0 and len(lines) != 1:
        faults.append(Fault("message", f"{what}: {len(lines)} lines on stderr: {lines[:4]}"))
    return faults


def _end_of_traceback(text: str) -> str:
    """Message and innermost place of a traceback."""
    lines = text.strip().splitlines() or [""]
    places = [line.strip() for line in lines if line.startswith("  File ")]
    return f"{lines[-1][:300]} ({places[-1] if places else 'no place'})"
