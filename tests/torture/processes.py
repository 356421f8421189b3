"""Programs as forked children: torch is imported already, so that they start in milliseconds."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NoReturn

from .project import PROGRAMS, ROOT

LIMIT = 60.0  # [s] for one program on tiny data
LIVE: set[Child] = set()  # that have not ended yet


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes
    ----------
    command : str
        As one types it.
    status : int or None
        Exit status, negative after a signal; None where it had to be killed because it took too long.
    peak : int
        Largest resident memory [bytes].
    """

    command: str
    status: int | None
    out: str
    err: str
    seconds: float
    peak: int


class Child:
    """A program that runs in a fork of this process, in a folder.

    Parameters
    ----------
    program : str
        `main`, `run_make_database` or `display_result`.
    argv : list of str
        Its arguments.
    folder : Path
        Its current folder.
    before : callable, optional
        Called in the child before the program, such as to set a limit.
    """

    def __init__(self, program: str, argv: list[str], folder: Path, before: Callable[[], None] | None = None) -> None:
        self.command = f"{program} {' '.join(argv)}"
        self.out, self.err = TemporaryFile(), TemporaryFile()  # noqa: SIM115
        self.start = time.monotonic()
        self.ended: Ended | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            call = partial(PROGRAMS[program], argv)
            become(call, [str(ROOT / f"{program}.py"), *argv], folder, before, self.out, self.err)
        LIVE.add(self)

    def poll(self) -> bool:
        """Whether the program has ended."""
        if self.ended is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self._note(os.waitstatus_to_exitcode(status), usage.ru_maxrss)
        return self.ended is not None

    def kill(self) -> None:
        """End the program at once, as a power cut would."""
        if self.ended is None:
            os.kill(self.pid, signal.SIGKILL)
            _, status, usage = os.wait4(self.pid, 0)
            self._note(os.waitstatus_to_exitcode(status), usage.ru_maxrss)

    def wait(self, limit: float = LIMIT) -> Ended:
        """Wait for the end, or kill the program where it has computed or stood still for so many seconds.

        On a busy machine a program takes longer without being at fault; after six times the limit it is.
        """
        computed, since = 0.0, time.monotonic()
        while not self.poll():
            now = time.monotonic()
            if (cpu := self._cpu_seconds()) > computed:
                computed, since = cpu, now
            if computed > limit or now - since > limit or now - self.start > 6 * limit:
                self.kill()
                self._note(None, 0)
            time.sleep(0.005)
        return self.ended

    def _cpu_seconds(self) -> float:
        """What the program has computed until now [s]."""
        times = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    def _note(self, status: int | None, maxrss: int) -> None:
        LIVE.discard(self)
        texts = [_text_of(file) for file in (self.out, self.err)]
        unit = 1 if sys.platform == "darwin" else 1024
        self.ended = Ended(self.command, status, *texts, time.monotonic() - self.start, maxrss * unit)


def kill_all() -> None:
    """End all programs that this process has started."""
    for child in list(LIVE):
        child.kill()


def run(
    program: str, argv: list[str], folder: Path, before: Callable[[], None] | None = None, limit: float = LIMIT
) -> Ended:
    """Run a program to its end."""
    return Child(program, argv, folder, before).wait(limit)


def become(
    call: Callable[[], int | None],
    argv: list[str],
    folder: Path,
    before: Callable[[], None] | None,
    out: IO[bytes],
    err: IO[bytes],
) -> NoReturn:
    """Be a program, in the child."""
    status = 1
    try:
        for signum in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        os.chdir(folder)
        sys.argv = argv
        if before:
            before()
        status = call() or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _text_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
