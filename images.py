"""Image files, read as frames: TIFF stacks by tifffile, everything else by Pillow."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from utils import UserError, natural_key

TIFF = (".tif", ".tiff")
SUFFIXES = (*TIFF, ".png", ".jpg", ".jpeg", ".bmp")


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
        return read_frames(self.path)[self.index]


def list_frames(source: Path) -> list[Frame]:
    """Frames of a stack, or of all images in a folder in natural order.

    Parameters
    ----------
    source : Path
        A file, or a folder of files of `SUFFIXES`.

    Raises
    ------
    UserError
        There is no such file or folder, it holds no image, or an image can't be read.
    """
    if source.is_dir():
        files = [file for file in source.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != "."]
        if not files:
            raise UserError(f"{source}: no image in this folder: put {', '.join(SUFFIXES)} files there")
        files.sort(key=lambda file: natural_key(file.name))
    elif source.is_file():
        files = [source]
    else:
        raise UserError(f"{source}: no such file or folder: put the stack there, or name it by --input and --label")
    return [Frame(file, index) for file in files for index in range(_count(file))]


def _count(path: Path) -> int:
    """Number of frames in a file."""
    return len(read_frames(path)) if path.suffix.lower() in TIFF else 1


def read_frames(path: Path) -> list[np.ndarray]:
    """All frames of one file, (H, W, C) each, of the file's own type; one bit becomes 0 and 255.

    Uncompressed TIFF stacks are mapped, not loaded.

    Raises
    ------
    UserError
        The file is no image, is damaged or truncated, or has no page.
    """
    return _read_frames(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)  # the frames of one stack are asked for one after another
def _read_frames(path: Path, _version: int) -> list[np.ndarray]:
    suffix = path.suffix.lower()
    try:
        frames = _read_tiff(path) if suffix in TIFF else [_read_pillow(path)]
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


def _read_tiff(path: Path) -> list[np.ndarray]:
    """Frames of all series of a TIFF."""
    import tifffile

    with _tifffile_errors(path), tifffile.TiffFile(path) as tif:
        len(tif.pages)  # walks the chain of pages: a broken link is logged here
        return [frame for series in tif.series for frame in _split(_pixels(path, series), series.axes, path)]


def _pixels(path: Path, series: object) -> np.ndarray:
    """Pixels of a series: mapped where they lie in one piece, loaded where not."""
    if series.dataoffset is None:
        return series.asarray()
    dtype = np.dtype(series.keyframe.parent.byteorder + series.dtype.char)
    return np.memmap(path, dtype, "r", offset=series.dataoffset, shape=series.shape)


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


def _read_pillow(path: Path) -> np.ndarray:
    """(H, W, C) of a PNG, JPEG or BMP; palettes become the colours they stand for."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        if image.mode == "P":
            image = image.convert("RGB")
        pixels = np.asarray(image)
    if pixels.ndim == 2:
        return pixels[..., None]
    return pixels[..., :-1] if pixels.shape[-1] in (2, 4) else pixels


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
