"""`--mode test`: segment the test set with a checkpoint, and write pictures, scores and a page."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import checkpoint
from checkpoint import Checkpoint
from config import AS_TESTED, PREDICT, Config
from description import find_description, sample_origins
from device import pick_precision
from distributed import World
from evaluation import tables
from evaluation.curves import charts, read_curves
from evaluation.fates import counts_text
from evaluation.report import Report
from evaluation.results_page import Run, write_index
from evaluation.scorers import TestScorer
from evaluation.segment import checked_samples, segment
from exchange import atomic_folder
from flags import as_typed
from prediction.predictor import predictor_of
from samples import ENTRIES, list_samples
from training.log import command_line
from utils import echo


def run_test(config: Config, device: torch.device, world: World) -> int:
    """Segment the test set (or another split) with a checkpoint, and write pictures, `index.html` and scores."""
    database, target = config.folder("data"), config.folder("result")

    def load(path: Path) -> Checkpoint:
        return Checkpoint.load_for(path, database, echo if world.is_main else lambda _: None)

    with world.reading(database, ENTRIES, "choose another --name_data"):
        tested = checkpoint.load_trained(config.checkpoint_folders, config.epoch, load, is_main=world.is_main)
        precision = pick_precision(config.amp, device)
        predictor = predictor_of(tested, device, precision, config.background, config.threshold)
        files = checked_samples(list_samples(database / config.split), predictor.info, labelled=False)
        with _results(target, world) as folder:
            object_filter = predictor.object_filter._replace(**config.given_filter)  # as predict does
            origins = sample_origins(database, config.split)
            scorer = TestScorer(folder / "images", predictor, object_filter)
            for image in segment(predictor, files, world, tta=config.tta, tile=config.tile):
                scorer(image)
            report = Report(scorer.finish(world.gather), files, predictor, origins, object_filter)
            if world.is_main:
                run = replace(_run(config, tested, report.legend, precision), hints=report.hints)
                summary = report.summary()
                tables.write_metrics(folder, run.facts | summary, report.rows)
                write_index(folder, target, run, summary, report.cards)
    if world.is_main:
        _print_scores(report, [saved.epoch for saved in tested.values()], target)
        given = {name: getattr(config, name) for name in AS_TESTED if config.given(name)}
        known = {"unlabelled_only": True} if find_description(database) else {}
        echo(config.next_step(Config, **PREDICT, **known, **given))
    return 0


@contextmanager
def _results(target: Path, world: World) -> Iterator[Path]:
    """Temporary folder that all processes write to; the main one moves it into place when it is complete."""
    if not world.is_main:
        yield world.broadcast(Path())
        return
    with atomic_folder(target, tables.RESULTS, "choose another --scope or --dir_result") as folder:
        yield world.broadcast(folder)


def _run(config: Config, tested: dict[Path, Checkpoint], legend: str, precision: torch.dtype | None) -> Run:
    """How the checkpoints were trained and tested; those of an ensemble are named by their scopes, too."""
    facts = {"command": command_line(), **_checkpoint_facts(tested), "split": config.split}
    facts["precision"] = str(precision or torch.float32).removeprefix("torch.")  # --amp auto depends on the machine
    links, curves = [], {}
    for scope, (path, saved) in zip(config.scopes, tested.items(), strict=True):
        name = f"{scope}, " if len(tested) > 1 else ""
        links.append((f"{name}epoch {saved.epoch}", path))
        curves[scope] = charts(read_curves(replace(config, scope=scope).folder("log")), saved.epoch)
    return Run(
        title=f"{', '.join(config.scopes)} / {config.name_data}",
        legend=legend,
        facts=facts,
        checkpoints=links,
        commands=[_typed_command(saved.config) for saved in tested.values()],
        flags=_flags([as_typed(saved.config) for saved in tested.values()]),
        charts=curves,
    )


def _checkpoint_facts(tested: dict[Path, Checkpoint]) -> dict[str, Any]:
    """The checkpoint of a test and its epoch; of an ensemble all of them, each with its threshold."""
    paths, saved = list(map(str, tested)), list(tested.values())
    if len(saved) == 1:
        return {"checkpoint": paths[0], "epoch": saved[0].epoch}
    return {
        "checkpoints": paths,
        "epochs": [each.epoch for each in saved],
        "thresholds": [each.threshold for each in saved],
    }


def _typed_command(flags: dict[str, Any]) -> str:
    """Command of a training with the flags that differ from their defaults."""
    default = Config().as_typed()
    words = ["python", "main.py"]
    for name, value in as_typed(flags).items():
        if name not in default or value != default[name]:
            words += [name, *map(str, value if isinstance(value, (tuple, list)) else [value])]
    return shlex.join(words)


def _flags(typed: list[dict[str, Any]]) -> dict[str, Any]:
    """Flags of a training; of several trainings all values of a flag, in their order, where they differ."""
    merged = {}
    for name in dict.fromkeys(name for flags in typed for name in flags):
        values = [flags.get(name, "") for flags in typed]
        same = all(value == values[0] for value in values)
        merged[name] = values[0] if same else ", ".join(map(str, values))
    return merged


def _print_scores(report: Report, epochs: list[int], folder: Path) -> None:
    """Print the scores of a test, with its classes and thresholds, and the confusion matrix of several classes."""
    echo(tables.format_table(tables.main_scores(report.table())))
    text = tables.format_confusion(report.matrix, report.info.class_names)
    if text and report.info.num_class > 2 and report.matrix.any():
        echo(f"\npercentage of each class of the label (row) predicted as each class (column):\n{text}\n")
    of = f"epoch {epochs[0]}" if len(epochs) == 1 else f"mean of networks of epochs {', '.join(map(str, epochs))}"
    echo(f"{of}; {report.legend}")
    summary = report.summary()
    if summary["objects"]:
        echo(f"objects: {counts_text(summary['objects'])}")
    if challenge := summary["challenge"]:
        fewer, num = summary["scored_images"].get("challenge", {}), report.num_labelled
        over = {name: f" ({count} of {num} images)" for name, count in fewer.items()}
        scores = ", ".join(f"{name} {value:.4f}{over.get(name, '')}" for name, value in challenge.items())
        echo(f"ISBI 2012 challenge scores, best threshold from 0.1 to 0.9 on this test set: {scores}")
    echo(f"pictures and scores: open {folder / 'index.html'}")
    for line in report.hints:
        echo(f"hint: {line}")
