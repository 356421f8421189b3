"""What a training has left, in epochs or minutes, and signals to stop it; the same in all processes of the run."""

from __future__ import annotations

import signal
import time

from distributed import World
from signals import StopRequest

SAVE_SECONDS = 600.0  # a training that is killed loses no more than this time


class Budget:
    """Progress of a run that is limited by epochs or by time, and the signals that stop it early."""

    def __init__(self, num_epoch: int, max_minutes: float, world: World) -> None:
        self.num_epoch, self.world = num_epoch, world
        self.max_minutes = max_minutes  # including the runs that it resumes; 0: limited by epochs
        self.stop = StopRequest()  # signals that this process receives; entered while it trains
        self.signum = 0  # signal that any process had received at the last `sync`; 0: none
        self.start, self.seconds_before = time.monotonic(), 0.0  # time trained before this process [s]
        self._saved = self.start  # time of the last save
        self.is_save_due = False  # at the last `sync`, in all processes

    def note_save(self) -> None:
        """Count the time to the next save from now."""
        self._saved, self.is_save_due = time.monotonic(), False

    def is_stopping(self) -> bool:
        """Whether any process had received a signal to stop at the last `sync`."""
        return self.signum != 0

    @property
    def seconds(self) -> float:
        """Time trained until now [s]."""
        return self.seconds_before + time.monotonic() - self.start

    def fraction(self, epochs: float) -> float:
        """Fraction of the run that is done after this many epochs, or of its time limit; in [0, 1]."""
        if self.max_minutes:
            return min(self.seconds / (60 * self.max_minutes), 1.0)
        return min(epochs / self.num_epoch, 1.0)

    def sync(self, epochs: float) -> float:
        """Largest `fraction` of all processes; also sets `signum` and `is_save_due` to what any of them has."""
        if self.world.is_orphaned and not self.stop:
            self.stop.signum = signal.SIGTERM
        waited = time.monotonic() - self._saved
        signum, fraction, waited = self.world.max(self.stop.signum, self.fraction(epochs), waited)
        self.signum, self.is_save_due = int(signum), waited >= SAVE_SECONDS
        return fraction
