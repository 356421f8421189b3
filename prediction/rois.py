"""Outlines of the objects of an image as polygons for Fiji's ROI Manager, computed band by band."""

from __future__ import annotations

import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from files import explain_write_errors, make_folder, partial_of, publish
from images.writers import Writer
from prediction.measure import Runs, join_runs, runs_of
from utils import check_module

LARGEST = 2**24  # [px] box of the largest object that is outlined, which takes 0.3 GB
NAME = re.compile(r"[0-9]{4,}-[0-9]{6,}\.roi")  # section and object; those drawn in Fiji are 0012-0345.roi


class Position(NamedTuple):
    """Plane of an ROI as ImageJ counts, from 1; all 0: it is shown in every plane."""

    section: int = 0  # in a stack along one axis
    z: int = 0  # in a hyperstack along Z and T; the ROI is shown in all channels of the plane
    t: int = 0


def position_of(section: int, numbers: dict[str, int]) -> Position:
    """Position of a section, from its number along each axis of its stack.

    ImageJ shows T and Z as a hyperstack, where it takes the number of a section for one along Z. In a stack along T
    alone it ignores numbers along T. The other way round fails in both.

    >>> position_of(5, {"T": 2, "Z": 2}), position_of(2, {"T": 2}), position_of(1, {})
    (Position(section=0, z=2, t=2), Position(section=2, z=0, t=0), Position(section=0, z=0, t=0))
    """
    if numbers.keys() == {"T", "Z"}:
        return Position(z=numbers["Z"], t=numbers["T"])
    return Position(section if numbers else 0)


class ObjectOutlines:
    """Outlines of the objects of an image; only the runs of objects that may go on in the next band are stored."""

    def __init__(self) -> None:
        self.too_large: set[int] = set()  # objects that are left out, since their box has more than `LARGEST` pixels
        self._done: set[int] = set()
        self._runs: list[Runs] = []

    def add(self, top: int, objects: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Add the objects (h, W) of the next band; yields the number and outline (N, 2) of those that are complete."""
        self._runs.append(runs_of(objects, top))
        yield from self._complete(np.unique(objects[-1]))

    def finish(self) -> Iterator[tuple[int, np.ndarray]]:
        """Outlines of the remaining objects."""
        yield from self._complete(np.zeros(0, np.int64))

    def _complete(self, open_objects: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Outlines of all objects that are not open; one that was cut in two has that of its first piece."""
        runs = join_runs(self._runs)
        for number, part in runs.by_object():
            box = runs[part]
            if int(np.ptp(box.rows) + 1) * int(box.last.max() - box.first.min() + 1) > LARGEST:
                self.too_large.add(number)
        is_open = np.isin(runs.objects, open_objects)
        is_left_out = np.isin(runs.objects, [*self.too_large, *self._done])
        self._runs = [runs[is_open & ~is_left_out]]
        complete = runs[~is_open & ~is_left_out]
        for number, part in complete.by_object():
            self._done.add(number)
            yield number, outline_of(complete[part])


def outline_of(runs: Runs) -> np.ndarray:
    """Outer outline (N, 2) of the largest piece of an object, as (x, y) [px]; pixel (0, 0) extends from 0 to 1.

    The outline runs halfway between the pixels inside and outside, so that the pixels in it are those of the object,
    apart from holes.

    >>> outline_of(runs_of(np.array([[0, 1, 0]]), top=4)).tolist()
    [[1.5, 5.0], [1.0, 4.5], [1.5, 4.0], [2.0, 4.5]]
    """
    from skimage.measure import find_contours

    top, left = int(runs.rows.min()) - 1, int(runs.first.min()) - 1
    changes = np.zeros((int(runs.rows.max()) - top + 2, int(runs.last.max()) - left + 3), np.int8)  # with a border of 0
    changes[runs.rows - top, runs.first - left] = 1
    np.add.at(changes, (runs.rows - top, runs.last - left + 1), -1)
    mask = np.cumsum(changes, axis=1, dtype=np.int8)[:, :-1]
    outline = max(find_contours(mask, 0.5), key=_enclosed)
    steps = np.diff(outline[np.r_[-2, 0 : len(outline)]], axis=0)  # to each point but the last one, and from it
    turns = steps[:-1, 0] * steps[1:, 1] != steps[:-1, 1] * steps[1:, 0]  # else a point on a straight line
    return outline[:-1][turns][:, ::-1] + (left + 0.5, top + 0.5)


def _enclosed(outline: np.ndarray) -> float:
    """Area [px²] within a closed outline (N, 2)."""
    y, x = outline.T
    return abs(float(np.sum(y[:-1] * x[1:] - y[1:] * x[:-1]))) / 2


def is_roi_file(path: Path) -> bool:
    """Whether a file is a .zip of a `RoiWriter`; one with outlines that were drawn by hand is not."""
    try:
        with zipfile.ZipFile(path) as file:
            return all(NAME.fullmatch(name) for name in file.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


class RoiPlane(NamedTuple):
    """Where the outlines of a frame go."""

    path: Path  # of the .zip file
    section: int  # in the names of its ROIs
    position: Position


class RoiWriter(Writer):
    """Writes outlines into one or several .zip files for Fiji's ROI Manager; each appears when it is complete.

    Each process stores its outlines in a temporary file. At the end they are added to the .zip files by one process
    after the other.
    """

    def __init__(self, planes: list[RoiPlane]) -> None:
        check_module("roifile", "--what rois")
        self.planes, self.paths = planes, [*dict.fromkeys(plane.path for plane in planes)]
        with explain_write_errors(self.paths[0]):
            make_folder(self.paths[0].parent)
            self._stored = tempfile.TemporaryFile(dir=self.paths[0].parent)  # noqa: SIM115

    def write(self, frame: int, _top: int, band: Any) -> None:
        """Store the number and outline (N, 2), as (x, y) [px], of some objects of a frame."""
        from roifile import ROI_TYPE, ImagejRoi

        path, section, position = self.planes[frame]
        for number, outline in band:
            roi = ImagejRoi.frompoints(outline.astype(np.float32), name=f"{section:04d}-{number:06d}")
            roi.roitype = ROI_TYPE.POLYGON
            roi.position, roi.z_position, roi.t_position = position
            with explain_write_errors(path):
                pickle.dump((path, roi.name, roi.tobytes()), self._stored)

    def append(self, create: bool) -> None:
        """Add the outlines of this process to the partial .zip files, which the first process creates."""
        if create:
            for path in self.paths:
                with explain_write_errors(path):
                    partial_of(path).unlink(missing_ok=True)  # from a killed process, or a link, which is not followed
                    with zipfile.ZipFile(partial_of(path), "x"):
                        pass
        with explain_write_errors(self.paths[0]):
            self._stored.seek(0)  # writes what is buffered
        for path, rois in groupby(self._read(), key=itemgetter(0)):
            with explain_write_errors(path), zipfile.ZipFile(partial_of(path), "a", zipfile.ZIP_DEFLATED) as file:
                for _, name, content in rois:
                    entry = zipfile.ZipInfo(f"{name}.roi")  # without the time, so that equal runs write equal files
                    entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
                    file.writestr(entry, content)

    def _read(self) -> Iterator[tuple[Path, str, bytes]]:
        """The .zip file, name and content of each ROI that this process has stored."""
        with suppress(EOFError):
            while True:
                yield pickle.load(self._stored)  # a nameless file that this process wrote

    def finish(self) -> None:
        """Rename the complete files."""
        for path in self.paths:
            with explain_write_errors(path):
                publish(partial_of(path), path)

    def close(self) -> None:
        """Remove the temporary file."""
        with suppress(OSError):
            self._stored.close()

    def discard(self) -> None:
        """Remove the partial files after an error."""
        self.close()
        for path in self.paths:
            with suppress(OSError):
                partial_of(path).unlink()
