"""Validation during training: scores on the validation set, and the choice of the threshold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from distributed import World
from evaluation.scorers import Challenge, Segmented, SegmentScorer, ValidationScorer, segment
from prediction.predictor import Member, Predictor, find_background, fold_norm
from samples import SampleFile
from training.budget import Budget
from training.state import TrainState


@dataclass(frozen=True)
class Validation:
    """Scores the validation set, whose samples are divided among the processes of the run.

    Attributes
    ----------
    files : list of SampleFile
        The samples, each with a label.
    device, precision
        Device, and data type of mixed precision, as in the test.
    background : str
        Background class, see `--background`.
    tta, tile
        Test-time augmentation, and height of a tile [px], to score segments; as in the test.
    world : World
        The processes of the run.
    budget : Budget
        Tells whether to stop.
    """

    files: list[SampleFile]
    device: torch.device
    precision: torch.dtype | None
    background: str
    tta: bool
    tile: int
    world: World
    budget: Budget

    def score_pixels(self, state: TrainState, *, pictures: bool) -> ValidationScorer | None:
        """Score each pixel of the whole images, without augmentation; None after a signal to stop."""
        scorer = ValidationScorer(state.info, pictures=pictures)
        for image in self._segment(self._predictor(state), tta=False, stoppable=True):
            scorer(image)
        self.budget.sync(state.epoch)
        if self.budget.is_stopping():
            return None
        scorer.finish(self.world.gather)
        return scorer

    def score_segments(self, state: TrainState, *, stoppable: bool = True) -> Challenge | None:
        """Score the segments as in the test, and set the threshold for these weights.

        None for more than two classes, and after a signal to stop, which is ignored unless `stoppable`.
        """
        if state.info.num_class > 2:
            return None
        predictor = self._predictor(state)
        scorer = SegmentScorer(predictor.background)
        for image in self._segment(predictor, tta=self.tta, stoppable=stoppable):
            scorer(image)
        self.budget.sync(state.epoch)
        if stoppable and self.budget.is_stopping():
            return None
        challenge = scorer.finish(self.world.gather)
        best = challenge.best_threshold
        state.threshold = best if predictor.background == 0 else round(1 - best, 6)
        return challenge

    def _predictor(self, state: TrainState) -> Predictor:
        background = find_background(state.info, self.background)
        members = (Member(fold_norm(state.averaged_net), state.info),)
        return Predictor(members, state.threshold, self.device, self.precision, background)

    def _segment(self, predictor: Predictor, *, tta: bool, stoppable: bool) -> Iterator[Segmented]:
        """Segment the samples of this process; ends at a signal to stop if `stoppable`."""

        def is_stopped() -> bool:
            return stoppable and bool(self.budget.stop)

        return segment(predictor, self.files, self.world, tta=tta, tile=self.tile, stop=is_stopped)
