"""Segment images with a checkpoint: `load` and `predict_array` for Python, `predict_files` for main.py."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

import checkpoint
from config import WHAT, Config
from distributed import World
from images.frames import list_frames, with_neighbours
from prediction.job import PredictionJob, open_frame, tile_grids
from prediction.output_files import OutputFiles
from prediction.predictor import load, predict_array
from utils import UserError, say

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
    paths = [checkpoint.find(folder, config.epoch) for folder in config.checkpoint_folders]
    predictor = load(paths, config.gpu_ids, "off" if config.amp == "auto" else config.amp, config.background)
    frames = list_frames(config.input)
    images = [open_frame(around, predictor.info) for around in with_neighbours(frames, predictor.info.context)]
    outputs = [output for output in WHAT if output in config.what.split(",")]
    named = [config.input] if isinstance(config.input, str) else config.input
    folders = [Path(name) for name in named if Path(name).is_dir()]
    files = OutputFiles(config.output, outputs, frames, predictor.num_channel, folders)
    grids = tile_grids(predictor, images, config.tile, world)
    job = PredictionJob(predictor, images, files, grids, world, config.tta, config.dtype, config.compression)
    with ExitStack() as locks:
        replaced = locks.enter_context(files.reserved(config.dtype)) if world.is_main else {}
        job.run()
    if world.is_main:
        for written, num in replaced.items():
            older = f" (replaced {num} older file(s))" if num else ""
            say(f"segmented {len(frames)} image(s) with {', '.join(map(str, paths))}: {written}{older}")
        if files.has_objects:
            job.report_objects()
    return 0
