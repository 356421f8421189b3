"""The output files of a prediction: their names, and the checks and locks before they are written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from config import OF_OBJECTS
from images.geometry import numbers_along
from images.output_paths import check_apart, check_replaceable, written_at
from images.readers import Frame, read_geometry
from images.writers import TIFF, is_predicted, png_files
from locks import locked
from prediction.rois import Position, is_roi_file, position_of
from utils import FlagError, UserError

SUFFIXES = (".tif", ".tiff", ".npy", ".zarr", ".png")
ENDINGS = {"table": ".csv", "rois": ".zip"}  # of the outputs that are no images
# first columns of a table; the last are those of earlier versions
TABLE_BEGINS = ("image,section,object,", "image,section,stack,object,", "image,object,class,area_px")


@dataclass(frozen=True)
class OutputFiles:
    """Files and folders that one prediction writes.

    Attributes
    ----------
    target : str
        `--output`: a file, or a folder for PNGs.
    outputs : list of str
        Outputs to write, of `WHAT` in config.py.
    frames : list of Frame
        Images to segment.
    num_channel : int
        Number of channels of the probability.
    folders : list of Path
        Folders that the images were read from; what is written there would be an input of the next run.
    """

    target: str
    outputs: list[str]
    frames: list[Frame]
    num_channel: int
    folders: list[Path]

    @cached_property
    def to_folder(self) -> bool:
        """Whether the target is a folder of PNGs."""
        path = Path(self.target)
        if self.target.endswith(("/", os.sep)):
            return True
        if path.suffix.lower() in (*SUFFIXES, *ENDINGS.values()):
            return False
        if path.suffix and not path.is_dir():
            advice = f"use {', '.join(SUFFIXES)}, or end the name of a folder with /"
            raise UserError(f"--output {self.target}: unknown ending {path.suffix}: {advice}")
        return True

    @cached_property
    def by_path(self) -> dict[Path, list[Frame]]:
        """Frames of each input file."""
        found: dict[Path, list[Frame]] = {}
        for frame in self.frames:
            found.setdefault(frame.path, []).append(frame)
        return found

    @property
    def to_png(self) -> bool:
        """Whether one PNG or a folder of PNGs is written."""
        return self.to_folder or Path(self.target).suffix.lower() == ".png"

    @property
    def images(self) -> list[str]:
        """Outputs that are written as images."""
        return [output for output in self.outputs if output not in ENDINGS]

    @property
    def has_objects(self) -> bool:
        """Whether an output needs objects."""
        return not {*OF_OBJECTS}.isdisjoint(self.outputs)

    @cached_property
    def paths(self) -> dict[str, Path]:
        """File of each image, or the folder of the PNGs."""
        return {output: Path(self.target) if self.to_folder else self._file(output) for output in self.images}

    def _file(self, output: str) -> Path:
        """File of one output; several files are named after their outputs."""
        path = Path(self.target)
        is_ome = path.suffix.lower() in TIFF and path.stem.lower().endswith(".ome")
        stem, suffix = (path.stem[:-4], path.stem[-4:] + path.suffix) if is_ome else (path.stem, path.suffix)
        ending = ENDINGS.get(output, suffix)
        if output == "overlay" and not self.to_png:
            ending = suffix if path.suffix.lower() in TIFF else ".tif"  # colours, which an array has not
        if len(self.outputs) == 1 or path.suffix.lower() == ".png":
            return path.with_name(stem + ending)
        return path.with_name(f"{stem}-{output}{ending}")

    @cached_property
    def png_names(self) -> dict[str, list[Path]]:
        """PNG of each frame for each output; with several channels, see `png_files`."""
        if not self.to_folder:
            return {output: [self.paths[output]] * len(self.frames) for output in self.images}
        num = Counter((frame.path, frame.series) for frame in self.frames)
        stems = [
            frame.name + (f"-{_place(frame):04d}" if num[frame.path, frame.series] > 1 else "") for frame in self.frames
        ]
        endings = {output: f"-{output}.png" if len(self.outputs) > 1 else ".png" for output in self.images}
        return {output: [Path(self.target, stem + endings[output]) for stem in stems] for output in self.images}

    @property
    def table(self) -> Path | None:
        """Table of the objects, also next to the cells of several classes."""
        if "table" in self.outputs:
            return Path(self.target, "table.csv") if self.to_folder else self._file("table")
        if "cells" not in self.outputs or self.num_channel == 1:
            return None
        path = self.paths["cells"]
        return path / "cells.csv" if self.to_folder else path.with_suffix(".csv")

    @cached_property
    def roi_files(self) -> dict[Path, list[int]]:
        """The .zip files of outlines with the numbers of their frames: one, or in a folder one per input file."""
        files: dict[Path, list[int]] = {}
        if "rois" in self.outputs:
            ending = "-rois.zip" if len(self.outputs) > 1 else ".zip"
            for number, frame in enumerate(self.frames):
                path = Path(self.target, frame.name + ending) if self.to_folder else self._file("rois")
                files.setdefault(path, []).append(number)
        return files

    @cached_property
    def _counts_in_input(self) -> bool:
        """Whether sections are those of the input: where no stack is written that could be opened instead."""
        if self.to_folder or self.images:
            return self.to_folder
        return len(self.by_path) == 1 and len({frame.series_number for frame in self.frames}) == 1

    @cached_property
    def _written_axes(self) -> tuple[str, tuple[int, ...]]:
        """Axes of the stack that is written, and their lengths."""
        geometry = read_geometry(self.frames)
        return geometry.axes, geometry.lengths

    def section(self, number: int) -> int:
        """Number of a frame, from 1, in the stack that is written, or in its own file."""
        return (_place(self.frames[number]) if self._counts_in_input else number) + 1

    def position(self, number: int) -> Position:
        """Position of a frame's ROIs in the stack that is written, or in its own file or series."""
        if self._counts_in_input:
            return position_of(self.section(number), self.frames[number].numbers)
        return position_of(number + 1, numbers_along(*self._written_axes, number))

    def channels(self, output: str) -> int:
        """Channels of one output."""
        return self.num_channel if output == "probability" else 1

    @cached_property
    def _pngs(self) -> list[Path]:
        """All PNGs, of each output, frame and channel."""
        names = self.png_names.items()
        return [png for output, pngs in names for name in pngs for png in png_files(name, self.channels(output))]

    @contextmanager
    def reserved(self, dtype: str, compression: str) -> Iterator[dict[Path, int]]:
        """Check all files, and lock them against other runs; yields the number of older files at each path.

        Raises
        ------
        UserError
            The files can't hold the outputs or be compressed, another run writes them, or they would replace an input
            or a foreign file.
        """
        self._check_endings(dtype)
        is_tiff = [path.suffix.lower() in TIFF for path in self.paths.values()]
        if compression != "auto" and (self.to_png or not any(is_tiff)):
            raise FlagError(f"--compression {compression}: applies to TIFFs: leave it out, or write .tif")
        tables = [self.table] if self.table else []
        check_apart(self._written(tables), [*self.folders, *(frame.path for frame in self.frames)])  # no folder yet
        advice = "choose another --output"
        files = [*dict.fromkeys([*self.paths.values(), *tables, *self.roi_files])]
        with ExitStack() as locks:
            if self.to_folder:
                locks.enter_context(locked(Path(self.target), advice))
            else:
                for path in sorted(files):
                    locks.enter_context(locked(path.parent, advice, name=f".{path.name}.lock"))
            self._check_foreign(tables)
            older = {path: self._count_older(path) for path in files}
            yield {Path(self.target): sum(older.values())} if self.to_folder else older

    def _written(self, tables: list[Path]) -> list[Path]:
        """All paths that are written."""
        files = [*tables, *self.roi_files, *([] if self.to_png else self.paths.values())]
        return [*(self._pngs if self.to_png else []), *(part for path in files for part in written_at(path))]

    def _check_endings(self, dtype: str) -> None:
        """Refuse outputs that a file of this kind can't hold."""
        ending = Path(self.target).suffix.lower()
        if not self.to_folder and ending in ENDINGS.values():
            held = [output for output in self.outputs if ENDINGS.get(output) == ending]
            other = [output for output in self.outputs if output in self.images or not held]
            if other:
                raise UserError(f"--output {self.target} can't hold {other[0]}: name another file, or a folder")
        if self.outputs == ["overlay"] and self.paths["overlay"] != Path(self.target):
            raise UserError(f"--output {self.target} can't hold overlay, a picture in colours: name a .tif or .png")
        if self.to_png:
            self._check_pngs(dtype)
        for path, numbers in self.roi_files.items():
            if self.to_folder and len({self.frames[number].path for number in numbers}) > 1:
                raise UserError(f"--input: the outlines of two images would become {path}: rename one")

    def _check_pngs(self, dtype: str) -> None:
        """Refuse outputs that PNGs can't hold."""
        if "probability" in self.outputs and dtype != "uint8":
            raise UserError(f"--dtype {dtype}: a PNG has no such type: write .tif, .npy or .zarr")
        num = len(self._pngs)
        if not self.to_folder and num > 1:
            raise UserError(f"--output {self.target} is one picture, but {num} will be written: name a folder")
        twice = [png for png, count in Counter(self._pngs).items() if count > 1]
        if twice:
            raise UserError(f"--input: two images would become {twice[0]}: rename one, or write a stack")

    def _check_foreign(self, tables: list[Path]) -> None:
        """Refuse to replace a table, a .zip of outlines or, in a folder, a PNG that predict did not write."""
        advice = "and not replaced: move it, or choose another --output"
        for path in tables:
            check_replaceable(path)
            if path.exists() and not path.read_text("utf-8", "replace").startswith(TABLE_BEGINS):
                raise UserError(f"{path}: not a table of objects, {advice}")
        for path in self.roi_files:
            check_replaceable(path)
            if path.exists() and not is_roi_file(path):
                raise UserError(f"{path}: not a .zip of ROIs of predict only, {advice}")
        for path in self._pngs if self.to_folder else []:
            check_replaceable(path)
            if path.exists() and not is_predicted(path):
                raise UserError(f"{path}: not a PNG of predict, or one of an earlier version, {advice}")

    def _count_older(self, path: Path) -> int:
        """Number of older files at a path; refuses to replace anything but older outputs."""
        files = self._pngs if self.to_png and path in self.paths.values() else [path]
        older = sum(os.path.lexists(file) for file in files)
        for file in files:
            check_replaceable(file)
        return older


def _place(frame: Frame) -> int:
    """Index of a frame in its series, or in its file if that has one series."""
    return frame.index_in_series if frame.series else frame.index
