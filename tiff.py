"""TIFF files, read as frames (H, W, C) whose strips and tiles are decoded when their rows are asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from utils import UserError

# the units that files name, in micron
MICRON = {"µm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "nm": 1e-3, "nanometer": 1e-3}
MICRON |= {"Å": 1e-4, "angstrom": 1e-4, "mm": 1e3, "millimeter": 1e3, "cm": 1e4, "centimeter": 1e4, "inch": 25400.0}


def read_tiff(path: Path) -> list[Any]:
    """Frames of all series of a TIFF."""
    with _opened(path) as tif:
        return [frame for series in tif.series for frame in _frames(path, series)]


def _frames(path: Path, series: Any) -> list[Any]:
    """Frames of a series: mapped where the pixels lie in one piece, else read by strips or tiles."""
    from tifffile import TIFF

    if series.dataoffset is not None:
        dtype = np.dtype(series.keyframe.parent.byteorder + series.dtype.char)
        return split(np.memmap(path, dtype, "r", offset=series.dataoffset, shape=series.shape), series.axes, path)
    axes, of_page = series.axes, series.keyframe.axes
    outer = axes[: len(axes) - len(of_page)]
    if series.keyframe.compression != 1:
        TIFF.DECOMPRESSORS[series.keyframe.compression]  # a missing package is said here, with its name
    if not axes.endswith(of_page) or not set(of_page) <= set("YXS") or len(set("SC") & set(axes)) > 1:
        return split(series.asarray(), axes, path)  # volumes in one page, and what is refused
    order = np.arange(math.prod(series.shape[: len(outer)])).reshape(series.shape[: len(outer)])
    if "C" in outer:
        order = np.moveaxis(order, outer.index("C"), -1)
    order = order.reshape(-1, order.shape[-1] if "C" in outer else 1)
    return [PagedImage(path, [series.pages[int(number)] for number in numbers]) for numbers in order]


class PagedImage:
    """Image (H, W, C) of one TIFF page, or of one page a channel, whose strips or tiles are read when they are needed.

    Parameters
    ----------
    path : Path
        The file.
    pages : list of tifffile.TiffPage
        Of an open file; the image needs it open no more.
    """

    def __init__(self, path: Path, pages: list[Any]) -> None:
        key = pages[0].keyframe
        _, _, height, width, _ = key.shaped
        samples = key.samplesperpixel
        self._alpha = len(pages) == 1 and samples in (2, 4)
        self.shape = (height, width, len(pages) if len(pages) > 1 else samples - self._alpha)
        self.dtype = np.dtype(np.uint8) if key.dtype == bool else np.dtype(key.dtype)
        self.path, self._decode = path, key.decode
        self._numbers = [page.index + 1 for page in pages]
        self._where = [list(zip(page.dataoffsets, page.databytecounts, strict=True)) for page in pages]
        jpeg = key.compression in (6, 7, 34892, 33007)
        self._options = [
            {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader} if jpeg else {} for page in pages
        ]
        self._tall = key.tilelength if key.is_tiled else key.rowsperstrip
        self._across = math.ceil(width / key.tilewidth) if key.is_tiled else 1
        self._kept: dict[tuple[int, int], tuple] = {}
        for number, where in zip(self._numbers, self._where, strict=True):
            if any(offset + count > path.stat().st_size for offset, count in where):
                raise UserError(f"{path}, page {number}: truncated: copy the file again")

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        top, bottom, step = rows.indices(self.shape[0])
        out = np.zeros((max(bottom - top, 0), self.shape[1], self.shape[2] + self._alpha), self.dtype)
        kept, self._kept = self._kept, {}
        for page, number in enumerate(self._numbers):
            try:
                for index in self._overlapping(page, top, bottom):
                    decoded = kept.get((page, index)) or self._segment(page, index)
                    if bottom < self.shape[0]:  # the next rows may need it again
                        self._kept[page, index] = decoded
                    self._place(out, top, page, *decoded)
            except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
                hint = "pip install imagecodecs" if "imagecodecs" in str(error) else "copy the file again"
                reason = str(error).strip() or type(error).__name__
                raise UserError(f"{self.path}, page {number}: damaged ({reason}): {hint}") from error
        return out[::step, :, : self.shape[2]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All pixels."""
        return self[:].astype(dtype or self.dtype, copy=False)

    def _overlapping(self, page: int, top: int, bottom: int) -> list[int]:
        """Numbers of the strips or tiles of a page that some rows need."""
        down = math.ceil(self.shape[0] / self._tall)
        tops = [index // self._across % down * self._tall for index in range(len(self._where[page]))]
        return [index for index, first in enumerate(tops) if first < bottom and first + self._tall > top]

    def _segment(self, page: int, index: int) -> tuple:
        """One strip or tile (1, h, w, C), and its place (sample, depth, y, x, channel)."""
        offset, count = self._where[page][index]
        with self.path.open("rb") as file:
            file.seek(offset)
            segment, place, _ = self._decode(file.read(count) or None, index, **self._options[page])
        return segment, place

    def _place(self, out: np.ndarray, top: int, page: int, segment: np.ndarray | None, place: tuple) -> None:
        """Copy what a strip or tile has of the rows from `top` on."""
        if segment is None:  # a hole in a sparse file
            return
        sample, _, y, x, _ = place
        pixels = segment[0] * np.uint8(255) if segment.dtype == bool else segment[0]
        pixels = pixels[max(top - y, 0) : top + len(out) - y, : out.shape[1] - x]
        first, channel = max(y - top, 0), sample if len(self._where) == 1 else page
        out[first : first + len(pixels), x : x + pixels.shape[1], channel : channel + pixels.shape[2]] = pixels


def split(pixels: np.ndarray, axes: str, path: Path) -> list[np.ndarray]:
    """Cut an array with named axes into frames (H, W, C); S and C are channels, all but Y and X are frames."""
    channels = [axis for axis in axes if axis in "SC"]
    if len(channels) > 1 or "Y" not in axes or "X" not in axes:
        raise UserError(f"{path}: axes {axes} are not understood: save pages of Y, X and at most one channel axis")
    order = [axes.index(axis) for axis in ("Y", "X", *channels)]
    others = [i for i in range(len(axes)) if i not in order]
    pixels = pixels.transpose(others + order)
    if not channels:
        pixels = pixels[..., None]
    if "S" in axes and pixels.shape[-1] in (2, 4):
        pixels = pixels[..., :-1]  # alpha
    return list(pixels.reshape(-1, *pixels.shape[-3:]))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """TIFF; refused where tifffile only logs that the chain of pages is broken, and would go on with fewer."""
    import tifffile

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    logger, listen = logging.getLogger("tifffile"), Listen()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(listen)
    try:
        with tifffile.TiffFile(path) as tif:
            len(tif.pages)  # walks the chain of pages: a broken link is logged here
            yield tif
    finally:
        logger.removeHandler(listen)
        logger.propagate = propagate
    broken = [message for message in messages if "TiffPages" in message]
    if broken:
        raise UserError(f"{path}: truncated or damaged ({broken[0].split('> ')[-1]}): copy the file again")


def tiff_geometry(path: Path) -> tuple[str, tuple[int, ...], dict[str, float], str]:
    """Axes that its frames are counted along, their lengths, the size of a pixel along X, Y and Z, and its unit.

    Empty where the tags that say so are damaged: the pixels are read without them.
    """
    try:
        with _opened(path) as tif:
            series = tif.series[0]
            sizes = dict(zip(series.axes, series.shape, strict=True))
            axes = "".join(axis for axis in sizes if axis in "TZ")
            return axes, tuple(sizes[axis] for axis in axes), *_pixel_size(tif)
    except Exception:  # readers raise whatever a damaged tag makes them stumble over
        return "", (), {}, ""


def tiff_palette(path: Path) -> np.ndarray | None:
    """Colours (N, 3) uint8 of the palette of a TIFF's pages; None where it has none."""
    with _opened(path) as tif:
        page = tif.pages[0]
        return None if page.colormap is None or page.photometric != 3 else (page.colormap.T >> 8).astype(np.uint8)


def _pixel_size(tif: Any) -> tuple[dict[str, float], str]:
    """Size of a pixel and its unit, by OME's, ImageJ's or the baseline's tags."""
    if tif.ome_metadata:
        pixels = ElementTree.fromstring(tif.ome_metadata).find(".//{*}Pixels")
        found = {} if pixels is None else pixels.attrib
        sizes = {axis: found[f"PhysicalSize{axis}"] for axis in "XYZ" if f"PhysicalSize{axis}" in found}
        return in_micron(sizes, {axis: found.get(f"PhysicalSize{axis}Unit", "µm") for axis in sizes})
    page, imagej = tif.pages[0], tif.imagej_metadata or {}
    x, y = page.resolution
    unit = str(imagej.get("unit", {2: "inch", 3: "cm"}.get(int(page.resolutionunit), "")))
    unit = unit.replace("\\u00B5", "µ").replace("\\u00C5", "Å")  # as ImageJ writes them
    if not unit or not x or not y:
        return {}, ""
    sizes = {"X": 1 / x, "Y": 1 / y} | ({"Z": imagej["spacing"]} if "spacing" in imagej else {})
    return in_micron(sizes, dict.fromkeys(sizes, unit))


def in_micron(sizes: dict[str, Any], units: dict[str, str]) -> tuple[dict[str, float], str]:
    """Size of a pixel along each axis, and the unit: micron where those of the file are known, else as the file has it.

    What is no positive number is left out.

    Examples
    --------
    >>> in_micron({"X": 4, "Z": 0.05}, {"X": "nm", "Z": "µm"}), in_micron({"X": 2}, {"X": "pixel"}), in_micron({}, {})
    (({'X': 0.004, 'Z': 0.05}, 'micron'), ({'X': 2.0}, 'pixel'), ({}, ''))
    """
    numbers = {axis: _positive(size) for axis, size in sizes.items()}
    known = {axis: number for axis, number in numbers.items() if number}
    if known and all(units[axis] in MICRON for axis in known):
        return {axis: number * MICRON[units[axis]] for axis, number in known.items()}, "micron"
    return known, next((units[axis] for axis in known), "")


def _positive(value: Any) -> float:
    """Number that a file says; 0 where it is none, not positive, or infinite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return number if 0 < number < math.inf else 0.0
