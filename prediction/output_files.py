"""The output files of a prediction: their names, and the checks and locks before they are written."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from images.geometry import Geometry, numbers_along
from images.output_paths import check_apart, check_replaceable, written_at
from images.readers import Frame, read_geometry
from images.writers import PREDICTED, TIFF, is_predicted, png_files
from locks import locked
from prediction.outputs import OUTPUTS, Cells, Labels, Output, Rois, Table
from prediction.rois import RoiPlane, is_roi_file, position_of
from utils import FlagError, UserError

SUFFIXES = (".tif", ".tiff", ".npy", ".zarr", ".png")
PNG_TYPES = ("uint8", "uint16", "uint32")  # numbers of objects in 32 bits are written in 16
MAX_PNG = 2**22  # [px] of a label image as PNG; a larger one may number more objects than 16 bits do
ENDINGS = [output.ending for output in OUTPUTS.values() if output.ending]
# first columns of the tables; the last one is of earlier versions
TABLE_BEGINS = (
    "image,section,object,",
    "image,section,stack,object,",
    "image,section,count,",
    "image,object,first_section,",
    "image,object,class,area_px",
)


def _is_table(path: Path) -> bool:
    return path.read_text("utf-8", "replace").startswith(TABLE_BEGINS)


def _is_page(path: Path) -> bool:
    return PREDICTED in path.read_text("utf-8", "replace")[:1000]


OURS = {  # how files of predict are told from others of the same ending
    ".csv": (_is_table, "a table of objects"),
    ".zip": (is_roi_file, "a .zip of ROIs of predict only"),
    ".html": (_is_page, "a page of predict"),
    ".png": (is_predicted, "a PNG of predict, or one of an earlier version"),
    ".tif": (is_predicted, "a TIFF of predict"),
}


@dataclass(frozen=True)
class OutputFiles:
    """Files and folders that one prediction writes."""

    target: str  # `--output`: a file, or a folder for PNGs
    outputs: dict[str, Output]  # by name
    frames: list[Frame]  # images to segment
    has_page: bool  # whether a folder gets an index.html
    folders: list[Path]  # that the images were read from; what is written there would be an input of the next run

    @cached_property
    def to_folder(self) -> bool:
        """Whether the target is a folder of PNGs."""
        path = Path(self.target)
        if self.target.endswith(("/", os.sep)):
            return True
        if path.suffix.lower() in (*SUFFIXES, *ENDINGS):
            return False
        if path.suffix and not path.is_dir():
            advice = f"use {', '.join(SUFFIXES)}, or end the name of a folder with /"
            raise UserError(f"--output {self.target}: unknown ending {path.suffix}: {advice}")
        return True

    @property
    def to_png(self) -> bool:
        """Whether one PNG or a folder of PNGs is written."""
        return self.to_folder or Path(self.target).suffix.lower() == ".png"

    @property
    def has_objects(self) -> bool:
        """Whether an output needs objects."""
        return any(output.of_objects for output in self.outputs.values())

    @cached_property
    def paths(self) -> dict[str, Path]:
        """File of each picture, or the folder of the PNGs."""
        pictures = [
            output
            for output in self.outputs.values()
            if not (output.ending or (self.to_folder and isinstance(output, Labels)))
        ]
        return {output.name: Path(self.target) if self.to_folder else self._file(output) for output in pictures}

    def _file(self, output: Output) -> Path:
        """File of one output."""
        path = Path(self.target)
        is_ome = path.suffix.lower() in TIFF and path.stem.lower().endswith(".ome")
        stem, suffix = (path.stem[:-4], path.stem[-4:] + path.suffix) if is_ome else (path.stem, path.suffix)
        if path.suffix.lower() == ".png":
            return path.with_name(stem + (output.ending or suffix))
        if output.is_rgb and path.suffix.lower() not in TIFF:
            suffix = ".tif"  # an array has no colours
        return path.with_name(self._name(stem, output, suffix))

    def _name(self, stem: str, output: Output, suffix: str) -> str:
        """Name of a file; several are named after their outputs."""
        is_only = sum(not other.is_extra for other in self.outputs.values()) == 1
        return f"{stem}{'' if is_only else f'-{output.name}'}{output.ending or suffix}"

    @cached_property
    def png_names(self) -> dict[str, list[Path]]:
        """PNG of each frame for each output; with several channels, see `png_files`."""
        if not self.to_folder:
            return {name: [path] * len(self.frames) for name, path in self.paths.items()}
        num = Counter((frame.path, frame.series) for frame in self.frames)
        stems = [
            frame.name + (f"-{_index(frame):04d}" if num[frame.path, frame.series] > 1 else "") for frame in self.frames
        ]
        return {
            name: [Path(self.target, self._name(stem, self.outputs[name], ".png")) for stem in stems]
            for name in self.paths
        }

    @property
    def page(self) -> Path | None:
        """Page of the images in a folder."""
        return Path(self.target, "index.html") if self.to_folder and self.has_page else None

    @cached_property
    def tables(self) -> dict[str, Path]:
        """Table of the objects, and those beside it, by their names in object_table.py."""
        table = self.outputs.get(Table.name)
        if not isinstance(table, Table):
            return {}
        if self.to_folder:
            names = {Table.name: "cells" if table.is_extra else Table.name} | {name: name for name in table.more}
            return {name: Path(self.target, f"{stem}.csv") for name, stem in names.items()}
        path = self.paths[Cells.name].with_suffix(".csv") if table.is_extra else self._file(table)
        stem = path.stem.removesuffix(f"-{Table.name}")
        return {Table.name: path} | {name: path.with_name(f"{stem}-{name}.csv") for name in table.more}

    @cached_property
    def roi_files(self) -> list[Path]:
        """The .zip file for the outlines of each frame: one for all, or in a folder one per input file."""
        rois = self.outputs.get(Rois.name)
        if rois is None:
            return []
        if self.to_folder:
            return [Path(self.target, self._name(frame.name, rois, "")) for frame in self.frames]
        return [self._file(rois)] * len(self.frames)

    @cached_property
    def label_files(self) -> list[Path]:
        """In a folder the label image for each frame: one per input file, of its name, which `--add` pairs it by."""
        labels = self.outputs.get(Labels.name)
        if labels is None or not self.to_folder:
            return []
        num = Counter(frame.path for frame in self.frames)
        is_png = labels.dtype in PNG_TYPES
        sizes = {path: math.prod(frame.open().shape[:2]) for path, frame in {f.path: f for f in self.frames}.items()}
        endings = {path: ".png" if is_png and num[path] == 1 and sizes[path] <= MAX_PNG else ".tif" for path in num}
        return [Path(self.target, labels.name, frame.path.stem + endings[frame.path]) for frame in self.frames]

    @cached_property
    def _counts_in_input(self) -> bool:
        """Whether sections are those of the input: where no stack is written that could be opened instead."""
        if self.to_folder or self.paths:
            return self.to_folder
        return len({(frame.path, frame.series_number) for frame in self.frames}) == 1

    @cached_property
    def _geometry(self) -> Geometry:
        """Axes of the stack that is written."""
        return read_geometry(self.frames)

    def section(self, number: int) -> int:
        """Number of a frame, from 1, in the stack that is written, or in its own file."""
        return (_index(self.frames[number]) if self._counts_in_input else number) + 1

    def roi_planes(self) -> list[RoiPlane]:
        """Where the outlines of each frame go: planes of the stack that is written, or of its own file or series."""
        planes = []
        for number, path in enumerate(self.roi_files):
            if self._counts_in_input:
                numbers = self.frames[number].numbers
            else:
                numbers = numbers_along(self._geometry.axes, self._geometry.lengths, number)
            section = self.section(number)
            planes.append(RoiPlane(path, section, position_of(section, numbers)))
        return planes

    @cached_property
    def _pngs(self) -> list[Path]:
        """All PNGs, of each output, frame and channel."""
        if not self.to_png:
            return []
        channels = {name: self.outputs[name].num_channel for name in self.paths}
        return [
            png for name, files in self.png_names.items() for file in files for png in png_files(file, channels[name])
        ]

    @contextmanager
    def reserved(self, compression: str) -> Iterator[dict[Path, int]]:
        """Check all files, and lock them against other runs; yields the number of older files at each path."""
        self._check_endings()
        is_tiff = [path.suffix.lower() in TIFF for path in self.paths.values()]
        if compression != "auto" and (self.to_png or not any(is_tiff)):
            raise FlagError(f"--compression {compression}: applies to TIFFs: leave it out, or write .tif")
        more = [*self.tables.values(), *filter(None, [self.page])]
        others = [*dict.fromkeys([*more, *self.roi_files, *self.label_files])]
        files = [*dict.fromkeys(self.paths.values()), *others]
        written = [part for path in (others if self.to_png else files) for part in written_at(path)]
        inputs = [*self.folders, *(frame.path for frame in self.frames)]
        check_apart([*self._pngs, *written], inputs)  # before a folder is made
        advice = "choose another --output"
        with ExitStack() as locks:
            if self.to_folder:
                locks.enter_context(locked(Path(self.target), advice))
            else:
                for path in sorted(files):
                    locks.enter_context(locked(path.parent, advice, name=f".{path.name}.lock"))
            older = {path: self._count_older(path) for path in files}
            yield {Path(self.target): sum(older.values())} if self.to_folder else older

    def _check_endings(self) -> None:
        """Refuse outputs that a file of this kind can't hold, and two with one name."""
        outputs, target = [*self.outputs.values()], f"--output {self.target}"
        ending = "" if self.to_folder else Path(self.target).suffix.lower()
        is_held = any(output.ending == ending for output in outputs)
        for output in outputs if ending in ENDINGS else []:
            if not (output.ending and is_held):
                raise UserError(f"{target} can't hold {output.name}: name another file, or a folder")
        is_named = self.to_folder or self.paths.get(outputs[0].name) == Path(self.target)
        if len(outputs) == 1 and outputs[0].is_rgb and not is_named:
            what = f"{outputs[0].name}, a picture in colours"
            raise UserError(f"{target} can't hold {what}: name a .tif or .png")
        for name in self.paths if self.to_png else ():
            if self.outputs[name].dtype not in PNG_TYPES:
                what = f"--what {name}" if name == Labels.name else f"--dtype {self.outputs[name].dtype}"
                raise UserError(f"{what}: a PNG has no such type: write .tif, .npy or .zarr")
        num = len(self._pngs)
        if not self.to_folder and num > 1:
            raise UserError(f"{target} is one picture, but {num} will be written: name a folder")
        for what, paths in (
            ("two images", self._pngs),
            ("the outlines of two images", self._of_sources(self.roi_files)),
            ("the labels of two images", self._of_sources([path.with_suffix("") for path in self.label_files])),
        ):
            if twice := [path for path, count in Counter(paths).items() if count > 1]:
                advice = "rename one, or write a stack" if paths is self._pngs else "rename one"
                raise UserError(f"--input: {what} would become {twice[0]}: {advice}")

    def _of_sources(self, files: list[Path]) -> list[Path]:
        """File of each input file in a folder, where `files` has it for each frame."""
        sources = dict.fromkeys(zip(files, (frame.path for frame in self.frames), strict=False))
        return [path for path, _ in sources] if self.to_folder else []

    def _count_older(self, path: Path) -> int:
        """Number of older files at a path; refuses to replace what predict did not write."""
        older = 0
        for file in self._pngs if self.to_png and path in self.paths.values() else [path]:
            check_replaceable(file)
            older += os.path.lexists(file)
            is_ours, what = OURS.get(file.suffix, (None, ""))
            is_named = file == Path(self.target) and file.suffix == ".png"  # one picture is replaced like a stack
            is_named |= file.suffix == ".tif" and file not in self.label_files  # those of earlier versions have no mark
            if is_ours and not is_named and file.exists() and not is_ours(file):
                raise UserError(f"{file}: not {what}, and not replaced: move it, or choose another --output")
        return older


def _index(frame: Frame) -> int:
    """Index of a frame in its series, or in its file if that has one series."""
    return frame.index_in_series if frame.series else frame.index
