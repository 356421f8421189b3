"""Image files and folders as frames (H, W, C); reads `.npy`, and others with tiff.py, zarr.py, bioio.py..."""

from __future__ import annotations

import glob
import math
import mmap
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from images.bioio import plugin_of, read_bioio
from images.foreign import ELSEWHERE, refusal
from images.geometry import Geometry, numbers_along
from images.hdf5 import HDF5, read_hdf5
from images.hdf5 import SIGNATURE as HDF5_SIGNATURE
from images.memory import check_size
from images.notes import say_notes
from images.pillow import Picture, picture_palette, read_picture
from images.rows import (
    Frames,
    Rows,
    Series,
    check_count,
    converted,
    full_name,
    listed,
    reraise_as_user_error,
    split,
    to_native,
)
from images.selection import Choice
from images.tiff import SIGNATURES as TIFF_SIGNATURES
from images.tiff import read_tiff
from images.zarr import is_zarr, read_zarr
from utils import UserError, natural_key

TIFF = (".tif", ".tiff", ".lsm", ".stk", ".btf", ".tf2", ".tf8", ".qptiff", ".flex", ".svs", ".scn", ".ndpi")
ARRAYS = (".npy", ".zarr", *HDF5)  # taken from a folder only if it contains no other images
SUFFIXES = (*TIFF, ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".czi", ".nd2", ".lif", *ARRAYS)
NUMPY = b"\x93NUMPY"  # first bytes

Source = str | Path | Sequence[str | Path]
ALL = Choice()
NUM_PICTURES = 2**13  # pictures, which hold no file open, whose headers are remembered
_pictures: dict[tuple, Frames] = {}  # by path, modification time and size


@dataclass(frozen=True, slots=True)
class Frame:
    """One image: a page of a stack, or a file in a folder."""

    path: Path
    index: int  # in its file, from 0
    stack: int | None = None  # number of its Z stack in the file; None if the file contains one image
    channels: tuple[int, ...] = ()  # that are read, in their order; empty: all
    series: str = ""  # name of its series, such as the well and the field of a plate; empty if outputs do not need it

    def __str__(self) -> str:
        if self.series:
            return f"{full_name(self.path, self.series)}, image {self.index_in_series + 1}"
        if self.path.suffix.lower() in TIFF:
            return f"{self.path}, page {self.index + 1}"
        return str(self.path) if self.stack is None else f"{self.path}, image {self.index + 1}"

    def read(self) -> np.ndarray:
        """Pixels (H, W, C) of the frame in the type of the file; an alpha channel is dropped."""
        image = self.open()
        if not isinstance(image, np.ndarray):
            check_size(self, math.prod(image.shape) * image.dtype.itemsize)
        return np.asarray(image)

    def open(self) -> Rows:
        """Frame whose pixels are read when rows are requested."""
        image = read_file(self.path).images[self.index]
        return converted(image, lambda pixels: pixels[..., list(self.channels)]) if self.channels else image

    @property
    def series_number(self) -> int:
        """Number of the frame's series in its file, from 0."""
        return read_file(self.path).series_of(self.index)

    @property
    def index_in_series(self) -> int:
        """Index of the frame in its series, from 0."""
        return self.index - read_file(self.path).first_frame(self.series_number)

    @property
    def numbers(self) -> dict[str, int]:
        """Number of the frame along each axis of its series, such as T and Z, from 1; without axes of length 1."""
        if self.stack is None:
            return {}
        series = read_file(self.path).series[self.series_number]
        return numbers_along(series.axes, series.lengths, self.index_in_series)

    @property
    def name(self) -> str:
        """Name for an output of this frame: of its file, and of its series; without the index in a stack."""
        series = re.sub(r"[^\w.]+", "-", self.series).strip("-.")
        return f"{self.path.stem}-{series}" if series else self.path.stem


def list_frames(source: Source, choice: Choice = ALL) -> list[Frame]:
    """Frames of a stack, or of all images in a folder in natural order.

    A source is a file, a folder of files, a pattern of files such as `images/*.tif` or `data/**/img.tif`, or several of
    these. Folders and patterns yield files with known suffixes, `.npy`, `.zarr` and `.h5` only if there are no others.
    A data set of HDF5 files is named by `file.h5:/path`, which is a choice of the series.
    """
    frames: list[Frame] = []
    notes: list[tuple[Path, str]] = []
    listed_files: set[tuple[Path, str]] = set()
    for file, inner in list_files(source):
        if (file.resolve(), inner) in listed_files:  # a part of an image in several files
            continue
        contents = read_file(file)
        listed_files |= {(other.resolve(), "") for other in contents.files - {file}}
        frames += frames_of_file(file, inner, choice)
        notes += [(file, note) for note in contents.notes_of(choice.series or inner)]
    say_notes(notes)
    return frames


def frames_of_file(file: Path, inner: str, choice: Choice) -> list[Frame]:
    """Chosen frames of one file, or of the data set `inner` in it if that is not empty."""
    contents = read_file(file)
    if inner:
        choice = _with_data_set(file, inner, contents, choice)
    # sections that were left out are neighbours, too; other series, such as a thumbnail, make no stack
    num_frame = sum(contents.series[number].num_frame for number in choice.series_numbers(file, contents))
    channels: dict[int, tuple[int, ...]] = {}
    frames = []
    for index in choice.frames(file, contents):
        number = contents.series_of(index)
        if number not in channels:
            channels[number] = choice.channels(file, contents, index)
        stack = contents.stacks[index] if num_frame > 1 else None
        series = contents.series[number].name if contents.named else ""
        frames.append(Frame(file, index, stack, channels[number], series))
    return frames


def _with_data_set(file: Path, name: str, contents: Frames, choice: Choice) -> Choice:
    """Choice of the data set that is named by `file.h5:/path`."""
    names = [series.name for series in contents.series]
    if contents.kind != "HDF5":
        raise UserError(f"{file}:{name}: {file} is no HDF5 file: leave out :{name}")
    if choice.series:
        raise UserError(f"{file}:{name} --series {choice.series}: each chooses a data set: leave one out")
    if name not in names:
        named = listed([full_name(file, name) for name in names]) or "it holds none"
        raise UserError(f"{file}:{name}: no such data set: name one of them ({named})")
    return replace(choice, series=str(names.index(name)))


def is_one_file(source: Source) -> bool:
    """Whether images are the pages of one file, or of a data set in it."""
    return isinstance(source, str | Path) and Path(_split_inner(str(source))[0]).is_file()


def _split_inner(source: str) -> tuple[str, str]:
    """File, or pattern of files, and path of the data set in it of a source `file.h5:/path`."""
    file, mark, inner = source.rpartition(":/")
    if mark and not Path(source).exists() and (Path(file).is_file() or file.lower().endswith(HDF5)):
        return file, f"/{inner.strip('/')}"
    return source, ""


def list_files(source: Source) -> list[tuple[Path, str]]:
    """Files of a source in natural order, each with the path of the data set that is named in it, or an empty one."""
    sources = [source] if isinstance(source, (str, Path)) else source
    files = [file for one in sources for file in _files(str(one))]
    if len(sources) > 1:  # a shell expands a pattern to files in plain order
        files = sorted(dict.fromkeys(files), key=lambda file: (natural_key(str(file[0])), file[1]))
    return files


def _files(source: str) -> list[tuple[Path, str]]:
    """Files of one source in natural order, each with the path of the data set that is named in it."""
    source, inner = _split_inner(source)
    path = Path(source)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://?[^/]", source) and not Path(source.partition(":")[0]).exists():
        raise UserError(f"{source}: URLs are not read: download it, and name the file")
    is_folder = path.is_dir() and not is_zarr(path)
    if path.exists() and not is_folder:
        _check_kind(path)
        return [(path, inner)]
    candidates = list(path.iterdir()) if is_folder else _matching(source)
    images = [file for file in candidates if file.suffix.lower() in SUFFIXES and file.name[0] != "."]
    files = [file for file in images if file.suffix.lower() not in ARRAYS] or images
    if not files:
        if not candidates and not is_folder:
            raise UserError(f"{source}: this pattern matches nothing: check it and the current folder")
        what = "no image in this folder" if is_folder else "this pattern matches no image"
        raise UserError(f"{source}: {what}: {', '.join(SUFFIXES)} are read")
    for file in files:
        _check_kind(file)
    return [(file, inner) for file in sorted(files, key=lambda file: natural_key(str(file)))]


def _matching(pattern: str) -> list[Path]:
    """Paths that match a pattern. An existing folder is not a pattern, whatever its name."""
    path = Path(pattern)
    folder = next(parent for parent in path.parents if parent.is_dir() or parent == parent.parent)
    inner = str(path.relative_to(folder))
    if not glob.has_magic(inner):
        raise UserError(f"{pattern}: no such file or folder: check the path")
    return [folder / name for name in glob.glob(inner, root_dir=folder, recursive=True)]  # noqa: PTH207 (`a**`)


def _check_kind(path: Path) -> None:
    """Refuse anything but a file or Zarr: opening a pipe may wait forever, and it can't be read twice."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}): check it, or move it elsewhere") from error
    if not stat.S_ISREG(mode) and not is_zarr(path):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        advice = "name files" if stat.S_ISDIR(mode) else "save the image to a file, and name that"
        raise UserError(f"{path}: is {kind}, not an image file: {advice}")


def number_stacks(frames: list[Frame]) -> list[int]:
    """Number of the stack that each frame is of, from 0 in the order of their first frames.

    A stack runs along Z within one series, position and time of a file. Consecutive files of one image each form one
    stack.
    """
    numbers: dict[tuple, int] = {}
    keys: list[tuple] = []
    run = 0  # number of files with several images until now: they end a stack of single files
    for frame in frames:
        run += frame.stack is not None
        keys.append((None, run) if frame.stack is None else (frame.path, frame.stack))
        numbers.setdefault(keys[-1], len(numbers))
    return [numbers[key] for key in keys]


def with_neighbours(frames: list[Frame], radius: int) -> list[list[Frame]]:
    """Context of each frame: itself and `radius` frames above and below, repeating the last one at the end of a stack.

    For what a stack is, see `number_stacks`. Frames of a file that were not chosen are neighbours, too.
    """
    if not radius:
        return [[frame] for frame in frames]
    stacks: dict[int, list[Frame]] = {}
    positions: dict[tuple[int, Path, int], int] = {}  # of frames in their stacks
    numbers = number_stacks(frames)
    for number, frame in zip(numbers, frames, strict=True):
        members = stacks.setdefault(number, [])
        if frame.stack is None:
            members.append(frame)
        elif not members:
            of_file = enumerate(read_file(frame.path).stacks)
            members += [replace(frame, index=index) for index, stack in of_file if stack == frame.stack]
    for number, members in stacks.items():
        positions |= {(number, frame.path, frame.index): position for position, frame in enumerate(members)}
    contexts = []
    for number, frame in zip(numbers, frames, strict=True):
        members, position = stacks[number], positions[number, frame.path, frame.index]
        near = np.clip(np.arange(position - radius, position + radius + 1), 0, len(members) - 1)
        contexts.append([replace(members[index], channels=frame.channels) for index in near])
    return contexts


def read_geometry(frames: list[Frame]) -> Geometry:
    """Axes and pixel size of frames of one file, with an axis P if they are of several series; of others only Z."""
    path, geometry = frames[0].path, Geometry()
    if all(frame.path == path for frame in frames):
        indices: dict[int, list[int]] = {}  # in each series
        contents = read_file(path)
        for frame in frames:
            number = contents.series_of(frame.index)
            indices.setdefault(number, []).append(frame.index - contents.first_frame(number))
        parts = [contents.series[number].geometry().of_frames(chosen) for number, chosen in indices.items()]
        geometry = parts[0]
        if len(parts) > 1 and len({(part.axes, part.lengths) for part in parts}) == 1:
            geometry = replace(geometry, axes=f"P{geometry.axes}", lengths=(len(parts), *geometry.lengths))
    if math.prod(geometry.lengths) != len(frames):
        geometry = replace(geometry, axes="Z" * (len(frames) > 1), lengths=(len(frames),) * (len(frames) > 1))
    if len({frame.series for frame in frames}) > 1:
        labels = tuple(frame.series for frame in frames) if all(frame.series for frame in frames) else ()
        geometry = replace(geometry, labels=labels)
    return geometry


def geometries_of(frames: Sequence[Frame]) -> list[Geometry]:
    """Geometry of each frame, which is read once for each series of a file."""
    series = [(frame.path, frame.series_number) for frame in frames]
    geometries: dict[tuple[Path, int], Geometry] = {}
    for key, frame in zip(series, frames, strict=True):
        if key not in geometries:
            geometries[key] = read_geometry([frame])
    return [geometries[key] for key in series]


def drop_cached_pages(image: Rows) -> None:
    """Drop the pages of a memory-mapped file that have been read; they would count as memory of this process."""
    mapped = getattr(image, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def files_of(frames: list[Frame]) -> list[Path]:
    """All files that frames are read from; an OME-TIFF may have more than the named one."""
    paths = dict.fromkeys(frame.path for frame in frames)
    return list(dict.fromkeys(file for path in paths for file in (path, *sorted(read_file(path).files))))


def read_file(path: Path) -> Frames:
    """All frames of one file in its own type, also those that are left out by default; one bit becomes 0 and 255.

    Pixels are mapped, or read when rows are requested. The format is known by the first bytes, not by the name.
    """
    _check_kind(path)
    status = path.stat()
    version = path, status.st_mtime_ns, status.st_size
    if version in _pictures:
        return _pictures[version]
    contents = _read_version(*version)
    if isinstance(contents.images[0], Picture):
        if len(_pictures) >= NUM_PICTURES:
            _pictures.clear()
        _pictures[version] = contents
    return contents


@lru_cache(maxsize=4)  # the frames of one stack are requested one after another
def _read_version(path: Path, *_version: int) -> Frames:
    """Frames of a file as of its modification time and size, which are part of the cache's key."""
    damaged = f"{path}: can't be read as an image, is damaged or truncated"
    with reraise_as_user_error(damaged, "check or replace the file"):
        contents = _reader(path)(path)
    images, series = contents.images, contents.series
    if not images and len(series) == 1 and contents.kind != "HDF5":
        raise UserError(f"{path}: {series[0].problem}")
    if not images and any(one.problem for one in series):
        problems = "; ".join(f"{one.name}: {one.problem}" for one in series[:5])
        raise UserError(f"{path}: holds no image ({problems})")
    if not images or any(0 in image.shape for image in images):
        raise UserError(f"{path}: holds no page with pixels: check or replace the file")
    if any(image.dtype.kind not in "uif" for image in images):
        raise UserError(f"{path}: pixels of {images[0].dtype.name}: they must be real numbers")
    return contents


def _reader(path: Path) -> Callable[[Path], Frames]:
    """Reader of the format of a file, as its first bytes say."""
    if path.is_dir():
        return read_zarr
    suffix = path.suffix.lower()
    if suffix in ELSEWHERE and not ELSEWHERE[suffix].package:
        raise refusal(path)
    if suffix in ELSEWHERE:
        return partial(read_bioio, plugin=None)
    with path.open("rb") as file:
        first = file.read(16)
    for signatures, reader in ((TIFF_SIGNATURES, read_tiff), (NUMPY, _read_npy), (HDF5_SIGNATURE, read_hdf5)):
        if first.startswith(signatures):
            return reader
    plugin = plugin_of(first)
    return partial(read_bioio, plugin=plugin) if plugin else _read_other


def _read_other(path: Path) -> Frames:
    """Frames of a picture, or of a file that only a plug-in of bioio may know."""
    return read_picture(path, is_named_so=path.suffix.lower() in SUFFIXES) or read_bioio(path, plugin=None)


def _read_npy(path: Path) -> Frames:
    """Frames of an array (H, W), (N, H, W) or (N, H, W, C); three axes are (H, W, C) if the last is 1 to 4 long."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        if "Python objects" in str(error):
            what = "Python objects, as Cellpose's _seg.npy holds them, and no pixels"
            advice = "save the masks as PNG or TIFF (in Cellpose: File > Save masks)"
            raise UserError(f"{path}: {what}: {advice}") from error
        raise
    axes = {2: "YX", 3: "YXC" if array.shape[-1] <= 4 else "ZYX", 4: "ZYXC"}.get(array.ndim, "")
    if not axes or array.dtype.kind not in "uifb":
        what = f"shape {array.shape} of {array.dtype.name}"
        raise UserError(f"{path}: {what}: must be (H, W), (N, H, W) or (N, H, W, C) numbers")
    lengths = array.shape[: axes.index("Y")]
    check_count(path, lengths)
    images: list[Rows] = list(split(array, axes, path))
    if to_native(array[:0]).dtype != array.dtype:
        images = [converted(image, to_native) for image in images]
    frames = Frames(kind="NumPy array")
    frames.add(images, Series("", axes[: len(lengths)], lengths))
    return frames


def read_palette(frame: Frame) -> tuple[np.ndarray, np.ndarray] | None:
    """Indices (H, W) and colours (N, 3) uint8 of a frame stored with a palette; None for other frames."""
    contents = read_file(frame.path)
    if contents.palette is not None:
        return frame.read()[..., 0], contents.palette
    image = contents.images[frame.index]
    return picture_palette(frame.path) if isinstance(image, Picture) and image.has_palette else None


def is_indexed(frame: Frame) -> bool:
    """Whether the grey values of a frame are the indices of a palette of colours, in which viewers show it."""
    palette = read_file(frame.path).palette
    return palette is not None and bool((palette != palette[:, :1]).any())


def forget_files() -> None:
    """Close the files read last, which otherwise stay memory-mapped."""
    _read_version.cache_clear()
    _pictures.clear()
