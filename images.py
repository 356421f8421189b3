"""Image files, read as frames (H, W, C): TIFF by tiff.py, Zarr by omezarr.py, everything else by NumPy and Pillow."""

from __future__ import annotations

import hashlib
import math
import mmap
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np

from omezarr import is_zarr, open_zarr, read_zarr
from tiff import in_micron, read_tiff, split, tiff_geometry, tiff_palette
from utils import UserError, natural_key

TIFF = (".tif", ".tiff")
SUFFIXES = (*TIFF, ".png", ".jpg", ".jpeg", ".bmp", ".gif")
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


def with_neighbours(frames: list[Frame], reach: int) -> list[list[Frame]]:
    """Each frame between those up to `reach` above and below it; where its stack ends, the last one again.

    Frames are of one stack where they are of one file, there of one time, and where each is a file of its own.
    """
    if not reach:
        return [[frame] for frame in frames]
    pages: dict[Path, list[Frame]] = {}
    for frame in frames:
        pages.setdefault(frame.path, []).append(frame)
    depth = {path: _depth(of_path) for path, of_path in pages.items() if len(of_path) > 1}
    around = []
    for _, run in groupby(frames, lambda f: (f.path, f.index // depth[f.path]) if f.path in depth else None):
        stack = list(run)
        places = np.clip(np.arange(len(stack))[:, None] + np.arange(-reach, reach + 1), 0, len(stack) - 1)
        around += [[stack[place] for place in row] for row in places]
    return around


def _depth(frames: list[Frame]) -> int:
    """Number of sections at each time, of the frames of a file."""
    axes, lengths, _, _ = read_geometry(frames)
    return lengths[-1] if axes.endswith("Z") else len(frames)


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
        array, letters, sizes = open_zarr(path)
        pixel, unit = in_micron(
            {k: size for k, (size, _) in sizes.items()}, {k: name for k, (_, name) in sizes.items()}
        )
        axes = "".join(axis for axis in letters if axis not in "CYX")
        lengths = tuple(array.shape[letters.index(axis)] for axis in axes)
    elif path.suffix.lower() in TIFF:
        axes, lengths, pixel, unit = tiff_geometry(path)
    if math.prod(lengths) != len(frames):
        axes, lengths = ("Z", (len(frames),)) if len(frames) > 1 else ("", ())
    return axes, lengths, pixel, unit


def release(image: Rows) -> None:
    """Let go of what was read of a mapped file, which else counts as this program's memory."""
    mapped = getattr(image, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _count(path: Path) -> int:
    """Number of frames in a file."""
    return len(read_frames(path)) if path.suffix.lower() in (*TIFF, *ARRAYS) or path.is_dir() else 1


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
    read = _READERS.get(suffix, read_zarr if path.is_dir() else _read_pillow)
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
    if any(frame.dtype.kind not in "uifb" for frame in frames):
        raise UserError(f"{path}: pixels of {frames[0].dtype}: they must be real numbers")
    return [frame * np.uint8(255) if frame.dtype == bool else frame for frame in frames]


def _read_npy(path: Path) -> list[np.ndarray]:
    """Frames of an array (H, W), (N, H, W) or (N, H, W, C); (H, W, C) where C is 1 to 4."""
    array = np.lib.format.open_memmap(path, mode="r")
    axes = {2: "YX", 3: "YXC" if array.shape[-1] <= 4 else "ZYX", 4: "ZYXC"}.get(array.ndim, "")
    if not axes or array.dtype.kind not in "uifb":
        raise UserError(
            f"{path}: shape {array.shape} of {array.dtype}: must be (H, W), (N, H, W) or (N, H, W, C) numbers"
        )
    return split(array, axes, path)


def _read_pillow(path: Path) -> list[np.ndarray]:
    """The one frame of a PNG, JPEG, BMP or GIF; palettes become the colours they stand for."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        if image.format == "GIF" and image.n_frames > 1:
            raise UserError(f"{path}: {image.n_frames} images in one file: save them as a TIFF stack")
        if image.mode == "P":
            image = image.convert("RGB")
        pixels = np.asarray(image)
    if pixels.ndim == 2:
        return [pixels[..., None]]
    return [pixels[..., :-1] if pixels.shape[-1] in (2, 4) else pixels]


def read_palette(frame: Frame) -> tuple[np.ndarray, np.ndarray] | None:
    """Indices (H, W) and colours (N, 3) uint8 of a frame that is stored with a palette; None for all others."""
    from PIL import Image

    path = frame.path
    if path.suffix.lower() in TIFF:
        colours = _tiff_palette(path, path.stat().st_mtime_ns)
        return None if colours is None else (frame.read()[..., 0], colours)
    try:
        with Image.open(path) as image:
            if image.mode != "P":
                return None
            indices, colours = np.asarray(image), np.reshape(image.getpalette("RGB"), (-1, 3))
    except Exception:  # reading it as an image says what is wrong
        return None
    read_frames(path)  # refuses what holds several images
    return indices, np.pad(colours, ((0, 256 - len(colours)), (0, 0))).astype(np.uint8)


@lru_cache(maxsize=4)
def _tiff_palette(path: Path, _version: int) -> np.ndarray | None:
    return tiff_palette(path)


def forget_files() -> None:
    """Let go of the files that were read last, which stay mapped else."""
    _read_frames.cache_clear()


_READERS = {".npy": _read_npy, ".tif": read_tiff, ".tiff": read_tiff}


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
