"""Progress of what takes longer than two seconds: a bar on a terminal, otherwise a line every half minute."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, Self, TypeVar

from utils import echo

FIRST, NEXT = 2.0, 30.0  # [s] until a bar is shown, and between two lines
BAR = "{remaining} left, {elapsed} done, {desc} |{bar}|{percentage:3.0f}%"
Item = TypeVar("Item", covariant=True)


class Countable(Sized, Iterable[Item], Protocol[Item]):
    """Items whose number is known."""


def clock(seconds: float) -> str:
    """Time as minutes and seconds, or with hours.

    >>> clock(9.6), clock(600), clock(36610)
    ('0:10', '10:00', '10:10:10')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Progress of `total` steps of what a word names; the first of several processes shows it."""

    def __init__(self, total: int, what: str) -> None:
        from tqdm import tqdm

        shown = os.environ.get("RANK", "0") == "0"
        self.total, self.what, self.shown, self.done = total, what, shown, 0.0
        disable = None if shown else True  # None: where there is no terminal
        self.bar = tqdm(total=total, desc=what, disable=disable, bar_format=BAR, delay=FIRST, leave=False)
        self.timer = threading.Timer(FIRST, self.bar.refresh)  # of a first step that takes long
        self.timer.daemon = True
        if not self.bar.disable:
            self.timer.start()
        self.start = self.last = time.monotonic()

    def update(self, step: float = 1) -> None:
        """Count a step, or a part of one."""
        self.done += step
        self.bar.update(step)
        now = time.monotonic()
        if self.shown and self.bar.disable and now - self.last >= NEXT:
            self.last, gone = now, now - self.start
            left = gone * max(self.total / self.done - 1, 0)
            echo(f"{clock(left)} left, {clock(gone)} done, {self.what} {min(self.done / self.total, 1):.0%}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        self.bar.close()


def tracked(items: Countable[Item], what: str) -> Iterator[Item]:
    """The items, one by one, with their progress."""
    with Progress(len(items), what) as progress:
        for item in items:
            yield item
            progress.update()
