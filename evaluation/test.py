"""`--mode test`: segment the test set with a checkpoint, and write pictures, scores and a page."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import checkpoint
from checkpoint import Checkpoint
from config import Config
from description import sample_origins
from device import pick_precision
from distributed import World
from evaluation import curves, results_page, tables
from evaluation.scorers import TestScorer, checked_samples, segment
from exchange import atomic_folder
from flags import as_typed
from prediction.objects import KEEP_ALL
from prediction.predictor import predictor_of
from samples import ENTRIES, list_samples
from training.log import command_line
from utils import echo


def run_test(config: Config, device: torch.device, world: World) -> int:
    """Segment the test set (or another split) with a checkpoint, and write pictures, `index.html` and scores.

    Returns
    -------
    int
        Exit status 0.

    Raises
    ------
    UserError
        There is no checkpoint or no test sample, they don't fit, or the results can't be written.
    """
    database = config.folder("data")
    with world.reading(database, ENTRIES, "choose another --name_data"):
        load = partial(_load, database=database, is_main=world.is_main)
        tested = checkpoint.load_trained(config.checkpoint_folders, config.epoch, load, is_main=world.is_main)
        precision = pick_precision(config.amp, device)
        predictor = predictor_of(tested, device, precision, config.background)
        files = checked_samples(list_samples(database / config.split), predictor.info, labelled=False)
        with _results(config.folder("result"), world) as folder:
            chosen, origins = KEEP_ALL._replace(**config.given_filter), sample_origins(database, config.split)
            scorer = TestScorer(folder / "images", files, predictor, chosen, origins)
            for image in segment(predictor, files, world, tta=config.tta, tile=config.tile):
                scorer(image)
            scorer.finish(world.gather)
            if world.is_main:
                _write(folder, scorer, config, tested, precision)
    if world.is_main:
        _say_scores(scorer, [saved.epoch for saved in tested.values()], config.folder("result"))
    return 0


def _load(path: Path, *, database: Path, is_main: bool) -> Checkpoint:
    """Load a checkpoint for the database that it is tested on."""
    return Checkpoint.load_for(path, database, echo if is_main else lambda _: None)


@contextmanager
def _results(target: Path, world: World) -> Iterator[Path]:
    """Temporary folder that all processes write to; the main one moves it into place when it is complete."""
    if not world.is_main:
        yield world.broadcast(Path())
        return
    with atomic_folder(target, tables.RESULTS, "choose another --scope or --dir_result") as folder:
        yield world.broadcast(folder)


def _write(
    folder: Path, scorer: TestScorer, config: Config, tested: dict[Path, Checkpoint], precision: torch.dtype | None
) -> None:
    """Write the tables of a test and its page."""
    facts = {"command": command_line(), **_origin(tested), "split": config.split}
    facts["precision"] = str(precision or torch.float32).removeprefix("torch.")  # --amp auto depends on the machine
    summary = scorer.summary()
    tables.write_metrics(folder, facts | summary, scorer.rows)
    results_page.write_index(
        folder,
        config.folder("result"),
        results_page.Run(
            title=f"{', '.join(config.scopes)} / {config.name_data}",
            legend=scorer.legend,
            facts=facts,
            checkpoints=_links(config, tested),
            commands=[_typed_command(saved.config) for saved in tested.values()],
            flags=_flags(tested.values()),
            charts=_charts(config, [saved.epoch for saved in tested.values()]),
        ),
        summary,
        scorer.cards(),
    )


def _links(config: Config, tested: dict[Path, Checkpoint]) -> list[tuple[str, Path]]:
    """Name and file of each checkpoint; those of an ensemble are named by their scopes, too."""
    of = [f"{scope}, " if len(tested) > 1 else "" for scope in config.scopes]
    return [(f"{name}epoch {saved.epoch}", path) for name, (path, saved) in zip(of, tested.items(), strict=True)]


def _charts(config: Config, epochs: list[int]) -> dict[str, list[curves.Chart]]:
    """Curves of each network from its log, where there is one."""
    found = {}
    for scope, epoch in zip(config.scopes, epochs, strict=True):
        folder = replace(config, scope=scope).folder("log")
        found[scope] = curves.charts(curves.read_curves(folder), epoch)
    return found


def _typed_command(flags: dict[str, Any]) -> str:
    """Command of a training with the flags that differ from their defaults."""
    default = Config().as_typed()
    words = ["python", "main.py"]
    for name, value in as_typed(flags).items():
        if name not in default or value != default[name]:
            words += [name, *map(str, value if isinstance(value, (tuple, list)) else [value])]
    return shlex.join(words)


def _origin(tested: dict[Path, Checkpoint]) -> dict[str, Any]:
    """The checkpoint of a test and its epoch; of an ensemble all of them, each with its threshold."""
    paths, saved = list(map(str, tested)), list(tested.values())
    if len(saved) == 1:
        return {"checkpoint": paths[0], "epoch": saved[0].epoch}
    return {
        "checkpoints": paths,
        "epochs": [each.epoch for each in saved],
        "thresholds": [each.threshold for each in saved],
    }


def _flags(tested: Iterable[Checkpoint]) -> dict[str, Any]:
    """Flags of a training; of several trainings all values of a flag, in their order, where they differ."""
    typed = [as_typed(saved.config) for saved in tested]
    found = {}
    for name in dict.fromkeys(name for flags in typed for name in flags):
        values = [flags.get(name, "") for flags in typed]
        same = all(value == values[0] for value in values)
        found[name] = values[0] if same else ", ".join(map(str, values))
    return found


def _say_confusion(scorer: TestScorer) -> None:
    """Print the confusion matrix of more than two classes, if it fits."""
    text = tables.format_confusion(scorer.matrix, scorer.info.class_names)
    if text and scorer.info.num_class > 2 and scorer.matrix.any():
        echo(f"\npercentage of each class of the label (row) predicted as each class (column):\n{text}\n")


def _say_scores(scorer: TestScorer, epochs: list[int], folder: Path) -> None:
    """Print the scores of a test, with its classes and thresholds."""
    echo(tables.format_table(tables.main_scores(scorer.table())))
    _say_confusion(scorer)
    of = f"epoch {epochs[0]}" if len(epochs) == 1 else f"mean of networks of epochs {', '.join(map(str, epochs))}"
    echo(f"{of}; {scorer.legend}")
    if challenge := scorer.summary()["challenge"]:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in challenge.items())
        echo(f"ISBI 2012 challenge scores, best threshold from 0.1 to 0.9 on this test set: {scores}")
    echo(f"pictures and scores: {folder / 'index.html'}")
    if len(scorer.predicted) == 1:
        echo("warning: all pixels were predicted as the same class: train longer, or check the labels", sys.stderr)
