"""Segment images with a checkpoint: `load` and `predict_array` for Python, `predict_files` for main.py."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from config import WHAT, Config
from dataset import DataInfo
from distributed import World
from files import atomic_write, locked
from images.frames import Frame, Rows, drop_cached_pages, list_frames, read_geometry, with_neighbours
from images.layout import ORDER, Layout
from images.outputs import check_apart, check_replaceable, written_at
from images.writers import FlatWriter, PngWriter, RowFile, Writer, png_files
from images.zarr_writer import ZarrWriter
from prediction.objects import TALL, foreground_kinds, separate_bands
from prediction.predictor import Predictor, load, predict_array
from prediction.tiling import Bands, write_in_background
from utils import UserError, say

__all__ = ["load", "predict_array", "predict_files"]

TABLE = ("image", "object", "class", "area_px")
FILES = (".tif", ".tiff", ".npy", ".zarr", ".png")


class FrameRows:
    """A section, with its neighbours as further channels; opened when rows are asked for, and not held."""

    def __init__(self, frames: list[Frame]) -> None:
        self.frames = frames
        height, width, nch = frames[0].open().shape
        self.shape, self.dtype = (height, width, nch * len(frames)), frames[0].open().dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        images = [frame.open() for frame in self.frames]
        block = np.concatenate([image[rows] for image in images], axis=-1)  # a copy
        for image in images:
            drop_cached_pages(image)
        return block


def predict_files(config: Config, device: torch.device, world: World) -> int:
    """Segment what `--input` names and write `--output`: `main.py --mode predict`.

    Raises
    ------
    UserError
        Something is missing or does not fit, or an image or the goal can't be read or written.
    """
    if not config.input or not config.output:
        raise UserError("--mode predict needs --input IMAGES and --output FILE or FOLDER")
    path = checkpoint.find(Path(config.dir_checkpoint) / config.scope / config.name_data, config.epoch)
    predictor = load(path, config.gpu_ids, "off" if config.amp == "auto" else config.amp, config.background)
    frames = list_frames(config.input)
    images = [_open(around, predictor.info) for around in with_neighbours(frames, predictor.info.context)]
    whats = [what for what in WHAT if what in config.what.split(",")]
    job = _Job(config, predictor, frames, images, whats, world)
    with job.writers() as writers:
        write_in_background(job.results(), lambda result: job.write(writers, *result))
    tables = world.gather(job.found)
    if world.is_main:
        for goal in dict.fromkeys(job.goals().values()):
            say(f"segmented {len(frames)} image(s) with {path}: {goal}{job.replaced.get(goal, '')}")
        if "cells" in whats:
            job.report_objects(tables)
    return 0


def _open(frames: list[Frame], info: DataInfo) -> Rows:
    """Image of a frame, which is in the middle of its context; the channels are checked."""
    image = FrameRows(frames)
    if image.shape[2] != info.nch_in:
        nch, asked = (number // len(frames) for number in (image.shape[2], info.nch_in))
        raise UserError(
            f"{frames[info.context]}: {nch} channel(s), the network was trained on {asked}: choose other images, or "
            "another checkpoint by --scope and --name_data"
        )
    return image


def _pixel_outputs(band: np.ndarray, whats: list[str], predictor: Predictor, dtype: str) -> dict[str, np.ndarray]:
    """What is written of a probability (K, h, W) pixel by pixel: arrays (C, h, W)."""
    made: dict[str, np.ndarray] = {}
    if "probability" in whats:
        made["probability"] = PROBABILITY[dtype](band)
    if "mask" in whats:
        two = predictor.num_channel == 1
        mask = (band > predictor.threshold) * np.uint8(255) if two else band.argmax(0)[None].astype(np.uint8)
        made["mask"] = mask
    return made


def _to_bytes(band: np.ndarray) -> np.ndarray:
    """Probability (K, h, W) in 8 bits; by rows, so that there is no second band in float32."""
    scaled = np.empty(band.shape, np.uint8)
    for row in range(band.shape[1]):
        scaled[:, row] = np.round(band[:, row] * np.float32(255))
    return scaled


PROBABILITY: dict[str, Callable[[np.ndarray], np.ndarray]] = {"uint8": _to_bytes, "float32": lambda band: band}


@dataclass(frozen=True)
class _Job:
    """What is to be done for one command, and which part of it this process does."""

    config: Config
    predictor: Predictor
    frames: list[Frame]
    images: list[Rows]
    whats: list[str]
    world: World
    found: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)  # frame, classes and areas of objects

    replaced: dict[Path, str] = field(default_factory=dict)  # goal -> words on the older one

    @property
    def to_folder(self) -> bool:
        """Whether the output is a folder of PNGs."""
        output = Path(self.config.output)
        if self.config.output.endswith(("/", os.sep)):
            return True
        if output.suffix.lower() in FILES:
            return False
        if output.suffix and not output.is_dir():
            endings = f"use {', '.join(FILES)}, or end the name of a folder with /"
            raise UserError(f"--output {output}: unknown ending {output.suffix}: {endings}")
        return True

    @property
    def to_png(self) -> bool:
        """Whether PNGs are written, in a folder or one."""
        return self.to_folder or Path(self.config.output).suffix.lower() == ".png"

    def goals(self) -> dict[str, Path]:
        """File or folder of each thing asked for; where they are several, the name says which."""
        output = Path(self.config.output)
        if self.to_png or len(self.whats) == 1:
            return dict.fromkeys(self.whats, output)
        return {what: output.with_name(f"{output.stem}-{what}{output.suffix}") for what in self.whats}

    @contextmanager
    def writers(self) -> Iterator[dict[str, Writer]]:
        """Open writers; at the end their files get their names, after an error nothing is left under those."""
        with ExitStack() as locks, ExitStack() as stack:
            made: dict[str, Writer] = {}
            if self.world.is_main:
                self._check_pictures()
                self._lock(locks)
                self._check_goals()
                stack.callback(lambda: [writer.discard() for writer in made.values()])
                for what, goal in self.goals().items():
                    made[what] = self._writer(what, goal)
            self.world.barrier()
            if not self.world.is_main:
                made = {what: self._writer(what, goal) for what, goal in self.goals().items()}
                stack.callback(lambda: [writer.close() for writer in made.values()])
            yield made
            for writer in made.values():
                writer.close()
            self.world.barrier()  # wait for the others' last bands
            if self.world.is_main:
                for writer in made.values():
                    writer.finish()
                stack.pop_all()

    def _check_pictures(self) -> None:
        """Refuse what PNGs can't hold."""
        if self.to_png and "probability" in self.whats and self.config.dtype == "float32":
            raise UserError("--dtype float32: a PNG has no such type: write .tif, .npy or .zarr")
        files = [file for what in self.whats for file in self._pictures(what)]
        if self.to_png and not self.to_folder and len(files) > 1:
            raise UserError(
                f"--output {self.config.output} is one picture, {len(files)} are to be written: name a folder"
            )
        if self.to_png and len({*files}) < len(files):
            twice = next(file for file, num in Counter(files).items() if num > 1)
            raise UserError(f"--input: two images would become {twice}: rename one, or write a stack")

    def _lock(self, locks: ExitStack) -> None:
        """Keep other runs from writing the same files."""
        check_apart(self._written(), [frame.path for frame in self.frames])  # before a folder is made
        advice = "choose another --output"
        output = Path(self.config.output)
        if self.to_folder:
            locks.enter_context(locked(output, advice))
            return
        for goal in sorted({*self.goals().values()}):
            locks.enter_context(locked(goal.parent, advice, name=f".{goal.name}.lock"))

    def _written(self) -> list[Path]:
        """Files and folders that are written, replaced or removed."""
        if self.to_png:
            return [file for what in self.whats for file in self._pictures(what)]
        return [path for goal in self.goals().values() for path in written_at(goal)]

    def _check_goals(self) -> None:
        """Refuse to replace anything but older outputs, and keep in mind what is replaced."""
        if "cells" in self.whats and self.predictor.num_channel > 1:
            self._table()  # refuses to replace another file
        files = [file for what in self.whats for file in self._pictures(what)]
        for goal in {*self.goals().values()}:
            older = [file for file in (files if self.to_png else [goal]) if os.path.lexists(file)]
            for file in files if self.to_png else [goal]:
                check_replaceable(file)
            if older:
                self.replaced[goal] = f" (replaced {len(older)} older file(s))"

    def _pictures(self, what: str) -> list[Path]:
        """All PNGs of one thing."""
        channels = self.predictor.num_channel if what == "probability" else 1
        return [file for name in self._names(what) for file in png_files(name, channels)]

    def _names(self, what: str) -> list[Path]:
        """PNG of each frame."""
        output = Path(self.config.output)
        if not self.to_folder:
            return [output] * len(self.frames)
        num = Counter(frame.path for frame in self.frames)
        ending = f"-{what}" if len(self.whats) > 1 else ""
        numbers = [f"-{frame.index:04d}" if num[frame.path] > 1 else "" for frame in self.frames]
        return [output / f"{f.path.stem}{number}{ending}.png" for f, number in zip(self.frames, numbers, strict=True)]

    def _writer(self, what: str, goal: Path) -> Writer:
        if self.to_png:
            return PngWriter(self._names(what), [image.shape[0] for image in self.images])
        layout = self._layout(what, ORDER.get(goal.suffix.lower(), ""))
        if goal.suffix.lower() != ".zarr":
            return FlatWriter(goal, layout, self.world.is_main)
        tops = self._tops(what, 0)
        return ZarrWriter(goal, layout, self.world.is_main, tops[1] if len(tops) > 1 else layout.shape[2])

    def _layout(self, what: str, order: str) -> Layout:
        """What a file of one thing holds; all images must have one size."""
        sizes = {image.shape[:2]: str(frame) for image, frame in zip(self.images, self.frames, strict=True)}
        if len(sizes) > 1:
            (one, first), (other, second), *_ = sizes.items()
            raise UserError(f"{first} has {one} px, {second} {other}: one file can't hold both, name a folder")
        dtype = {"probability": self.config.dtype, "mask": "uint8", "cells": "uint32"}[what]
        channels = self.predictor.num_channel if what == "probability" else 1
        shape = (len(self.frames), channels, *self.images[0].shape[:2])
        return Layout(shape, np.dtype(dtype), read_geometry(self.frames), what != "probability", order)

    def bands(self, frame: int) -> Bands:
        """Bands of a frame."""
        return self.predictor.bands(self.images[frame], tta=self.config.tta, tile=self.config.tile)

    def _tops(self, what: str, frame: int) -> list[int]:
        """First rows of the bands in which one thing is made."""
        height, width = self.images[frame].shape[:2]
        if what == "cells":
            return list(range(0, height, TALL))
        return [tile.core.start for tile in self.predictor.tiles(height, width, self.config.tile)[0]]

    def results(self) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
        """Frame, first row and what is to be written of them, arrays (C, h, W), of all that this process does."""
        mine = self._units()
        if not self.world.is_main:
            yield from self._computed(mine)
            return
        cells = sum(len(self._tops("cells", frame)) for frame in {frame for frame, _ in mine} if "cells" in self.whats)
        with tqdm(total=len(mine) + cells, desc="segment", unit="band", disable=None) as bar:
            for result in self._computed(mine):
                yield result
                bar.update()

    @staticmethod
    def write(writers: dict[str, Writer], frame: int, top: int, outputs: dict[str, np.ndarray]) -> None:
        """Write some rows of each thing that is wanted of a frame."""
        for what, values in outputs.items():
            writers[what].write(frame, top, values)

    def _units(self) -> list[tuple[int, int]]:
        """Frames and bands that this process does: whole frames where objects are wanted, which reach over bands."""
        whole = "cells" in self.whats or self.to_png
        counts = [len(self._tops("probability", frame)) for frame in range(len(self.frames))]
        units = [[(frame, number) for number in range(count)] for frame, count in enumerate(counts)]
        groups = units if whole else [[unit] for part in units for unit in part]
        rank, size = self.world.rank, self.world.size
        mine = groups[rank * len(groups) // size : (rank + 1) * len(groups) // size]
        return [unit for group in mine for unit in group]

    def _computed(self, units: list[tuple[int, int]]) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
        for frame, group in groupby(units, key=lambda unit: unit[0]):
            try:
                for top, outputs in self._frame(frame, [number for _, number in group]):
                    yield frame, top, outputs
            except UserError as error:
                text = str(error)
                named = any(name in text for name in (str(self.frames[frame].path), self.config.output))
                raise UserError(text if named else f"{self.frames[frame]}: {text}") from error

    def _frame(self, frame: int, numbers: list[int]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """First row and outputs of some bands of a frame; objects, which need all of them, come last."""
        bands, predictor = self.bands(frame), self.predictor
        with ExitStack() as stack:
            kept = stack.enter_context(RowFile(Path(self.config.output))) if "cells" in self.whats else None

            def outputs(computed: tuple[int, np.ndarray]) -> tuple[int, dict[str, np.ndarray]]:
                number, band = computed
                if kept is not None:
                    kept.append(_object_rows(band, predictor))
                return bands.rows[number].core.start, _pixel_outputs(band, self.whats, predictor, self.config.dtype)

            yield from map(outputs, bands.compute(numbers))
            if kept is not None:
                yield from self._objects(frame, kept)

    def _objects(self, frame: int, kept: RowFile) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """First row and objects (1, h, W) of the bands of a frame; what class and area each has is noted."""
        width, empty = self.images[frame].shape[1], self.predictor.background
        several = self.predictor.num_channel > 1
        kinds = _Columns(kept, slice(width, None), np.uint8) if several else None
        classes, areas = np.zeros(1, np.int64), np.zeros(1, np.int64)
        probability = _Columns(kept, slice(width))
        for top, objects in separate_bands(probability, self.predictor.object_threshold, kinds=kinds):
            yield top, {"cells": objects[None]}
            counts = np.bincount(objects.ravel(), minlength=len(areas))
            areas = np.pad(areas, (0, len(counts) - len(areas))) + counts
            classes = np.pad(classes, (0, len(counts) - len(classes)))
            own = kinds[top : top + len(objects)].astype(np.int64) - 1 if several else 1 - empty
            classes[objects] = own
        self.found.append((frame, classes[1:], areas[1:]))

    def report_objects(self, found: list[tuple[int, np.ndarray, np.ndarray]]) -> None:
        """Say how many objects each class has, and with several classes write which object is of which."""
        info, num = self.predictor.info, self.predictor.info.num_class
        counts = sum((np.bincount(classes, minlength=num) for _, classes, _ in found), np.zeros(num, int))
        names = [(k, name) for k, name in enumerate(info.class_names) if k != self.predictor.background]
        text = ", ".join(f"{counts[k]} of {name}" for k, name in names)
        say(f"objects: {text}; background is {info.class_names[self.predictor.background]}")
        if num == 2:
            return
        with atomic_write(self._table(), "w") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(TABLE)
            for frame, classes, areas in sorted(found, key=lambda row: row[0]):
                for number, (index, area) in enumerate(zip(classes.tolist(), areas.tolist(), strict=True), 1):
                    table.writerow([self.frames[frame], number, info.class_names[index], area])

    def _table(self) -> Path:
        """File beside the objects that says which class each is of."""
        goal = self.goals()["cells"]
        path = goal / "cells.csv" if self.to_folder else goal.with_suffix(".csv")
        if path.exists() and not path.read_text("utf-8", "replace").startswith(",".join(TABLE)):
            raise UserError(f"{path}: no table of objects, so it is not replaced: move it, or choose another --output")
        return path


def _object_rows(band: np.ndarray, predictor: Predictor) -> np.ndarray:
    """What objects are made of, rows (h, W) of a probability (K, h, W), or (h, 2 W) with the class beside."""
    if predictor.num_channel == 1:
        return band[0] if predictor.background == 0 else 1 - band[0]
    kinds = foreground_kinds(band.argmax(0), predictor.background)
    return np.concatenate([band.max(0), kinds.astype(np.float32)], axis=1)


class _Columns:
    """Some columns of rows that are kept on the disk."""

    def __init__(self, rows: RowFile, columns: slice, dtype: type = np.float32) -> None:
        self.rows, self.columns, self.dtype = rows, columns, dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, w) of a slice."""
        return self.rows[rows][:, self.columns].astype(self.dtype, copy=False)
