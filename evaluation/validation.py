"""Validation during training: scores on the validation set, and the choice of the threshold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

from distributed import World
from evaluation.scorers import Challenge, PixelScores, object_counts, segment_scores
from evaluation.segment import Segmented, segment
from prediction.predictor import Member, Predictor, find_background, fold_norm
from prediction.threshold import of_foreground, origin_of
from samples import SampleFile
from training.budget import Budget
from training.state import TrainState


@dataclass(frozen=True)
class Validation:
    """Scores the validation set, whose samples are divided among the processes of the run."""

    files: list[SampleFile]  # the samples, each with a label
    device: torch.device
    precision: torch.dtype | None  # of mixed precision, as in the test
    background: str  # see `--background`
    tta: bool  # test-time augmentation, to score segments
    tile: int  # height of a tile [px]
    world: World
    budget: Budget  # tells whether to stop

    def score_pixels(self, state: TrainState, *, pictures: bool) -> PixelScores | None:
        """Score each pixel of the whole images, without augmentation; None after a signal to stop."""
        first, images = None, []
        for image in self._segment(self._predictor(state), tta=False, stoppable=True):
            if pictures and first is None:
                first = image.pictures(state.info)
            images.append((image.index, (image.loss, image.matrix)))
        self.budget.sync(state.epoch)
        if self.budget.is_stopping():
            return None
        losses, matrices = zip(*self._gather(images), strict=True)
        return PixelScores(state.info, list(losses), list(matrices), first)

    def score_segments(self, state: TrainState, *, stoppable: bool = True) -> Challenge | None:
        """Score the segments as in the test, and set the threshold for these weights.

        None for more than two classes, and after a signal to stop, which is ignored unless `stoppable`.
        """
        if state.info.num_class > 2:
            return None
        predictor, images = self._predictor(state), []
        for image in self._segment(predictor, tta=self.tta, stoppable=stoppable):
            scores = segment_scores(image, predictor.background)
            scores |= object_counts(image, predictor) if state.info.numbers_objects else {}
            images.append((image.index, scores))
        self.budget.sync(state.epoch)
        if stoppable and self.budget.is_stopping():
            return None
        challenge = Challenge(self._gather(images))
        state.threshold = of_foreground(challenge.best_threshold, predictor.background)
        state.certainty, state.chosen_on = challenge.best_certainty, challenge.chosen_on
        return challenge

    def threshold_text(self, state: TrainState) -> str:
        """The threshold of the foreground, and where it comes from; empty for more than two classes."""
        threshold = of_foreground(state.threshold, find_background(state.info, self.background))
        certain = f"; an object exceeds {state.certainty:g} somewhere" if state.certainty else ""
        origin = origin_of(state.chosen_on)
        return f"threshold {threshold:g}{certain}, {origin}" if state.info.num_class == 2 else ""

    def _gather(self, images: list[tuple[int, Any]]) -> list[Any]:
        """Scores of the images of all processes, sorted by the numbers of the images."""
        return [scores for _, scores in sorted(self.world.gather(images), key=itemgetter(0))]

    def _predictor(self, state: TrainState) -> Predictor:
        background = find_background(state.info, self.background)
        members = (Member(fold_norm(state.averaged_net), state.info),)
        return Predictor(members, state.threshold, self.device, self.precision, background)

    def _segment(self, predictor: Predictor, *, tta: bool, stoppable: bool) -> Iterator[Segmented]:
        """Segment the samples of this process; ends at a signal to stop if `stoppable`."""
        stop = (lambda: bool(self.budget.stop)) if stoppable else lambda: False
        return segment(predictor, self.files, self.world, tta=tta, tile=self.tile, stop=stop)
