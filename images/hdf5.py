"""Data sets of HDF5 files as frames (H, W, C), read chunk by chunk."""

from __future__ import annotations

import importlib
import json
import math
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from images.calibration import in_micron
from images.chunks import ChunkedArray, usual_axes
from images.foreign import refusal
from images.geometry import Geometry
from images.rows import Frames, Series, full_name, listed
from utils import check_module

HDF5 = (".h5", ".hdf5", ".hdf")
SIGNATURE = b"\x89HDF\r\n\x1a\n"  # first bytes
MAX_DEPTH = 8  # of virtual data sets and links that lead to others
MAX_CHUNK = 2**24  # [bytes] of a data set that is not stored in chunks, which may be read in parts of any size


class DataSet:
    """Data set whose file is open only while it is read, so that others may read or replace it."""

    def __init__(self, path: Path, name: str, data: Any) -> None:
        self._path, self._name = path, name
        self.shape, self.dtype = data.shape, data.dtype
        rows = max(MAX_CHUNK // max(math.prod(data.shape[-1:]) * data.dtype.itemsize, 1), 1)
        self.chunks = data.chunks or (*(1 for _ in data.shape[:-2]), min(rows, data.shape[-2]), data.shape[-1])

    def __getitem__(self, index: tuple[slice | int, ...]) -> np.ndarray:
        """Part of the data set."""
        import h5py

        with h5py.File(self._path, "r") as file:
            return file[self._name][index]


def read_hdf5(path: Path) -> Frames:
    """Frames of all data sets of a file that are images; if these are several, one must be chosen."""
    check_module("h5py", str(path))
    import h5py

    frames, names = Frames(kind="HDF5"), []
    with h5py.File(path, "r") as file:
        if "ImarisDataSet" in file.attrs:
            raise refusal(path, ".ims")
        sets: list[Any] = []
        links: dict[str, Any] = {}
        file.visititems(lambda _, item: sets.append(item) if isinstance(item, h5py.Dataset) else None)
        file.visititems_links(links.__setitem__)
        for name, link in links.items():
            if isinstance(link, h5py.ExternalLink):
                problem = f"a link to {link.path} of {link.filename}, which is not followed: name that file"
                frames.series.append(Series(f"/{name}", by_default=False, problem=problem))
        for data in sets:
            problem = _problem(data) or _elsewhere(path, data) or _lacks_filter(data)
            if problem:
                frames.series.append(Series(data.name, by_default=False, problem=problem))
                continue
            names.append(full_name(path, data.name))
            source = ChunkedArray(Path(names[-1]), DataSet(path, data.name, data), _axes(data))
            geometry = partial(_geometry, path, data.name, source)
            frames.add(source.images(), Series(data.name, source.outer_axes, source.outer_lengths, geometry))
    frames.named = len(names) > 1
    if frames.named:
        frames.ambiguous = f"{path}: holds {len(names)} data sets: name one of them ({listed(names)})"
    return frames


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


def _elsewhere(path: Path, data: Any, depth: int = 0) -> str:
    """Why a data set is not read: it would read files outside its folder; empty if it would not.

    A file from someone else could name any file of this machine, whose bytes would become pixels.
    """
    import h5py

    advice = "copy the pixels into one file"
    if data.external:
        return f"its pixels lie in {data.external[0][0]} (external storage), which is not read: {advice}"
    for source in data.virtual_sources() if data.is_virtual else ():
        file = path if source.file_name == "." else _neighbour(path, source.file_name)
        what = f"a virtual data set of {source.file_name}:{source.dset_name}"
        if "%" in f"{source.file_name}{source.dset_name}":
            return f"{what}, a pattern of names, which is not read: {advice}"
        if file is None:
            return f"{what}, which is not in the folder of this file: put it there, or {advice}"
        if depth > MAX_DEPTH:
            return f"{what}, and so on: {advice}"
        with h5py.File(file, "r") as other:
            member = _member(other, source.dset_name)
            if member is None:
                return f"{what}, which is none of that file: {advice}"
            if problem := _elsewhere(file, member, depth + 1):
                return problem
    return ""


def _neighbour(path: Path, name: str) -> Path | None:
    """File next to another one, or below, by the name that HDF5 looks for; None if there is none, or it lies outside.

    HDF5 would look in the current folder, too.
    """
    for folder in (path.parent.resolve(), path.resolve().parent):
        file = folder / name
        if file.is_file() and file.resolve().is_relative_to(folder):
            return file
    return None


def _member(file: Any, name: str, depth: int = 0) -> Any:
    """Data set of a file by its path, through links within the file; None if there is none in it."""
    import h5py

    node, parts = file, [part for part in name.split("/") if part not in ("", ".")]
    for number, part in enumerate(parts):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if isinstance(link, h5py.SoftLink) and depth <= MAX_DEPTH:
            target = link.path if link.path.startswith("/") else f"{node.name}/{link.path}"
            return _member(file, "/".join([target, *parts[number + 1 :]]), depth + 1)
        if not isinstance(link, h5py.HardLink):
            return None
        node = node[part]
    return node if isinstance(node, h5py.Dataset) else None


def _lacks_filter(data: Any) -> str:
    """Why a data set can't be unpacked; empty if it can."""
    import h5py

    properties = data.id.get_create_plist()
    stored = [properties.get_filter(index) for index in range(properties.get_nfilters())]
    filters = {number: name.decode(errors="replace") for number, _, _, name in stored}
    if not all(map(h5py.h5z.filter_avail, filters)):
        with suppress(ImportError):
            importlib.import_module("hdf5plugin")  # registers many
    names = [f"{name or 'filter'} ({number})" for number, name in filters.items() if not h5py.h5z.filter_avail(number)]
    try:
        if names:  # but it may be one that was not used
            data[(slice(0, 1),) * data.ndim]
    except OSError:
        return f"compressed by {', '.join(names)}: pip install hdf5plugin, or save it with gzip"
    return ""


def _axes(data: Any) -> str:
    """Axes as letters: of ilastik's tags, of the dimensions' labels, or the usual ones."""
    with suppress(Exception):  # attributes of other programs may mean anything
        tags = json.loads(data.attrs["axistags"])["axes"]
        return "".join(tag["key"] for tag in tags).upper()
    labels = [dimension.label.upper() for dimension in data.dims]
    return "".join(labels) if all(len(label) == 1 for label in labels) else usual_axes(data.shape)


def _geometry(path: Path, name: str, source: ChunkedArray) -> Geometry:
    """Axes of the frames, and the pixel size of the attribute `element_size_um`, as Fiji and ilastik write it."""
    import h5py

    with h5py.File(path, "r") as file:
        sizes = np.ravel(file[name].attrs.get("element_size_um", ())).tolist()
    space = [axis for axis in "ZYX" if axis in source.axes or len(sizes) == 3]
    pixel, unknown = in_micron(dict(zip(space, sizes, strict=False)), dict.fromkeys("XYZ", "µm"))
    return Geometry(source.outer_axes, source.outer_lengths, pixel, unknown)
