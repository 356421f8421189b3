"""The epoch with the best validation score: which it is, its checkpoint, and whether a training is to end by it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint import Checkpoint, list_epochs
from device import abilities
from training.state import CHOSEN, TrainState
from utils import FlagError, UserError

Scores = Mapping[str, float]  # of a validation, under the names of their curves


SCORES: dict[str, Callable[[Scores], float | None]] = {  # None where the epoch has none
    "loss": lambda scores: scores["loss/val"],
    "pixel_error": lambda scores: scores["pixel_error"],
    "dice": lambda scores: float(np.mean([value for name, value in scores.items() if name.startswith("dice/")])),
    "v_info": lambda scores: scores.get("max/v_info"),
}
FALLING = ("loss", "pixel_error")  # the lower, the better
OF_FOREGROUND = ("dice", "v_info")  # that tell nothing where no validation sample has foreground


@dataclass
class BestEpoch:
    """The checkpoint of the epoch with the best validation score, with a threshold chosen for its weights."""

    score: str  # which one counts, as `--best_score`
    patience: int  # epochs without a better score after which a training ends; 0: it does not
    path: Path  # where it is written
    checkpoint: Checkpoint | None = None  # a copy on the CPU
    has_threshold: bool = False  # whether its threshold was chosen for its weights
    is_written: bool = False  # whether the file holds it
    is_blank: bool = False  # whether the score is one of foreground, and no validation sample has any

    def check(self, num_class: int, *, has_validation: bool) -> None:
        """Refuse flags that ask for scores which the validation set does not have."""
        if self.patience and not has_validation:
            raise FlagError(f"--patience {self.patience}: the database has no validation set to score: leave it out")
        if self.score == "v_info" and num_class > 2 and has_validation:
            raise FlagError(f"--best_score v_info: needs two classes, the database has {num_class}: choose another")

    def resume(self, saved: Checkpoint, state: TrainState, *, is_remade: bool) -> list[str]:
        """Load the best epoch of a resumed run; if that is impossible, look for another, and return a note."""
        if not saved.best_epoch:
            return []
        if is_remade:
            why = "its score was of another validation set"
        elif saved.config.get("best_score") != self.score:
            why = f"--best_score was {saved.config.get('best_score')}"
        elif self._load(saved.best_epoch):
            self.has_threshold = saved.info.num_class > 2  # else it is chosen again: a run may be killed before it is
            return []
        else:
            why = f"{self.path} is not of epoch {saved.best_epoch}"
        state.best_epoch, state.best_score = 0, None
        return [f"the best epoch is sought again, from epoch {state.epoch} on: {why}"]

    def _load(self, epoch: int) -> bool:
        """Load an epoch that was the best, from its file or its numbered one; return whether that worked."""
        for path in (self.path, list_epochs(self.path.parent).get(epoch)):
            with suppress(UserError):  # there is none, or it is damaged
                if path and (saved := Checkpoint.load(path)).epoch_complete and saved.epoch == epoch:
                    self.checkpoint, self.is_written = saved, path == self.path
                    return True
        return False

    def consider(self, state: TrainState, scores: Scores, seconds: float) -> None:
        """Copy the checkpoint of a complete epoch if its score is the best until now; `seconds` as in a checkpoint."""
        score = SCORES[self.score](scores)
        if self.is_blank or score is None or not isfinite(score):
            return
        sign = -1 if self.score in FALLING else 1
        if state.best_score is None or sign * score > sign * state.best_score:
            state.best_epoch, state.best_score = state.epoch, score
            saved = state.checkpoint(epoch_complete=True, seconds=seconds)
            self.checkpoint, self.is_written = _copy_of(saved, self.checkpoint), False
            self.has_threshold = state.info.num_class > 2 or "min_pixel_error" in scores  # scoring segments chooses one

    def is_over(self, state: TrainState, epoch: int) -> bool:
        """Whether a training ends by its patience after an epoch whose score is not better."""
        return bool(self.patience and state.best_epoch) and epoch - state.best_epoch >= self.patience

    def choose_threshold(self, state: TrainState, score_segments: Callable[[TrainState], object | None]) -> None:
        """Choose the threshold for the weights of the best epoch, unless that is done.

        `score_segments` sets the threshold of a state, and returns None after a signal to stop.
        """
        if self.checkpoint is None or self.has_threshold:
            return
        net = copy.deepcopy(state.averaged_net)
        net.load_state_dict(self.checkpoint.average["net"] if self.checkpoint.average else self.checkpoint.net)
        best = replace(state, net=net, average=None)
        if score_segments(best) is not None:
            for name in CHOSEN:
                setattr(self.checkpoint, name, getattr(best, name))
            self.has_threshold, self.is_written = True, False

    def save(self, before_rename: Callable[[], None]) -> None:
        """Write the checkpoint if the file is not up to date; a failure leaves the old file."""
        if self.checkpoint and not self.is_written:
            self.checkpoint.save(self.path, before_rename)
            self.is_written = True

    def describe(self, state: TrainState) -> str:
        """Message about which epoch is the best, and its file; empty without one."""
        if not state.best_epoch:
            return ""
        return f"; best epoch {state.best_epoch} ({self.score} {state.best_score:.4g}), saved {self.path}"

    def reason(self, state: TrainState, epoch: int) -> str:
        """Message about why a training ends with an epoch, if it does by its patience."""
        return f" ({self.patience} epochs without a better {self.score})" if self.is_over(state, epoch) else ""


def _copy_of(saved: Checkpoint, older: Checkpoint | None) -> Checkpoint:
    """Copy of a checkpoint on the CPU, which further training does not change, in the memory of an older copy."""
    memory = vars(older) if older else {}
    return Checkpoint(**{name: _copied(value, memory.get(name)) for name, value in vars(saved).items()})


def _copied(value: Any, memory: Any) -> Any:
    """Copy of tensors, and of the tables and lists that hold them."""
    if isinstance(value, torch.Tensor):
        pinned = abilities(value.device).pinned  # four times as fast
        form = (value.shape, value.dtype, pinned)
        if not isinstance(memory, torch.Tensor) or (memory.shape, memory.dtype, memory.is_pinned()) != form:
            memory = torch.empty_like(value, device="cpu", pin_memory=pinned)
        return memory.copy_(value)
    if isinstance(value, dict):
        older = memory if isinstance(memory, dict) else {}
        return {name: _copied(part, older.get(name)) for name, part in value.items()}
    return [_copied(part, None) for part in value] if isinstance(value, list) else value
