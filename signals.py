"""Signals that end a program: raised as errors, or asked for between two steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGPIPE = 13  # signal.SIGPIPE does not exist on Windows
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP


class Stopped(KeyboardInterrupt):
    """A signal that would have ended the process at once, without removing its partial files."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


@contextmanager
def raise_signals() -> Iterator[None]:
    """While entered, SIGTERM (of a batch system) and SIGHUP (a closed terminal) raise `Stopped` if nobody handles them.

    Not in a process of torchrun, which ends by SIGTERM those that wait for a dead one: there Python would not see it.
    """

    def stop(signum: int, _frame: object) -> None:
        raise Stopped(signum)

    unhandled = [signum for signum in ENDING if signal.getsignal(signum) == signal.SIG_DFL]
    if "RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        unhandled = []  # Python allows handlers in the main thread only
    for signum in unhandled:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum in unhandled:
            signal.signal(signum, signal.SIG_DFL)


def mute() -> None:
    """Discard further output: the reader of stdout has gone, as `| head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGHUP (a closed terminal) set `signum` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt; under nohup, SIGHUP stays ignored. Outside the main thread, where Python
    allows no handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._old: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signum != 0

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            hangup = [signum for signum in ENDING[1:] if signal.getsignal(signum) != signal.SIG_IGN]
            for signum in (signal.SIGINT, signal.SIGTERM, *hangup):
                self._old[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    @contextmanager
    def unless_read(self) -> Iterator[None]:
        """While entered, a closed stdout counts as SIGPIPE."""
        try:
            yield
        except BrokenPipeError:
            mute()
            self.signum = SIGPIPE

    def _note(self, signum: int, _frame: object) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
