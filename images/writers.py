"""Files that a prediction is written to, band by band: TIFF, NumPy, PNG and OME-Zarr."""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from images.geometry import Geometry
from images.zarr import is_zarr
from utils import UserError, atomic_write, cannot_write, check_module, partial_of

TIFF = (".tif", ".tiff")
ORDER = {".tif": "TZC", ".tiff": "TZC", ".zarr": "TCZ"}  # of the axes before Y and X: ImageJ's, and OME-Zarr's
BIG = 2**32 - 2**25  # [bytes] a larger TIFF needs 64-bit offsets: BigTIFF
CHUNK = 512  # [px] widest chunk of a Zarr array
# entries of the folders that ZarrWriter makes, also those that a killed process, or an earlier version, left in them
PARTIAL = r"\.[0-9a-f]{32}\.partial"
OWN = rf"(\d+/)?zarr(\.json|{PARTIAL})|\d+(/c(/\d+)*({PARTIAL})?)?|\.run\.json|\.bands(/\d+-\d+)?"


@dataclass(frozen=True)
class Layout:
    """What a file is to hold.

    Attributes
    ----------
    shape : (int, int, int, int)
        Frames, channels, height and width.
    dtype : numpy.dtype
        uint8, float32 or uint32.
    geometry : Geometry
        What the frames are counted along, as in the input, the size of a pixel, and the frames' names.
    labels : bool
        Whether values are classes or objects, which no picture of less resolution may average.
    order : str
        Order that the format asks for of the axes before Y and X; empty: as in the input, then the channels.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype
    geometry: Geometry = field(default_factory=Geometry)
    labels: bool = False
    order: str = ""

    @property
    def counted(self) -> dict[str, int]:
        """Axes that the frames are counted along, in the input's order, and their lengths; Z for those of no format."""
        axes = dict(zip(self.geometry.axes, self.geometry.lengths, strict=True))
        if set(axes) <= set(self.order or axes) and math.prod(axes.values()) == self.shape[0]:
            return axes
        return {"Z": self.shape[0]} if self.shape[0] > 1 else {}

    @property
    def lead(self) -> dict[str, int]:
        """Axes of the file before Y and X, in its order, and their lengths."""
        axes = self.counted | ({"C": self.shape[1]} if self.shape[1] > 1 else {})
        return {axis: axes[axis] for axis in sorted(axes, key=(self.order or "".join(axes)).index)}

    @property
    def axes(self) -> str:
        """Letters of the axes of the file."""
        return "".join(self.lead) + "YX"

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Lengths of the axes of the file."""
        return (*self.lead.values(), *self.shape[2:])

    @property
    def num_byte(self) -> int:
        """Size of the pixels."""
        return math.prod(self.shape) * self.dtype.itemsize

    def place(self, frame: int, channel: Any) -> tuple[Any, ...]:
        """Index of a channel of a frame, along the axes before Y and X."""
        lengths = tuple(self.counted.values())
        numbers = np.unravel_index(frame, lengths) if lengths else ()
        index = dict(zip(self.counted, map(int, numbers), strict=True)) | {"C": channel}
        return tuple(index[axis] for axis in self.lead)

    def plane(self, frame: int, channel: int) -> int:
        """Number of the plane (H, W) of a channel of a frame in the file."""
        number = 0
        for index, length in zip(self.place(frame, channel), self.lead.values(), strict=True):
            number = number * length + index
        return number


def check_apart(goals: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse a goal that is an input, holds one, or lies in one; a level of a Zarr stands for the whole of it.

    Parameters
    ----------
    goals : iterable of Path
        Files and folders that are written or removed.
    inputs : iterable of Path
        Files and Zarr folders.

    Raises
    ------
    UserError
        Such a goal, or one whose path is a link to itself.
    """
    roots = {_outermost_zarr(path.resolve()) for path in set(inputs)}
    own = {_identity(root): root for root in roots}
    around = {_identity(parent): root for root in roots for parent in root.parents}
    parents: dict[Path, Path | None] = {}  # the input that a folder is
    for goal in goals:
        try:
            real = goal.resolve()
        except (OSError, RuntimeError) as error:
            raise UserError(f"--output {goal}: a link in this path leads to itself: choose another") from error
        for parent in real.parents:
            if parent not in parents:
                parents[parent] = own.get(_identity(parent))
        key = _identity(real)
        hit = own.get(key) or around.get(key) or next(filter(None, map(parents.get, real.parents)), None)
        if hit:
            raise UserError(f"--output {goal} would replace the input {hit}, hold it or lie in it: choose another")


def _outermost_zarr(path: Path) -> Path:
    """The Zarr that an array or group is a part of, or the path itself."""
    while is_zarr(path.parent):
        path = path.parent
    return path


def _identity(path: Path) -> Any:
    """What tells files apart, however their paths are written; the path where there is none."""
    try:
        status = path.stat()
    except OSError:
        return path
    return (status.st_dev, status.st_ino) if status.st_ino else path


def old_of(path: Path) -> Path:
    """Where an older Zarr waits while the new one takes its name."""
    return path.with_name(f"{path.name}.old")


def written_at(goal: Path) -> list[Path]:
    """What a writer of one file or Zarr writes, replaces or removes."""
    return [goal, partial_of(goal), *([old_of(goal)] if goal.suffix.lower() == ".zarr" else [])]


def check_replaceable(goal: Path) -> None:
    """Refuse a goal whose place is taken by what no run of this program wrote.

    Raises
    ------
    UserError
        A folder, pipe or device where a file is written, or where a Zarr is, anything but a Zarr image of this program
        with nothing else in it.
    """
    advice = "move it, or choose another --output"
    if goal.suffix.lower() != ".zarr":
        for path in written_at(goal):
            if path.is_dir() and not (path.is_symlink() and path != goal):
                raise UserError(f"{path} is a folder: {advice}, one that ends with / for PNGs in a folder")
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is no file: {advice}")
        return
    for path in written_at(goal):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise UserError(f"{path} is no folder of a Zarr image: {advice}")
        if path.exists() and (foreign := _foreign_entry(path)):
            raise UserError(f"{path} is no Zarr image that --mode predict wrote (it holds {foreign}): {advice}")
    if goal.exists() and not (goal / "zarr.json").is_file():
        raise UserError(f"{goal} is no Zarr image that --mode predict wrote: {advice}")


def _foreign_entry(folder: Path) -> str:
    """Name of an entry that no ZarrWriter makes; empty where there is none."""
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            entry = Path(root, name)
            if entry.is_symlink() or not re.fullmatch(OWN, entry.relative_to(folder).as_posix()):
                return str(entry.relative_to(folder))
    return ""


class Writer:
    """Takes bands in any order, also from several processes."""

    def write(self, frame: int, top: int, band: np.ndarray) -> None:
        """Write rows (C, h, W) of a frame, the first of which is `top`."""
        raise NotImplementedError

    def finish(self) -> None:
        """Give the file its name, when all processes have written."""

    def close(self) -> None:
        """See that what this process wrote is on the disk."""

    def discard(self) -> None:
        """Remove what was written, after an error."""


class FlatWriter(Writer):
    """A file whose pixels lie in one piece: an uncompressed TIFF or a `.npy`.

    Parameters
    ----------
    path : Path
        The goal.
    layout : Layout
        What it holds.
    first : bool
        Whether this process makes the file; the others open it when it is there.
    """

    def __init__(self, path: Path, layout: Layout, first: bool) -> None:
        self.path, self.partial, self.layout = path, partial_of(path), layout
        self.file: Any = None
        if first:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.partial.unlink(missing_ok=True)  # of a killed process, or a link, which is not followed
                with self.partial.open("x+b") as file:
                    (_start_tiff if path.suffix.lower() in TIFF else _start_npy)(file, layout, path.name)
            except OSError as error:
                self.discard()
                raise cannot_write(path, error) from error
            except BaseException:
                self.discard()
                raise

    def write(self, frame: int, top: int, band: np.ndarray) -> None:
        """Write rows (C, h, W) of a frame, the first of which is `top`."""
        try:
            if self.file is None:
                self.offset, self.dtype = _place_of(self.partial)
                self.file = open(self.partial, "r+b", buffering=0, opener=_no_link)  # noqa: SIM115
            band = np.ascontiguousarray(band, self.dtype)
            height, width = self.layout.shape[2:]
            for channel, rows in enumerate(band):
                row = self.layout.plane(frame, channel) * height + top
                self.file.seek(self.offset + row * width * self.dtype.itemsize)
                view = memoryview(rows).cast("B")
                while view:
                    view = view[self.file.write(view) :]
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def finish(self) -> None:
        """Give the file its name."""
        try:
            self.close()
            self.partial.replace(self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """See that what this process wrote is on the disk."""
        if self.file is not None:
            with self.file:
                os.fsync(self.file.fileno())
            self.file = None

    def discard(self) -> None:
        """Remove the partial file."""
        self.close()
        with suppress(OSError):
            self.partial.unlink()


def _no_link(path: str, flags: int) -> int:
    """Descriptor of a file that is no link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _start_npy(file: IO[bytes], layout: Layout, _name: str) -> None:
    """Write the header of a `.npy`, and reserve its pixels."""
    header = {"descr": layout.dtype.str, "fortran_order": False, "shape": layout.full_shape}
    np.lib.format.write_array_header_2_0(file, header)
    file.truncate(file.tell() + layout.num_byte)


def _start_tiff(file: IO[bytes], layout: Layout, name: str) -> None:
    """Write a TIFF with no pixels yet: ImageJ's where that holds type and size, else OME-TIFF, BigTIFF over 4 GB."""
    import tifffile

    big, ome = layout.num_byte >= BIG, Path(name.lower()).stem.endswith(".ome")
    imagej = not (big or ome or layout.dtype == np.uint32)
    describe = _imagej_metadata if imagej else _ome_metadata
    pixel = layout.geometry.pixel
    options: dict[str, Any] = {}
    if {"X", "Y"} <= pixel.keys():
        in_cm = layout.geometry.unit == "micron" and not imagej  # ImageJ's files name the unit themselves
        per = 1e4 if in_cm else 1
        options["resolution"] = (per / pixel["X"], per / pixel["Y"])
        options["resolutionunit"] = "CENTIMETER" if in_cm else "NONE"
    metadata = {"axes": layout.axes} | describe(layout)
    with tifffile.TiffWriter(file, bigtiff=big, imagej=imagej, ome=not imagej) as tif:
        tif.write(
            None, shape=layout.full_shape, dtype=layout.dtype, photometric="minisblack", metadata=metadata, **options
        )


def _imagej_metadata(layout: Layout) -> dict[str, Any]:
    """Sizes and names of frames in the words of ImageJ."""
    geometry = layout.geometry
    metadata: dict[str, Any] = {}
    if geometry.unit and geometry.unit.isascii():
        metadata["unit"] = geometry.unit
    if "Z" in geometry.pixel:
        metadata["spacing"] = geometry.pixel["Z"]
    if geometry.interval:
        metadata["finterval"] = geometry.interval
    if len(geometry.labels) == layout.shape[0]:
        planes = {layout.plane(f, c): label for f, label in enumerate(geometry.labels) for c in range(layout.shape[1])}
        metadata["Labels"] = [planes[n].encode("utf-16", "replace").decode("utf-16") for n in sorted(planes)]
    return metadata


def _ome_metadata(layout: Layout) -> dict[str, Any]:
    """Sizes in the words of OME."""
    geometry = layout.geometry
    unit = {"micron": "µm"}.get(geometry.unit, geometry.unit)
    metadata: dict[str, Any] = {f"PhysicalSize{axis}": size for axis, size in geometry.pixel.items()}
    metadata |= {f"PhysicalSize{axis}Unit": unit for axis in geometry.pixel if unit}
    metadata |= {"TimeIncrement": geometry.interval, "TimeIncrementUnit": "s"} if geometry.interval else {}
    return metadata


def _place_of(path: Path) -> tuple[int, np.dtype]:
    """Where the pixels of a flat file begin, and their type with its byte order."""
    if path.suffixes[-2].lower() in TIFF:
        import tifffile

        with tifffile.TiffFile(path) as tif:
            series = tif.series[0]
            assert series.dataoffset is not None  # it was written in one piece
            return series.dataoffset, np.dtype(tif.byteorder + series.dtype.char)
    array = np.lib.format.open_memmap(path, mode="r")
    return array.offset or 0, array.dtype


def png_files(path: Path, channels: int) -> list[Path]:
    """Files of a frame: one, or one a channel."""
    if channels == 1:
        return [path]
    return [path.with_name(f"{path.stem}-class{channel}{path.suffix}") for channel in range(channels)]


class PngWriter(Writer):
    """One PNG a frame, or with several channels one a channel; each appears when it is whole.

    Parameters
    ----------
    names : list of Path
        File of each frame; their folder is made. Objects become 16-bit PNGs.
    heights : list of int
        Of each frame [px].
    """

    def __init__(self, names: list[Path], heights: list[int]) -> None:
        self.names, self.heights = names, heights
        self._frames: dict[int, np.ndarray] = {}
        self._missing: dict[int, int] = {}

    def write(self, frame: int, top: int, band: np.ndarray) -> None:
        """Take rows (C, h, W) of a frame; the file appears when all of them are there."""
        height = self.heights[frame]
        pixels = self._frames.setdefault(frame, np.empty((len(band), height, band.shape[2]), band.dtype))
        pixels[:, top : top + band.shape[1]] = band
        self._missing[frame] = self._missing.get(frame, height) - band.shape[1]
        if not self._missing[frame]:
            self._save(self.names[frame], self._frames.pop(frame))

    def _save(self, name: Path, pixels: np.ndarray) -> None:
        from PIL import Image

        if pixels.dtype == np.uint32 and pixels.max() >= 2**16:
            raise UserError(f"{name}: {pixels.max()} objects, a PNG counts to 65535: write .tif, .npy or .zarr")
        pixels = pixels.astype(np.uint16) if pixels.dtype == np.uint32 else pixels
        for path, plane in zip(png_files(name, len(pixels)), pixels, strict=True):
            with atomic_write(path) as file:
                Image.fromarray(plane).save(file, format="png")


class ZarrWriter(Writer):
    """An OME-Zarr 0.5 image with a pyramid, written to `NAME.partial` and renamed when it is whole.

    An older image waits as `NAME.old` until the new one has its name. What a killed process left is put right by the
    next writer, which must hold the lock of the goal, and have called `check_replaceable`.

    Parameters
    ----------
    path : Path
        The goal.
    layout : Layout
        What it holds.
    first : bool
        Whether this process makes the array; the others open it when it is there.
    tall : int
        Height of a band and of a chunk [px].
    chunk : int
        Widest chunk, and widest image that the pyramid ends with [px].
    """

    def __init__(self, path: Path, layout: Layout, first: bool, tall: int, chunk: int = CHUNK) -> None:
        check_module("zarr", str(path))
        import zarr

        self.path, self.partial, self.layout, self._zarr = path, partial_of(path), layout, zarr
        self.chunk = chunk
        self._array: Any = None
        if first:
            try:
                self._mend()
                self.partial.mkdir(parents=True)
                self._create("0", layout.full_shape, tall)
            except OSError as error:
                self.discard()
                raise cannot_write(path, error) from error
            except BaseException:
                self.discard()
                raise

    def _mend(self) -> None:
        """Leave the image that stands under the name, or the older one if none does, and nothing else."""
        old = old_of(self.path)
        if (old / "zarr.json").is_file() and not self.path.exists():
            old.rename(self.path)
        for folder in (old, self.partial):
            if folder.is_dir():
                (folder / "zarr.json").unlink(missing_ok=True)  # from now on it is no image to be put back
                shutil.rmtree(folder)

    def _create(self, name: str, shape: tuple[int, ...], tall: int) -> Any:
        lead = len(shape) - 2
        chunks = (*[1] * lead, min(tall, shape[-2]), min(self.chunk, shape[-1]))
        return self._zarr.create_array(
            self.partial / name,
            shape=shape,
            dtype=self.layout.dtype,
            chunks=chunks,
            dimension_names=list(self.layout.axes.lower()),
        )

    def write(self, frame: int, top: int, band: np.ndarray) -> None:
        """Write rows (C, h, W) of a frame, the first of which is `top`."""
        try:
            if self._array is None:
                self._array = self._zarr.open_array(self.partial / "0", mode="r+")
            place, rows = self.layout.place(frame, slice(None)), slice(top, top + band.shape[1])
            self._array[(*place, rows)] = band if len(band) > 1 else band[0]
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def finish(self) -> None:
        """Add the pyramid and the description, and give the folder its name."""
        try:
            scales = self._pyramid()
            group = self._zarr.open_group(self.partial, mode="a")
            group.attrs["ome"] = {"version": "0.5", "multiscales": [self._description(scales)]}
            if self.path.exists():
                self.path.rename(old_of(self.path))
            self.partial.rename(self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.discard()

    def discard(self) -> None:
        """Remove what was written, and the older image if there is a newer one."""
        with suppress(OSError):
            self._mend()

    def _pyramid(self) -> list[tuple[float, float]]:
        """Write the smaller levels, each half as high and wide; return their factors along Y and X."""
        array = self._zarr.open_array(self.partial / "0", mode="r")
        scales = [(1.0, 1.0)]
        while max(array.shape[-2:]) > self.chunk:
            tall = array.chunks[-2]
            half = (*array.shape[:-2], -(-array.shape[-2] // 2), -(-array.shape[-1] // 2))
            smaller = self._create(str(len(scales)), half, tall)
            for place in np.ndindex(array.shape[:-2]):
                for top in range(0, half[-2], tall):
                    rows = np.asarray(array[(*place, slice(2 * top, 2 * (top + tall)))])
                    smaller[(*place, slice(top, top + tall))] = _halved(rows, self.layout.labels)
            scales.append((scales[-1][0] * 2, scales[-1][1] * 2))
            array = smaller
        return scales

    def _description(self, scales: list[tuple[float, float]]) -> dict[str, Any]:
        """Entry `multiscales` of the specification, https://ngff.openmicroscopy.org/0.5."""
        axes, geometry = self.layout.axes, self.layout.geometry
        kinds = {"T": "time", "C": "channel"}
        units = {"time": "second" if geometry.interval else None}
        units |= {"space": {"micron": "micrometer"}.get(geometry.unit)}
        named: list[dict[str, str]] = [{"name": axis.lower(), "type": kinds.get(axis, "space")} for axis in axes]
        for axis in named:
            if unit := units.get(axis["type"]):
                axis["unit"] = unit
        sizes = geometry.pixel | {"T": geometry.interval or 1.0}
        datasets = []
        for level, (y, x) in enumerate(scales):
            factors = {"Y": y, "X": x}
            scale = [sizes.get(axis, 1.0) * factors.get(axis, 1.0) for axis in axes]
            datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
        return {"name": self.path.stem, "axes": named, "datasets": datasets}


def _halved(rows: np.ndarray, labels: bool) -> np.ndarray:
    """Rows (h, W) at half the size: every second pixel of labels, else the mean of 2x2."""
    if labels:
        return rows[::2, ::2]
    even = np.pad(rows, [(0, size % 2) for size in rows.shape], mode="edge").astype(np.float32)
    mean = (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4
    return mean if rows.dtype.kind == "f" else np.round(mean).astype(rows.dtype)


class RowFile:
    """Rows of an image (H, W) float32 that are kept on the disk: appended first, then read by slices.

    Parameters
    ----------
    near : Path
        The file is made in its folder, without a name, so that nothing is left of it.
    """

    def __init__(self, near: Path) -> None:
        self.near, self.shape = near, (0, 0)

    def __enter__(self) -> RowFile:
        try:
            self.near.parent.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.near.parent)
        except OSError as error:
            raise cannot_write(self.near, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what was not written is not needed
            self._file.close()

    def append(self, rows: np.ndarray) -> None:
        """Add rows (h, W) at the bottom."""
        try:
            self._file.write(np.ascontiguousarray(rows, np.float32).data)
            self._file.flush()
        except OSError as error:
            raise cannot_write(self.near, error) from error
        self.shape = (self.shape[0] + len(rows), rows.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W) of a slice."""
        start, stop, _ = rows.indices(len(self))
        self._file.seek(start * self.shape[1] * 4)
        return np.fromfile(self._file, np.float32, (stop - start) * self.shape[1]).reshape(-1, self.shape[1])
