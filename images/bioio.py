"""Files of microscopes (.czi, .nd2, .lif...) as frames (H, W, C), read plane by plane with bioio and its plug-ins."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from images.calibration import in_micron
from images.chunks import ChunkedArray
from images.czi import mark_missing, missing_scenes, patient_reader
from images.foreign import refusal
from images.geometry import Geometry
from images.lif import unusual_image
from images.rows import ABORTED, AUXILIARY, Frames, Series, converted
from utils import UserError


class Plugin(NamedTuple):
    """A plug-in of bioio."""

    kind: str  # the format as users see it
    module: str  # its package has `-` for `_`
    options: dict[str, Any]  # of its reader, so that it reads one plane at a time, which nd2 does anyway


PLUGINS = {  # by the first bytes of a file
    b"ZISRAWFILE": Plugin("CZI", "bioio_czi", {"chunk_dims": [*"YXA"]}),  # A: the colours of a pixel
    b"\xda\xce\xbe\x0a": Plugin("ND2", "bioio_nd2", {}),
    b"\x70\x00\x00\x00": Plugin("LIF", "bioio_lif", {"chunk_dims": [*"YX"]}),
}
BLUE_FIRST = ("bioio_czi", "bioio_nd2")  # give colours in the order of the file, as ZEISS and Nikon store them


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that bioio, its plug-ins and their packages warn of or log is printed: an error is raised besides."""
    for name in ("bioio", "bioio_base", "nd2", *(plugin.module for plugin in PLUGINS.values())):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Planes:
    """Delayed array of a scene: indexed, it is computed in this thread."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self.shape, self.dtype = data.shape, data.dtype
        self.chunks = tuple(max(lengths) for lengths in data.chunks)

    def __getitem__(self, index: tuple[slice | int, ...]) -> np.ndarray:
        """Part of the array."""
        with _quiet():
            return np.asarray(self._data[index].compute(scheduler="synchronous"))


def plugin_of(first: bytes) -> Plugin | None:
    """Plug-in that reads a file with these first bytes; None for other formats."""
    return next((plugin for start, plugin in PLUGINS.items() if first.startswith(start)), None)


def read_bioio(path: Path, plugin: Plugin | None) -> Frames:
    """Frames of all scenes of a file; a scene that can't be read is a series with a problem.

    Without a plug-in, bioio chooses one by the ending of the name.
    """
    with _quiet():
        image = _open(path, plugin)
        package = plugin.module if plugin else type(image.reader).__module__.partition(".")[0]
        frames = Frames(kind=f"{plugin.kind if plugin else path.suffix[1:].upper()} ({package.replace('_', '-')})")
        for number, name in enumerate(map(str, image.scenes)):
            is_main = name.strip().lower() not in AUXILIARY
            try:
                image.set_scene(number)
                source, geometry = _scene(path, plugin, image, number)
                axes, lengths = source.outer_axes, source.outer_lengths
                images = source.images()
                if package in BLUE_FIRST and image.xarray_dask_data.sizes.get("S", 1) > 2:
                    images = [converted(frame, _in_rgb_order) for frame in images]
                if package == "bioio_czi":
                    mark_missing(path, number, axes, lengths, images)
                levels = _read(image, "resolution_levels") or [0]  # not all plug-ins know
                frames.add(images, Series(name, axes, lengths, geometry, len(levels), is_main, lacks=ABORTED))
            except Exception as error:  # the other scenes can be read
                frames.add_problem(path, name, error, by_default=is_main)
        if package == "bioio_czi":
            frames.notes += missing_scenes(path, len(frames.series))
    frames.named = len(frames.series) > 1
    return frames


def _open(path: Path, plugin: Plugin | None) -> Any:
    """Image of bioio; names the missing package."""
    try:
        from bioio import BioImage
        from bioio_base.exceptions import UnsupportedFileFormatError

        reader = None
        if plugin:
            reader = patient_reader() if plugin.kind == "CZI" else importlib.import_module(plugin.module).Reader
    except ImportError as error:
        if plugin is None:
            raise refusal(path) from error
        package = plugin.module.replace("_", "-")
        what = f"{path}: {plugin.kind} needs the packages bioio and {package}"
        raise UserError(f"{what}: pip install bioio {package}") from error
    try:
        return BioImage(path, reader, **(plugin.options if plugin else {}))
    except UnsupportedFileFormatError as error:
        if plugin:
            raise
        raise refusal(path) from error


def _scene(path: Path, plugin: Plugin | None, image: Any, number: int) -> tuple[ChunkedArray, Callable[[], Geometry]]:
    """Array of the current scene, and what reads its geometry."""
    unusual = unusual_image(path, number) if plugin and plugin.kind == "LIF" else None
    if unusual:
        planes, geometry = unusual
        return ChunkedArray(path, planes, _letters(planes.axes), keeps_planes=True), lambda: geometry
    # one letter for channels; axes of one entry are dropped, since bioio adds T, C and Z to any image
    array = image.xarray_dask_data
    array = array.isel({axis: 0 for axis, size in array.sizes.items() if size == 1 and axis not in ("Y", "X")})
    source = ChunkedArray(path, Planes(array.data), _letters([*map(str, array.dims)]), keeps_planes=True)
    return source, partial(_geometry, path, plugin, number, source.outer_axes, source.outer_lengths)


def _letters(axes: Sequence[str]) -> str:
    """Axes as one text, with C for colours, if each is a letter, Y and X are among them, and each is there once."""
    letters = "".join(axes).replace("S", "C")
    if len(letters) != len(axes) or len({*letters}) < len(axes) or not {"Y", "X"} <= {*letters}:
        raise UserError(f"axes {', '.join(axes)}: channels or colours, Y and X are read, not both: save it as a TIFF")
    return letters


def _in_rgb_order(pixels: np.ndarray) -> np.ndarray:
    """Red, green and blue of blue, green and red, perhaps followed by alpha."""
    return pixels[..., 2::-1]


def _geometry(path: Path, plugin: Plugin | None, number: int, axes: str, lengths: tuple[int, ...]) -> Geometry:
    """Axes of a scene, pixel size, time step and names of the channels; without what the plug-in can't read."""
    with _quiet():
        image = _open(path, plugin)
        image.set_scene(number)
        names = ("physical_pixel_sizes", "time_interval", "channel_names")
        sizes, interval, channels = (_read(image, name) for name in names)
    lengths_of = {axis: getattr(sizes, axis, None) for axis in _calibrated_axes(path, plugin)}
    pixel, unknown = in_micron(lengths_of, dict.fromkeys("ZYX", "µm"))
    seconds = interval.total_seconds() if hasattr(interval, "total_seconds") else None
    return Geometry(axes, lengths, pixel, unknown, seconds or None, channels=tuple(map(str, channels or ())))


def _calibrated_axes(path: Path, plugin: Plugin | None) -> str:
    """Axes whose pixel size is that of the microscope: for any other, ND2 has 1 µm."""
    if not plugin or plugin.kind != "ND2":
        return "ZYX"
    from nd2 import ND2File

    with suppress(Exception), ND2File(path) as file:
        is_calibrated = (file.metadata.channels or [])[0].volume.axesCalibrated
        return "".join(axis for axis, given in zip("XYZ", is_calibrated, strict=True) if given)
    return ""


def _read(image: Any, name: str) -> Any:
    """Property of an image of bioio; None if its plug-in fails to read it."""
    with suppress(Exception):
        return getattr(image, name)
