"""Segment images with a checkpoint: `load` and `predict_array` for Python, `predict_files` for main.py."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

import checkpoint
from config import WHAT, Config
from device import pick_precision
from distributed import World
from images.readers import Frame, list_frames, with_neighbours
from images.rows import Rows
from images.selection import Choice
from prediction.job import PredictionJob, open_frame, tile_grids
from prediction.linking import StackLinker, stacks_to_link
from prediction.objects import ObjectFilter
from prediction.output_files import OutputFiles
from prediction.predictor import load, predict_array, predictor_of
from utils import UserError, echo

__all__ = ["load", "predict_array", "predict_files"]


def predict_files(config: Config, device: torch.device, world: World) -> int:
    """Segment what `--input` names and write `--output`: `main.py --mode predict`.

    Raises
    ------
    UserError
        Something is missing or does not fit, or an image or the output can't be read or written.
    """
    if not config.input or not config.output:
        raise UserError("--mode predict needs --input IMAGES and --output FILE or FOLDER")
    choice = Choice(config.channel, config.series, config.section)
    trained = checkpoint.load_trained(config.checkpoint_folders, config.epoch, is_main=world.is_main)
    predictor = predictor_of(trained, device, pick_precision(config.amp, device), config.background)
    frames = list_frames(config.input, choice)
    images = [open_frame(around, predictor.info) for around in with_neighbours(frames, predictor.info.context)]
    outputs = [output for output in WHAT if output in config.what.split(",")]
    named = [config.input] if isinstance(config.input, str) else config.input
    folders = [Path(name) for name in named if Path(name).is_dir()]
    files = OutputFiles(config.output, outputs, frames, predictor.num_channel, folders)
    grids = tile_grids(predictor, images, config.tile, world)
    chosen = predictor.object_filter._replace(**config.given_filter)
    linker = _linker(config, frames, images, world)
    form = (config.dtype, config.compression)
    job = PredictionJob(predictor, images, files, grids, world, config.tta, *form, chosen, linker)
    with ExitStack() as locks:
        replaced = locks.enter_context(files.reserved(config.dtype, config.compression)) if world.is_main else {}
        job.run()
    if world.is_main:
        for written, num in replaced.items():
            older = f" (replaced {num} older file(s))" if num else ""
            echo(f"segmented {len(frames)} image(s) with {', '.join(map(str, trained))}: {written}{older}")
        if files.has_objects:
            job.report_objects()
            _say_filter(chosen, config)
    return 0


def _linker(config: Config, frames: list[Frame], images: list[Rows], world: World) -> StackLinker | None:
    """What links the sections of stacks, if `--link` asks for it."""
    if not config.link:
        return None
    stacks = stacks_to_link(frames, images, config.link)
    num_idle = world.size - len({*stacks})
    if num_idle > 0 and world.is_main:
        echo(f"note: --link: one process segments a whole stack: {num_idle} of {world.size} have nothing to do")
    return StackLinker(config.link, stacks, Path(config.output))


def _say_filter(chosen: ObjectFilter, config: Config) -> None:
    """Print which objects were dropped or filled, and why if no flag says so."""
    if chosen.is_active:
        is_given = len(config.given_filter) == len(chosen)
        origin = "" if is_given else " (as in the training labels; to keep all: --min_size 0 --fill_holes off)"
        echo(f"filter of the objects: {chosen}{origin}")
