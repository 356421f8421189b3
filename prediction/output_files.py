"""The output files of a prediction: their names, and the checks and locks before they are written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from files import locked
from images.frames import Frame
from images.outputs import check_apart, check_replaceable, written_at
from images.writers import png_files
from utils import UserError

SUFFIXES = (".tif", ".tiff", ".npy", ".zarr", ".png")
TABLE_COLUMNS = ("image", "object", "class", "area_px")


@dataclass(frozen=True)
class OutputFiles:
    """Files and folders that one prediction writes.

    Attributes
    ----------
    target : str
        `--output`: a file, or a folder for PNGs.
    outputs : list of str
        Outputs to write, of "probability", "mask" and "cells".
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
        if path.suffix.lower() in SUFFIXES:
            return False
        if path.suffix and not path.is_dir():
            advice = f"use {', '.join(SUFFIXES)}, or end the name of a folder with /"
            raise UserError(f"--output {self.target}: unknown ending {path.suffix}: {advice}")
        return True

    @property
    def to_png(self) -> bool:
        """Whether one PNG or a folder of PNGs is written."""
        return self.to_folder or Path(self.target).suffix.lower() == ".png"

    @cached_property
    def paths(self) -> dict[str, Path]:
        """File or folder of each output; several files are named after their outputs."""
        path = Path(self.target)
        if self.to_png or len(self.outputs) == 1:
            return dict.fromkeys(self.outputs, path)
        return {output: path.with_name(f"{path.stem}-{output}{path.suffix}") for output in self.outputs}

    @cached_property
    def png_names(self) -> dict[str, list[Path]]:
        """PNG of each frame for each output; with several channels, see `png_files`."""
        if not self.to_folder:
            return {output: [Path(self.target)] * len(self.frames) for output in self.outputs}
        num = Counter((frame.path, frame.series) for frame in self.frames)
        numbers = [f.place[1] if f.series else f.index for f in self.frames]
        stems = [
            f.name + (f"-{number:04d}" if num[f.path, f.series] > 1 else "")
            for f, number in zip(self.frames, numbers, strict=True)
        ]
        endings = {output: f"-{output}.png" if len(self.outputs) > 1 else ".png" for output in self.outputs}
        return {output: [Path(self.target, stem + endings[output]) for stem in stems] for output in self.outputs}

    @property
    def table(self) -> Path | None:
        """Table with the class and area of each object, if there are several classes."""
        if "cells" not in self.outputs or self.num_channel == 1:
            return None
        path = self.paths["cells"]
        return path / "cells.csv" if self.to_folder else path.with_suffix(".csv")

    def channels(self, output: str) -> int:
        """Channels of one output."""
        return self.num_channel if output == "probability" else 1

    @cached_property
    def _pngs(self) -> list[Path]:
        """All PNGs, of each output, frame and channel."""
        names = self.png_names.items()
        return [png for output, pngs in names for name in pngs for png in png_files(name, self.channels(output))]

    @contextmanager
    def reserved(self, dtype: str) -> Iterator[dict[Path, int]]:
        """Check all files, and lock them against other runs; yields the number of older files at each path.

        Raises
        ------
        UserError
            PNGs can't hold the output, another run writes it, or it would replace an input or a foreign file.
        """
        if self.to_png:
            self._check_pngs(dtype)
        written = self._pngs if self.to_png else [part for path in self.paths.values() for part in written_at(path)]
        check_apart(written, [*self.folders, *(frame.path for frame in self.frames)])  # before a folder is made
        advice = "choose another --output"
        with ExitStack() as locks:
            if self.to_folder:
                locks.enter_context(locked(Path(self.target), advice))
            else:
                for path in sorted({*self.paths.values()}):
                    locks.enter_context(locked(path.parent, advice, name=f".{path.name}.lock"))
            self._check_table()
            yield {path: self._count_older(path) for path in dict.fromkeys(self.paths.values())}

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

    def _check_table(self) -> None:
        """Refuse to replace a file that is not a table of objects."""
        path = self.table
        if path and path.exists() and not path.read_text("utf-8", "replace").startswith(",".join(TABLE_COLUMNS)):
            raise UserError(f"{path}: not a table of objects, and not replaced: move it, or choose another --output")

    def _count_older(self, path: Path) -> int:
        """Number of older files at a path; refuses to replace anything but older outputs."""
        files = self._pngs if self.to_png else [path]
        older = sum(os.path.lexists(file) for file in files)
        for file in files:
            check_replaceable(file)
        return older
