"""Files of microscopes (.czi, .nd2, .lif...) as frames (H, W, C), read plane by plane with bioio and its plug-ins."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from images.chunks import ChunkedArray
from images.geometry import Geometry, in_micron
from images.rows import AUXILIARY, Converted, Frames, Rows, Series, check_count
from utils import UserError, say


class Plugin(NamedTuple):
    """A plug-in of bioio.

    Attributes
    ----------
    kind : str
        The format as shown to users.
    module : str
        Module of the plug-in; its package has `-` for `_`.
    options : dict
        Arguments of its reader, which make it read one plane at a time.
    """

    kind: str
    module: str
    options: dict[str, Any]


PLANES = {"chunk_dims": ["Y", "X"]}
PLUGINS = {  # by the first bytes of a file
    b"ZISRAWFILE": Plugin("CZI", "bioio_czi", PLANES),
    b"\xda\xce\xbe\x0a": Plugin("ND2", "bioio_nd2", {}),
    b"\x70\x00\x00\x00": Plugin("LIF", "bioio_lif", PLANES),
}
OTHERS = {".dv": "bioio-dv", ".r3d": "bioio-dv", ".sldy": "bioio-sldy", ".oib": "bioio-bioformats"}
OTHERS |= {".oif": "bioio-bioformats", ".vsi": "bioio-bioformats", ".ims": "bioio-bioformats"}


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that bioio, its plug-ins and their packages warn of or log is printed: an error is raised besides."""
    loggers = [
        logging.getLogger(name) for name in ("bioio", "bioio_base", "nd2", *(p.module for p in PLUGINS.values()))
    ]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


class Planes:
    """Delayed array of a scene: indexed, it is computed in this thread."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self.shape, self.dtype = data.shape, data.dtype
        self.chunks = tuple(max(lengths) for lengths in data.chunks)

    def __getitem__(self, place: tuple[slice | int, ...]) -> np.ndarray:
        """Part of the array."""
        with _quiet():
            return np.asarray(self._data[place].compute(scheduler="synchronous"))


def plugin_of(first: bytes) -> Plugin | None:
    """Plug-in that reads a file with these first bytes; None for other formats."""
    return next((plugin for start, plugin in PLUGINS.items() if first.startswith(start)), None)


def read_bioio(path: Path, plugin: Plugin | None) -> Frames:
    """Frames of all scenes of a file.

    Parameters
    ----------
    path : Path
        The file.
    plugin : Plugin or None
        Plug-in that reads it; None: bioio chooses one by the ending of the name.

    Raises
    ------
    UserError
        The package or its plug-in is missing, or the axes are not supported.
    """
    with _quiet():
        image = _open(path, plugin)
        reader = type(image.reader).__module__.partition(".")[0].replace("_", "-")
        found = Frames(kind=f"{plugin.kind if plugin else path.suffix[1:].upper()} ({reader})")
        for number, name in enumerate(image.scenes):
            image.set_scene(number)
            images, axes, lengths = _scene(path, image, is_bgr=reader == "bioio-czi")
            geometry = partial(_geometry, path, plugin, number, axes, lengths)
            is_main = str(name).strip().lower() not in AUXILIARY
            found.add(images, Series(str(name), axes, lengths, geometry, _levels(image), is_main))
        if reader == "bioio-czi":
            _warn_of_scenes(path, len(found.series))
    found.named = len(found.series) > 1
    return found


def _open(path: Path, plugin: Plugin | None) -> Any:
    """Image of bioio; names the missing package."""
    package = plugin.module.replace("_", "-") if plugin else OTHERS.get(path.suffix.lower(), "")
    what = f"{path}: {plugin.kind if plugin else path.suffix[1:].upper()} needs the packages bioio and {package}"
    install = f"pip install bioio {package}"
    if not package:
        what = f"{path}: no image of a known format; of a microscope, perhaps, for which bioio has a plug-in"
        install = "check the file, or pip install bioio and that plug-in"
    try:
        from bioio import BioImage
        from bioio_base.exceptions import UnsupportedFileFormatError

        reader = importlib.import_module(plugin.module).Reader if plugin else None
    except ImportError as error:
        raise UserError(f"{what}: {install}") from error
    if plugin:
        return BioImage(path, reader=reader, **plugin.options)
    try:
        return BioImage(path)
    except UnsupportedFileFormatError as error:
        raise UserError(f"{what}; those that are installed do not read it: {install}") from error


def _scene(path: Path, image: Any, *, is_bgr: bool) -> tuple[list[Rows], str, tuple[int, ...]]:
    """Frames of the current scene, the axes that count them, and their lengths."""
    array = image.xarray_dask_data
    sizes = dict(zip(map(str, array.dims), array.shape, strict=True))
    if sizes.get("S", 1) > 1 and sizes.get("C", 1) > 1:
        what = f"{sizes['C']} channels of {sizes['S']} colours each"
        raise UserError(f"{path}: {what}: save them as a TIFF with one axis of channels")
    colours = sizes.get("S", 1) > 1
    # one letter for channels; axes of one entry are dropped, since bioio adds T, C and Z to any image
    single = {axis: 0 for axis, size in sizes.items() if size == 1 and axis not in "YX"}
    kept = array.isel(single)
    axes = "".join("C" if axis == "S" else str(axis) for axis in kept.dims)
    if len(axes) != kept.ndim or len({*axes}) < len(axes):
        raise UserError(f"{path}: axes {', '.join(map(str, kept.dims))}: save the image as a TIFF")
    source = ChunkedArray(path, Planes(kept.data), axes, keeps_planes=True)
    outer, lengths = source.outer
    check_count(path, lengths)
    images = source.images()
    if colours and is_bgr:  # in the order of the file, which libCZI and its readers keep
        images = [Converted(frame, _reversed) for frame in images]
    return images, outer, lengths


@lru_cache
def _warn_of_scenes(path: Path, num_named: int) -> None:
    """Say once that a CZI has more scenes than its metadata name: its plug-in reads those only."""
    try:
        from aicspylibczi import CziFile
    except ImportError:  # another version of the plug-in may read with another package
        return
    spans = [shape.get("S", (0, 1)) for shape in CziFile(str(path)).get_dims_shape()]
    num = sum(last - first for first, last in spans)
    if num > num_named:
        what = f"warning: {path}: {num} scenes, of which its metadata name {num_named}, which bioio reads"
        say(f"{what}: export the others with ZEN")


def _reversed(pixels: np.ndarray) -> np.ndarray:
    """Channels in the opposite order: blue, green and red become red, green and blue."""
    return pixels[..., ::-1]


def _levels(image: Any) -> int:
    """Number of resolutions."""
    try:
        return len(image.resolution_levels)
    except Exception:  # not all plug-ins know
        return 1


def _geometry(path: Path, plugin: Plugin | None, number: int, axes: str, lengths: tuple[int, ...]) -> Geometry:
    """Axes of a scene, pixel size, time step and names of the channels; without what the plug-in can't read."""
    with _quiet():
        image = _open(path, plugin)
        image.set_scene(number)
        found = [_read(image, name) for name in ("physical_pixel_sizes", "time_interval", "channel_names")]
    sizes, interval, names = found
    pixel, unit = in_micron({axis: getattr(sizes, axis, None) for axis in "ZYX"}, dict.fromkeys("ZYX", "µm"))
    seconds = interval.total_seconds() if hasattr(interval, "total_seconds") else None
    return Geometry(axes, lengths, pixel, unit, seconds or None, channels=tuple(map(str, names or ())))


def _read(image: Any, name: str) -> Any:
    """Property of an image of bioio; None if its plug-in fails to read it."""
    try:
        return getattr(image, name)
    except Exception:
        return None
