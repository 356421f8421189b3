"""Segment images with a checkpoint: `load` and `predict_array` for Python, `predict_files` for main.py."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

import checkpoint
from checkpoint import Checkpoint
from config import OF_FILTER, OF_THRESHOLD, Config, DatabaseFlags
from description import DataInfo, differences, find_description
from device import pick_precision
from distributed import World
from exchange import reading
from images.notes import say_notes
from images.profile import by_name, profile_of
from images.readers import Frame, list_frames, with_neighbours
from images.selection import Choice
from prediction.job import FrameRows, PredictionJob
from prediction.output_files import OutputFiles
from prediction.outputs import make_outputs
from prediction.predictor import Predictor, load, predict_array, predictor_of
from prediction.scaling import Scale, scale_line, scales_of
from progress import tracked
from samples import ENTRIES
from training.log import command_line
from utils import FlagError, UserError, echo

__all__ = ["load", "predict_array", "predict_files"]


def _differences(predictor: Predictor, frames: list[Frame], wanted: str, scales: list[Scale]) -> list[str]:
    """Lines on how images are scaled and differ from those of the training; refuses those of other grey values."""
    profile = profile_of(frames)
    # with auto each has the pixel size of the training
    sizes = [] if wanted == "auto" else zip(profile.pixel_size, scales[0], strict=False)
    profile = replace(profile, pixel_size=[size / factor for size, factor in sizes])
    source = f"{frames[0]} and {len(frames) - 1} more image(s)" if len(frames) > 1 else str(frames[0])
    if wanted != "auto" and scales[0] != Scale():
        source += f" at --scale {scales[0]}"
    advice = ": use --scale auto"
    lines = [differences(member.info, profile, source, advice) for member in predictor.members]
    warnings = dict.fromkeys(f"warning: {line}" for of_member in lines for line in of_member)
    return ([scale_line(scales)] if wanted == "auto" else []) + list(warnings)


def _threshold(predictor: Predictor, what: str) -> list[str]:
    """Line with the threshold, if an output needs it."""
    is_needed = predictor.num_channel == 1 and {*OF_THRESHOLD} & {*what.split(",")}
    return [f"threshold {predictor.threshold_text}"] if is_needed else []


def _write_page(job: PredictionJob, trained: dict[Path, Checkpoint]) -> None:
    """Write the page of a folder, in one process."""
    if not (job.files.page and job.world.is_main):
        return
    from evaluation.prediction_page import write_prediction_page

    predictor = job.predictor
    threshold = {} if predictor.num_channel > 1 else {"threshold": predictor.threshold_text}
    facts = {"command": command_line(), "checkpoint": ", ".join(map(str, trained)), **threshold}
    write_prediction_page(job.files.page, job.previews, job.files.frames, predictor, facts)


def _sources(config: Config) -> list[str]:
    """What `--input` names."""
    return [config.input] if isinstance(config.input, str) else list(config.input)


def _check_flags(config: Config, files: OutputFiles) -> None:
    """Refuse a page next to a file, and flags of objects where no output has them: of labels the checkpoint tells."""
    if (given := config.given("page")) and not files.to_folder:
        raise FlagError(f"{given}: applies to a folder: name one with --output, or leave --page out")
    given = config.given(*OF_FILTER)
    if given and not files.has_objects:
        raise FlagError(f"{given}: applies to objects, which these labels don't number: leave it out")


def _frames(config: Config, info: DataInfo) -> tuple[list[Frame], list[tuple[Path, str]]]:
    """Images to segment with the channels of the training, and notes on them."""
    frames = list_frames(config.input, Choice(config.channel, config.series, config.section))
    frames, notes = by_name(frames, info.profile)
    if not config.unlabelled_only:
        return frames, notes
    from sources.known import Known

    folder = config.folder("data")
    with reading(folder, ENTRIES, "choose another --name_data"):
        known = Known.load(folder)
    new = {frame.path for frame in tracked(frames, "compare") if not known.find(frame.read())}
    if not new:
        raise UserError(f"--unlabelled_only on: {folder} has all of these images: name others, or leave it out")
    others = {frame.path for frame in frames} - new
    notes += [(folder, f"left out: {len(others)} file(s), whose images are in the database")] if others else []
    return [frame for frame in frames if frame.path in new], notes


def predict_files(config: Config, device: torch.device, world: World) -> int:
    """Segment what `--input` names and write `--output`: `main.py --mode predict`.

    Raises
    ------
    UserError
        Something is missing or does not fit, or an image or the output can't be read or written.
    """
    if not config.input or not config.output:
        raise UserError("--mode predict needs --input IMAGES and --output FILE or FOLDER")
    trained = checkpoint.load_trained(config.checkpoint_folders, config.epoch, is_main=world.is_main)
    predictor = predictor_of(trained, device, pick_precision(config.amp, device), config.background, config.threshold)
    frames, notes = _frames(config, predictor.info)
    if world.is_main:
        say_notes(notes)
    images = [FrameRows(around, predictor.info) for around in with_neighbours(frames, predictor.info.context)]
    scales = scales_of(config.scale, frames, {path: saved.info for path, saved in trained.items()})
    for line in _differences(predictor, frames, config.scale, scales) + _threshold(predictor, config.what):
        if world.is_main:
            echo(line)
    outputs = make_outputs(config, predictor, frames)
    folders = [Path(name) for name in _sources(config) if Path(name).is_dir()]
    files = OutputFiles(config.output, outputs, frames, config.page, folders)
    _check_flags(config, files)
    job = PredictionJob(config, predictor, [*images], scales, files, world)
    locks: AbstractContextManager[dict[Path, int]] = nullcontext({})  # and the number of older files at each path
    with files.reserved(config.compression) if world.is_main else locks as replaced:
        job.run()
        _write_page(job, trained)
    if world.is_main:
        _report(job, trained, replaced)
    return 0


def _report(job: PredictionJob, trained: dict[Path, Checkpoint], replaced: dict[Path, int]) -> None:
    """Print what was written, the number of objects, and the next command if there are labels."""
    for written, num in replaced.items():
        older = f" (replaced {num} older file(s))" if num else ""
        echo(f"segmented {len(job.images)} image(s) with {', '.join(map(str, trained))}: {written}{older}")
    if job.files.has_objects:
        job.report_objects()
    if job.files.label_files and find_description(job.config.folder("data")):
        config, labels = job.config, job.files.label_files[0].parent
        echo(f"correct label images in {labels}, and save them: the next command takes those that were saved")
        frames = {name: getattr(config, name) for name in ("channel", "series", "section") if config.given(name)}
        echo(
            config.next_step(
                DatabaseFlags, add=config.input, label=str(labels), labelled_only=True, replace=True, **frames
            )
        )
