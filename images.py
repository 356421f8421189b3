"""Image files, read as frames (H, W, C): TIFF by tifffile, arrays by numpy and zarr, everything else by Pillow."""

from __future__ import annotations

import hashlib
import logging
import math
import mmap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from xml.etree import ElementTree

import numpy as np

from utils import UserError, check_module, natural_key

TIFF = (".tif", ".tiff")
SUFFIXES = (*TIFF, ".png", ".jpg", ".jpeg", ".bmp")
ARRAYS = (".npy", ".zarr")  # read too, where no database is to be made


class Rows(Protocol):
    """An image (H, W, C), of which `image[top:bottom]` reads no more than these rows need."""

    shape: tuple[int, int, int]
    dtype: np.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""


@dataclass(frozen=True)
class Frame:
    """One image: a page of a stack, or a file of a folder.

    Attributes
    ----------
    path : Path
        The file.
    index : int
        Number of the frame in its file, from 0.
    """

    path: Path
    index: int

    def __str__(self) -> str:
        return f"{self.path}, page {self.index + 1}" if self.path.suffix.lower() in TIFF else str(self.path)

    def read(self) -> np.ndarray:
        """Pixels of the frame, (H, W, C), of the file's own type; an alpha channel is dropped."""
        return np.asarray(self.open())

    def open(self) -> Rows:
        """Frame whose pixels are read when its rows are asked for."""
        return read_frames(self.path)[self.index]


def list_frames(source: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Frame]:
    """Frames of a stack, or of all images in a folder in natural order.

    Parameters
    ----------
    source : Path
        A file, a folder of files, or a pattern of files such as `images/*.tif`.
    suffixes : tuple of str
        Ends of the names of the files that are taken.

    Raises
    ------
    UserError
        There is no such file or folder, it holds no image, or an image can't be read.
    """
    if source.is_file() or (is_zarr(source) and ".zarr" in suffixes):
        files = [source]
    elif source.is_dir() or set("*?[") & set(source.name):
        folder, pattern = (source, "*") if source.is_dir() else (source.parent, source.name)
        files = [file for file in folder.glob(pattern) if file.suffix.lower() in suffixes and file.name[0] != "."]
        if not files:
            raise UserError(f"{source}: no image in this folder: put {', '.join(suffixes)} files there")
        files.sort(key=lambda file: natural_key(file.name))
    else:
        raise UserError(f"{source}: no such file or folder: put the stack there, or name it by --input and --label")
    return [Frame(file, index) for file in files for index in range(_count(file))]


def neighbours(frames: list[Frame], index: int, reach: int) -> list[Frame]:
    """A frame between those up to `reach` above and below it; where its stack ends, the last one again.

    Frames are of one stack where they are of one file, and where each is a file of its own.
    """
    num = Counter(frame.path for frame in frames)

    def stack(frame: Frame) -> Path | None:
        return frame.path if num[frame.path] > 1 else None

    low = high = index
    while low > 0 and stack(frames[low - 1]) == stack(frames[index]):
        low -= 1
    while high < len(frames) - 1 and stack(frames[high + 1]) == stack(frames[index]):
        high += 1
    return [frames[min(max(index + step, low), high)] for step in range(-reach, reach + 1)]


def read_geometry(frames: list[Frame]) -> tuple[str, tuple[int, ...], dict[str, float], str]:
    """What frames are counted along, and how large their pixels are.

    Returns
    -------
    axes : str
        `""` for one image, else letters such as `"Z"` or `"TZ"`.
    lengths : tuple of int
        Of these axes.
    pixel : dict
        Size of a pixel along X, Y and Z, where the file says it.
    unit : str
        Of that size; empty where the file doesn't say.
    """
    path, pixel, unit, axes, lengths = frames[0].path, {}, "", "", ()
    if any(frame.path != path for frame in frames):
        pass
    elif path.is_dir():
        array, letters, pixel = open_zarr(path)
        axes = "".join(axis for axis in letters if axis not in "CYX")
        lengths = tuple(array.shape[letters.index(axis)] for axis in axes)
    elif path.suffix.lower() in TIFF:
        import tifffile

        with _tifffile_errors(path), tifffile.TiffFile(path) as tif:
            series = tif.series[0]
            sizes = dict(zip(series.axes, series.shape, strict=True))
            axes = "".join(axis for axis in sizes if axis in "TZ")
            lengths = tuple(sizes[axis] for axis in axes)
            pixel, unit = _pixel_size(tif)
    if math.prod(lengths) != len(frames):
        axes, lengths = ("Z", (len(frames),)) if len(frames) > 1 else ("", ())
    return axes, lengths, {axis: size for axis, size in pixel.items() if axis in "XYZ"}, unit


def _pixel_size(tif: Any) -> tuple[dict[str, float], str]:
    """Size of a pixel and its unit, by OME's, ImageJ's or the baseline's tags."""
    if tif.ome_metadata:
        pixels = ElementTree.fromstring(tif.ome_metadata).find(".//{*}Pixels")
        found = {} if pixels is None else pixels.attrib
        sizes = {axis: float(found[f"PhysicalSize{axis}"]) for axis in "XYZ" if f"PhysicalSize{axis}" in found}
        return sizes, found.get("PhysicalSizeXUnit", "micron") if sizes else ""
    page, imagej = tif.pages[0], tif.imagej_metadata or {}
    x, y = page.resolution
    scale = {1: 1.0, 2: 25400.0, 3: 10000.0}[int(page.resolutionunit)]  # inch and centimetre in micron
    unit = imagej.get("unit", "micron" if scale > 1 else "").replace("\\u00B5m", "micron")
    if not unit or not x or not y:
        return {}, ""
    spacing = {"Z": float(imagej["spacing"])} if "spacing" in imagej else {}
    return {"X": scale / x, "Y": scale / y} | spacing, unit


def release(image: Rows) -> None:
    """Let go of what was read of a mapped file, which else counts as this program's memory."""
    mapped = getattr(image, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _count(path: Path) -> int:
    """Number of frames in a file."""
    return len(read_frames(path)) if path.suffix.lower() in (*TIFF, *ARRAYS) or path.is_dir() else 1


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr array or group, of version 2 or 3."""
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def read_frames(path: Path) -> list[Rows]:
    """All frames of one file, (H, W, C) each, of the file's own type; one bit becomes 0 and 255.

    TIFF, NumPy and Zarr files are mapped or read when rows are asked for, not loaded.

    Raises
    ------
    UserError
        The file is no image, is damaged or truncated, or has no page.
    """
    return _read_frames(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)  # the frames of one stack are asked for one after another
def _read_frames(path: Path, _version: int) -> list[Rows]:
    suffix = path.suffix.lower()
    read = _READERS.get(suffix, _read_zarr if path.is_dir() else _read_pillow)
    try:
        frames = read(path)
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: can't be read as an image ({reason}): check or replace the file") from error
    except Exception as error:  # readers raise whatever a damaged file makes them stumble over
        hint = ": pip install imagecodecs" if "imagecodecs" in str(error) else ": check or replace the file"
        raise UserError(f"{path}: damaged, truncated or no image ({str(error).strip()}){hint}") from error
    if not frames or any(0 in frame.shape for frame in frames):
        raise UserError(f"{path}: holds no page with pixels: check or replace the file")
    return [frame * np.uint8(255) if frame.dtype == bool else frame for frame in frames]


def _read_npy(path: Path) -> list[np.ndarray]:
    """Frames of an array (H, W), (N, H, W) or (N, H, W, C); (H, W, C) where C is 1 to 4."""
    array = np.lib.format.open_memmap(path, mode="r")
    axes = {2: "YX", 3: "YXC" if array.shape[-1] <= 4 else "ZYX", 4: "ZYXC"}.get(array.ndim, "")
    if not axes or array.dtype.kind not in "uifb":
        raise UserError(
            f"{path}: shape {array.shape} of {array.dtype}: must be (H, W), (N, H, W) or (N, H, W, C) numbers"
        )
    return _split(array, axes, path)


def _read_zarr(path: Path) -> list[Rows]:
    """Frames of a Zarr array, or of the first and largest array of an OME-Zarr image."""
    array, axes, _ = open_zarr(path)
    if "Y" not in axes or "X" not in axes:
        raise UserError(f"{path}: axes {axes} are not understood: Y and X must be there")
    others = [axis for axis in axes if axis not in "CYX"]
    places = np.ndindex(*(array.shape[axes.index(axis)] for axis in others))
    return [ZarrImage(array, axes, dict(zip(others, place, strict=True))) for place in places]


def open_zarr(path: Path) -> tuple[Any, str, dict[str, float]]:
    """Array of a Zarr folder, its axes as letters, and the size of a pixel along each axis that says one.

    Raises
    ------
    UserError
        The package `zarr` is missing, or there is no image.
    """
    check_module("zarr", str(path))
    import zarr

    node = zarr.open(path, mode="r")
    if isinstance(node, zarr.Array):
        return node, "TCZYX"[-node.ndim :] if node.ndim != 3 else "ZYX", {}
    attributes = dict(node.attrs)
    scales = attributes.get("ome", attributes).get("multiscales")
    if not scales:
        raise UserError(f"{path}: a Zarr group without an OME-Zarr image: name the array in it")
    axes = "".join(axis["name"] for axis in scales[0]["axes"]).upper()
    first = scales[0]["datasets"][0]
    sizes = [item["scale"] for item in first.get("coordinateTransformations", []) if item["type"] == "scale"]
    return node[first["path"]], axes, dict(zip(axes, sizes[0], strict=True)) if sizes else {}


class ZarrImage:
    """One image (H, W, C) of a Zarr array with named axes, read chunk by chunk."""

    def __init__(self, array: Any, axes: str, place: dict[str, int]) -> None:
        self._array, self._axes, self._place = array, axes, place
        channels = array.shape[axes.index("C")] if "C" in axes else 1
        self.shape = (array.shape[axes.index("Y")], array.shape[axes.index("X")], channels)
        self.dtype = np.dtype(np.uint8) if array.dtype == bool else array.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        block = self._array[tuple(rows if axis == "Y" else self._place.get(axis, slice(None)) for axis in self._axes)]
        left = [axis for axis in self._axes if axis not in self._place]
        block = np.asarray(block).transpose([left.index(axis) for axis in "YXC" if axis in left])
        block = block * np.uint8(255) if block.dtype == bool else block
        return block if "C" in left else block[..., None]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All pixels."""
        return self[:].astype(dtype or self.dtype, copy=False)


def _read_tiff(path: Path) -> list[Rows]:
    """Frames of all series of a TIFF."""
    import tifffile

    with _tifffile_errors(path), tifffile.TiffFile(path) as tif:
        len(tif.pages)  # walks the chain of pages: a broken link is logged here
        return [frame for series in tif.series for frame in _frames(path, series)]


def _frames(path: Path, series: Any) -> list[Rows]:
    """Frames of a series: mapped where the pixels lie in one piece, else read by strips or tiles."""
    if series.dataoffset is not None:
        dtype = np.dtype(series.keyframe.parent.byteorder + series.dtype.char)
        return _split(np.memmap(path, dtype, "r", offset=series.dataoffset, shape=series.shape), series.axes, path)
    axes, of_page = series.axes, series.keyframe.axes
    outer = axes[: len(axes) - len(of_page)]
    if series.keyframe.compression != 1:
        tifffile_decompressors()[series.keyframe.compression]  # says here if a package is missing
    if not axes.endswith(of_page) or not set(of_page) <= set("YXS") or len(set("SC") & set(axes)) > 1:
        return _split(series.asarray(), axes, path)  # volumes in one page, and what is refused
    order = np.arange(math.prod(series.shape[: len(outer)])).reshape(series.shape[: len(outer)])
    if "C" in outer:
        order = np.moveaxis(order, outer.index("C"), -1)
    order = order.reshape(-1, order.shape[-1] if "C" in outer else 1)
    return [PagedImage(path, [series.pages[int(number)] for number in numbers]) for numbers in order]


def tifffile_decompressors() -> Any:
    """Table of tifffile's decompressors by number; a missing one raises KeyError with the package's name."""
    import tifffile

    return tifffile.TIFF.DECOMPRESSORS


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
        for page in range(len(self._where)):
            for index in self._overlapping(page, top, bottom):
                decoded = kept.get((page, index)) or self._segment(page, index)
                if bottom < self.shape[0]:  # the next rows may need it again
                    self._kept[page, index] = decoded
                self._place(out, top, page, *decoded)
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
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                segment, place, _ = self._decode(file.read(count) or None, index, **self._options[page])
        except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
            hint = "pip install imagecodecs" if "imagecodecs" in str(error) else "copy the file again"
            where = f"{self.path}, page {self._numbers[page]}"
            raise UserError(f"{where}: damaged ({str(error).strip() or type(error).__name__}): {hint}") from error
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


def _split(pixels: np.ndarray, axes: str, path: Path) -> list[np.ndarray]:
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
def _tifffile_errors(path: Path) -> Iterator[None]:
    """Raise where tifffile only logs that the chain of pages is broken, and would go on with fewer."""

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    logger, listen = logging.getLogger("tifffile"), Listen()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(listen)
    try:
        yield
    finally:
        logger.removeHandler(listen)
        logger.propagate = propagate
    broken = [message for message in messages if "TiffPages" in message]
    if broken:
        raise UserError(f"{path}: truncated or damaged ({broken[0].split('> ')[-1]}): copy the file again")


def _read_pillow(path: Path) -> list[np.ndarray]:
    """The one frame of a PNG, JPEG or BMP; palettes become the colours they stand for."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        if image.mode == "P":
            image = image.convert("RGB")
        pixels = np.asarray(image)
    if pixels.ndim == 2:
        return [pixels[..., None]]
    return [pixels[..., :-1] if pixels.shape[-1] in (2, 4) else pixels]


_READERS = {".npy": _read_npy, ".tif": _read_tiff, ".tiff": _read_tiff}


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
