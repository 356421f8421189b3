"""How far a training is, and whether it is to stop: the same in all processes of the run."""

from __future__ import annotations

import signal
import time

from distributed import World
from utils import StopRequest


class Progress:
    """Place in a run that ends by epochs or by the clock, and the signals that end it before.

    Parameters
    ----------
    num_epoch : int
        Epochs of the run.
    max_minutes : float
        Its time [min], those of the runs that it resumes included; 0: it ends by epochs.
    world : World
        The processes of the run.

    Attributes
    ----------
    stop : StopRequest
        What this process has been told; entered while it trains.
    signum : int
        Signal that all processes know of, after `sync`; 0 for none.
    seconds_before : float
        Time trained before this process [s].
    """

    def __init__(self, num_epoch: int, max_minutes: float, world: World) -> None:
        self.num_epoch, self.max_minutes, self.world = num_epoch, max_minutes, world
        self.stop, self.signum = StopRequest(), 0
        self.start, self.seconds_before = time.monotonic(), 0.0

    def is_stopping(self) -> bool:
        """Whether all processes know of a signal to stop."""
        return self.signum != 0

    @property
    def seconds(self) -> float:
        """Time trained so far [s]."""
        return self.seconds_before + time.monotonic() - self.start

    @property
    def last_epoch(self) -> int | None:
        """Last epoch of the run; None for one that ends by the clock."""
        return None if self.max_minutes else self.num_epoch

    def fraction(self, epochs: float) -> float:
        """Fraction of the run that is over when so many epochs are, or by the clock; in [0, 1]."""
        if self.max_minutes:
            return min(self.seconds / (60 * self.max_minutes), 1.0)
        return min(epochs / self.num_epoch, 1.0)

    def sync(self, epochs: float) -> float:
        """`fraction` of the process that is furthest; `signum` is then what any process has been told."""
        if self.world.is_left_alone and not self.stop:
            self.stop.signum = signal.SIGTERM
        signum, fraction = self.world.max(self.stop.signum, self.fraction(epochs))
        self.signum = int(signum)
        return fraction
