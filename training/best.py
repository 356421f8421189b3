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

import checkpoint
from checkpoint import Checkpoint
from distributed import World
from training.state import TrainState
from utils import FlagError, UserError

Scores = Mapping[str, float]  # of a validation, under the names of their curves


def _mean_dice(scores: Scores) -> float:
    return float(np.mean([value for name, value in scores.items() if name.startswith("dice/")]))


SCORES: dict[str, Callable[[Scores], float | None]] = {  # None where the epoch has none
    "loss": lambda scores: scores["loss/val"],
    "pixel_error": lambda scores: scores["pixel_error"],
    "dice": _mean_dice,
    "v_info": lambda scores: scores.get("max/v_info"),
}
FALLING = ("loss", "pixel_error")  # the lower, the better


@dataclass
class BestEpoch:
    """Keeps the checkpoint of the best epoch, and writes it as `model_best.pth` when a numbered one is written.

    The threshold of its weights is chosen just before that, so that only few epochs take the time to choose one.

    Parameters
    ----------
    score : str
        Which one counts, as `--best_score`.
    patience : int
        Epochs without a better score after which a training ends; 0: it does not.
    folder : Path
        Where the checkpoints of the run lie.

    Attributes
    ----------
    kept : Checkpoint or None
        On the CPU, until it is written with its threshold.
    has_threshold : bool
        Whether the threshold of `kept` was chosen for its weights.
    is_resumed : bool
        Whether the `model_best.pth` in the folder is that of the resumed run.
    """

    score: str
    patience: int
    folder: Path
    kept: Checkpoint | None = None
    has_threshold: bool = False
    is_resumed: bool = False
    _copy: Checkpoint | None = None  # the memory of `kept`, used again for the next one

    @property
    def path(self) -> Path:
        """Where it is written."""
        return checkpoint.best_path(self.folder)

    def check(self, num_class: int, *, has_validation: bool) -> None:
        """Refuse flags that ask for scores which there are none of.

        Raises
        ------
        FlagError
            There is no validation set, or V_Info is asked for with more than two classes.
        """
        if self.patience and not has_validation:
            raise FlagError(f"--patience {self.patience}: the database has no validation set to score: leave it out")
        if self.score == "v_info" and num_class > 2 and has_validation:
            raise FlagError(f"--best_score v_info: needs two classes, the database has {num_class}: choose another")

    def resume(self, saved: Checkpoint, state: TrainState, world: World, *, is_remade: bool) -> list[str]:
        """Load the best epoch of a resumed run; where that can't be had, look for another, and return a note."""
        if not saved.best_epoch:
            return []
        why = ""
        if is_remade:
            why = "its score was of another validation set"
        elif saved.config.get("best_score") != self.score:
            why = f"--best_score was {saved.config.get('best_score')}"
        elif path := world.broadcast(self._find(saved.best_epoch) if world.is_main else None):
            self.kept, self.is_resumed = Checkpoint.load(path), path == self.path
            self.has_threshold = saved.info.num_class > 2  # else it is chosen again: a run may be killed before it is
        else:
            why = f"{self.path} is not of epoch {saved.best_epoch}"
        if not why:
            return []
        state.best_epoch, state.best_score = 0, None
        return [f"the best epoch is sought again, from epoch {state.epoch} on: {why}"]

    def _find(self, epoch: int) -> Path | None:
        """File with the weights of an epoch that was the best."""
        for path in (self.path, checkpoint.list_epochs(self.folder).get(epoch)):
            with suppress(UserError):  # there is none, or it is damaged
                if path and (found := Checkpoint.load(path)).epoch_complete and found.epoch == epoch:
                    return path
        return None

    def update(self, state: TrainState, scores: Scores, take: Callable[[], Checkpoint], *, has_threshold: bool) -> None:
        """Keep the checkpoint that `take` makes of an epoch if its score is the best until now."""
        score = SCORES[self.score](scores)
        if score is None or not isfinite(score):
            return
        sign, before = -1 if self.score in FALLING else 1, state.best_score
        if before is None or sign * score > sign * before:
            state.best_epoch, state.best_score = state.epoch, score
            self.kept = self._copy = _copy_of(take(), self._copy)
            self.has_threshold = has_threshold

    def is_over(self, state: TrainState, epoch: int) -> bool:
        """Whether a training ends by its patience after an epoch whose score is not better."""
        return bool(self.patience and state.best_epoch) and epoch - state.best_epoch >= self.patience

    def choose_threshold(self, state: TrainState, score_segments: Callable[[TrainState], object | None]) -> None:
        """Choose the threshold of the weights that are kept, if it is not chosen.

        `score_segments` sets the threshold of a state, and returns None after a signal to stop.
        """
        if self.kept is None or self.has_threshold:
            return
        net = copy.deepcopy(state.averaged_net)
        net.load_state_dict(self.kept.average["net"] if self.kept.average else self.kept.net)
        best = replace(state, net=net, average=None)
        if score_segments(best) is not None:
            self.kept.threshold, self.has_threshold = best.threshold, True

    def save(self, before_rename: Callable[[], None], *, is_main: bool) -> None:
        """Write what is kept, by the main process; a failure leaves the old file."""
        if self.kept and is_main:
            self.kept.save(self.path, before_rename)
        if self.has_threshold:
            self.kept = None

    def describe(self, state: TrainState) -> str:
        """Say which epoch is the best, and where it lies; nothing where none is known."""
        if not state.best_epoch:
            return ""
        return f"; best epoch {state.best_epoch} ({self.score} {state.best_score:.4g}), saved {self.path}"

    def reason(self, state: TrainState, epoch: int) -> str:
        """Say why a training ends with an epoch, if it does by its patience."""
        return f" ({self.patience} epochs without a better {self.score})" if self.is_over(state, epoch) else ""


def _copy_of(saved: Checkpoint, memory: Checkpoint | None) -> Checkpoint:
    """Copy of a checkpoint on the CPU, which further training does not change, in the memory of an older copy."""
    older = vars(memory) if memory else {}
    return Checkpoint(**{name: _copied(value, older.get(name)) for name, value in vars(saved).items()})


def _copied(value: Any, memory: Any) -> Any:
    """Copy of tensors, and of the tables and lists that hold them."""
    if isinstance(value, torch.Tensor):
        if not isinstance(memory, torch.Tensor) or (memory.shape, memory.dtype) != (value.shape, value.dtype):
            memory = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)  # pinned: four times as fast
        return memory.copy_(value)
    if isinstance(value, dict):
        older = memory if isinstance(memory, dict) else {}
        return {name: _copied(part, older.get(name)) for name, part in value.items()}
    return [_copied(part, None) for part in value] if isinstance(value, list) else value
