"""Writes the checkpoints of a training: numbered ones, the latest and the best one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from checkpoint import latest_path, list_epochs, path_of
from distributed import World
from files import discard, move_aside
from training.best import BestEpoch
from training.budget import Budget
from training.log import RUNS
from training.state import TrainState
from utils import DivergenceError, UserError, echo


class Saver:
    """Saves a training, in the main process; moves files of an earlier one aside first, and then calls `begin_log`."""

    def __init__(self, best: BestEpoch, budget: Budget, world: World, begin_log: Callable[[], None]) -> None:
        self.best, self.budget, self.world, self.begin_log = best, budget, world, begin_log
        self.folder = best.path.parent
        self.position = (0, 0)  # `TrainState.position` that is saved
        self.stale: dict[Path, list[Path]] = {}  # files of an earlier training, by their folder
        self.moved: list[Path] = []  # folders that they were moved to

    def find_stale(self, state: TrainState, resumed: Path | None, dir_log: Path) -> bool:
        """Find files of an earlier training than that of the `resumed` checkpoint; return whether there are any."""
        stale = [path for epoch, path in list_epochs(self.folder).items() if epoch > state.saved_epoch]
        latest = latest_path(self.folder)
        stale += [latest] if latest.is_file() and latest != resumed else []
        best = self.best.path
        stale += [best] if best.is_file() and not self.best.is_written and best != resumed else []
        logs = [] if state.saved_epoch else [*dir_log.glob("events.out.tfevents*"), *dir_log.glob("arg.txt")]
        logs += [dir_log / run for run in RUNS if run and logs and any((dir_log / run).glob("events.out.tfevents*"))]
        self.stale = {folder: files for folder, files in ((self.folder, stale), (dir_log, logs)) if files}
        return bool(self.stale)

    def _make_room(self) -> None:
        """Move the files of an earlier training aside: called before a checkpoint of this one gets its name."""
        if self.stale:
            moved = [move_aside(folder, files) for folder, files in self.stale.items()]
            self.moved, self.stale = [folder for folder in moved if folder], {}
            echo(f"moved the files of an earlier training to {' and '.join(map(str, self.moved))}")
            self.begin_log()

    def _write(self, state: TrainState, path: Path, *, epoch_complete: bool) -> None:
        """Write a checkpoint, and that of the best epoch before, since a later one says that it is there."""
        if self.world.is_main:
            self.best.save(self._make_room)
            saved = state.checkpoint(epoch_complete=epoch_complete, seconds=self.budget.seconds)
            saved.save(path, self._make_room)
        self.position = state.position
        self.budget.note_save()

    def save(self, state: TrainState, *, epoch_complete: bool) -> Path:
        """Save a complete or interrupted epoch under its number, and return the file."""
        path = path_of(self.folder, state.position[0])
        self._write(state, path, epoch_complete=epoch_complete)
        if self.world.is_main:
            discard(latest_path(self.folder))
        return path

    def save_meanwhile(self, state: TrainState, *, epoch_complete: bool) -> None:
        """Save a complete epoch under its number, or a part as the latest; a failure is a warning: room may come."""
        try:
            if epoch_complete:
                self.save(state, epoch_complete=True)
            else:
                self._write(state, latest_path(self.folder), epoch_complete=False)
        except UserError as error:
            self.budget.note_save()
            echo(f"warning: {error}; the training goes on, and tries again in ten minutes", sys.stderr)

    @contextmanager
    def on_error(self, state: TrainState) -> Iterator[None]:
        """Save what is trained if anything but a diverged loss ends the training: a lost sample, a lack of memory."""
        try:
            yield
        except DivergenceError:
            raise
        except Exception:
            if state.position != self.position:
                state.losses += torch.stack(state.steps).tolist() if state.steps else []  # others may be gone
                state.steps.clear()
                if np.isfinite(state.losses).all():
                    path = self.save(state, epoch_complete=False)
                    if self.world.is_main:
                        echo(f"saved {path}")
            raise
