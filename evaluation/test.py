"""`--mode test`: a checkpoint on the test split, in pictures, tables and a page."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import checkpoint
from checkpoint import Checkpoint
from config import Config, as_typed
from dataset import ENTRIES, list_samples
from distributed import World
from evaluation import page
from evaluation.scorers import TestScorer, checked_samples, segment
from files import atomic_folder
from prediction.predictor import predictor_of
from training.log import command_line
from utils import say


def run_test(config: Config, device: torch.device, world: World) -> int:
    """Segment the test split (or another) with a checkpoint, and write pictures, `index.html` and scores.

    Returns
    -------
    int
        Exit status 0.

    Raises
    ------
    UserError
        There is no checkpoint or no test sample, they don't fit, or the results can't be written.
    """
    path, database = checkpoint.find(config.folder("checkpoint"), config.epoch), config.folder("data")
    with world.reading(database, ENTRIES, "choose another --name_data"):
        saved = Checkpoint.load_for(path, database)
        predictor = predictor_of([(path, saved)], device, None, config.background)
        files = checked_samples(list_samples(database / config.split), predictor.info, labelled=False)
        with _results(config.folder("result"), world) as folder:
            scorer = TestScorer(folder / "images", files, predictor)
            for image in segment(predictor, files, world, tta=config.tta, tile=config.tile):
                scorer(image)
            scorer.finish(world.gather)
            if world.is_main:
                _write(folder, scorer, config, path, saved)
    if world.is_main:
        _say_scores(scorer, saved.epoch, config.folder("result"))
    return 0


@contextmanager
def _results(goal: Path, world: World) -> Iterator[Path]:
    """Folder that all processes write into, and that the main one puts in place when it is whole."""
    if not world.is_main:
        yield world.broadcast(Path())
        return
    with atomic_folder(goal, page.RESULTS, "choose another --scope or --dir_result") as folder:
        yield world.broadcast(folder)


def _write(folder: Path, scorer: TestScorer, config: Config, path: Path, saved: Checkpoint) -> None:
    """Write the tables of a test and its page."""
    facts = {"command": command_line(), "checkpoint": str(path), "epoch": saved.epoch, "split": config.split}
    page.write_metrics(folder, facts | scorer.summary(), scorer.rows)
    title = f"{config.scope} / {config.name_data}: {scorer.legend}"
    page.write_index(folder, title, scorer.table(), facts | as_typed(saved.config))


def _say_scores(scorer: TestScorer, epoch: int, folder: Path) -> None:
    """Print the table of a test, and what it is of."""
    say(page.format_table(page.main_scores(scorer.table())))
    say(f"epoch {epoch}; {scorer.legend}")
    if challenge := scorer.summary()["challenge"]:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in challenge.items())
        say(f"ISBI 2012 challenge scores, best threshold from 0.1 to 0.9 on this test set: {scores}")
    say(f"pictures and scores: {folder / 'index.html'}")
    if len(scorer.predicted) == 1:
        say("warning: all pixels were predicted as the same class: train longer, or check the labels", sys.stderr)
