"""Data sets of HDF5 files as frames (H, W, C), read chunk by chunk."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from images.chunks import ChunkedArray, usual_axes
from images.geometry import Geometry, in_micron
from images.rows import Frames, Series, check_count, full_name, listed
from utils import check_module

HDF5 = (".h5", ".hdf5", ".hdf")
SIGNATURE = b"\x89HDF\r\n\x1a\n"  # first bytes
MAX_CHUNK = 2**24  # [bytes] of a data set that is not stored in chunks, which may be read in parts of any size


class DataSet:
    """Data set whose file is open only while it is read, so that others may read or replace it."""

    def __init__(self, path: Path, name: str, data: Any) -> None:
        self._path, self._name = path, name
        self.shape, self.dtype = data.shape, data.dtype
        rows = max(MAX_CHUNK // max(math.prod(data.shape[-1:]) * data.dtype.itemsize, 1), 1)
        self.chunks = data.chunks or (*(1 for _ in data.shape[:-2]), min(rows, data.shape[-2]), data.shape[-1])

    def __getitem__(self, place: tuple[slice | int, ...]) -> np.ndarray:
        """Part of the data set."""
        import h5py

        with h5py.File(self._path, "r") as file:
            return file[self._name][place]


def read_hdf5(path: Path) -> Frames:
    """Frames of all data sets of a file that are images; if these are several, one must be chosen."""
    check_module("h5py", str(path))
    import h5py

    found, names = Frames(kind="HDF5"), []
    with h5py.File(path, "r") as file:
        sets: list[Any] = []
        file.visititems(lambda _, item: sets.append(item) if isinstance(item, h5py.Dataset) else None)
        for data in sets:
            problem = _problem(data)
            if problem:
                found.series.append(Series(data.name, by_default=False, problem=problem))
                continue
            names.append(full_name(path, data.name))
            source = ChunkedArray(Path(names[-1]), DataSet(path, data.name, data), _axes(data))
            axes, lengths = source.outer
            check_count(path, lengths)
            found.add(source.images(), Series(data.name, axes, lengths, partial(_geometry, path, data.name)))
    found.named = len(names) > 1
    if found.named:
        found.ambiguous = f"{path}: holds {len(names)} data sets: name one of them ({listed(names)})"
    return found


def _problem(data: Any) -> str:
    """Why a data set is no image; empty if it is one."""
    if data.dtype.kind not in "uifb" or data.ndim < 2:
        return f"shape {data.shape} of {data.dtype}: an image has numbers with axes Y and X: choose another"
    if 0 in data.shape:
        return f"shape {data.shape}: it holds no pixels: choose another"
    axes = _axes(data)
    if len(axes) != data.ndim or len({*axes}) < len(axes) or not {"Y", "X"} <= {*axes}:
        return f"shape {data.shape}, axes {axes}: at most T, C, Z, Y and X are read: choose another"
    return ""


def _axes(data: Any) -> str:
    """Axes as letters: of ilastik's tags, of the dimensions' labels, or the usual ones."""
    with suppress(Exception):  # attributes of other programs may mean anything
        tags = json.loads(data.attrs["axistags"])["axes"]
        return "".join(tag["key"] for tag in tags).upper()
    labels = [dimension.label.upper() for dimension in data.dims]
    return "".join(labels) if all(len(label) == 1 for label in labels) else usual_axes(data.shape)


def _geometry(path: Path, name: str) -> Geometry:
    """Axes of the frames, and the pixel size of the attribute `element_size_um`, as Fiji and ilastik write it."""
    import h5py

    with h5py.File(path, "r") as file:
        data = file[name]
        lengths = dict(zip(_axes(data), data.shape, strict=True))
        sizes = np.ravel(data.attrs.get("element_size_um", ())).tolist()
    space = [axis for axis in "ZYX" if axis in lengths or len(sizes) == 3]
    pixel, unit = in_micron(dict(zip(space, sizes, strict=False)), dict.fromkeys("XYZ", "µm"))
    axes = "".join(axis for axis in lengths if axis not in "CYX")
    return Geometry(axes, tuple(lengths[axis] for axis in axes), pixel, unit)
