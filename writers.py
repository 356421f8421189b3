"""Files that a prediction is written to, band by band: TIFF, NumPy, PNG and OME-Zarr."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils import UserError, atomic_write, cannot_write, check_module, partial_of

TIFF = (".tif", ".tiff")
BIG = 2**32 - 2**25  # [bytes] a larger TIFF needs 64-bit offsets: BigTIFF
CHUNK = 512  # [px] widest chunk of a Zarr array


@dataclass(frozen=True)
class Layout:
    """What a file is to hold.

    Attributes
    ----------
    shape : (int, int, int, int)
        Frames, channels, height and width.
    dtype : numpy.dtype
        uint8, float32 or uint32.
    axes : str
        Letters of the axes that the frames are counted along, as in the input: `""`, `"Z"`, `"TZ"`...
    lengths : tuple of int
        Their lengths; the product is the number of frames.
    pixel : dict
        Size of a pixel along X, Y and Z, where it is known, in `unit`.
    unit : str
        `micron`, or another that no unit of length is known for.
    labels : bool
        Whether values are classes or objects, which no picture of less resolution may average.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype
    axes: str = ""
    lengths: tuple[int, ...] = ()
    pixel: dict[str, float] = field(default_factory=dict)
    unit: str = ""
    labels: bool = False

    @property
    def all_axes(self) -> str:
        """Letters of the axes of the file."""
        return f"{self.axes}{'C' if self.shape[1] > 1 else ''}YX"

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Lengths of the axes of the file."""
        return (*self.lengths, *(self.shape[1:2] if self.shape[1] > 1 else ()), *self.shape[2:])

    @property
    def num_byte(self) -> int:
        """Size of the pixels."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


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
            make = _start_tiff if path.suffix.lower() in TIFF else _start_npy
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                make(self.partial, layout)
            except OSError as error:
                self.discard()
                raise cannot_write(path, error) from error
            except BaseException:
                self.discard()
                raise

    def write(self, frame: int, top: int, band: np.ndarray) -> None:
        """Write rows (C, h, W) of a frame, the first of which is `top`."""
        if self.file is None:
            self.offset, self.dtype = _place_of(self.partial)
            self.file = self.partial.open("r+b", buffering=0)
        _, channels, height, width = self.layout.shape
        band = np.ascontiguousarray(band, self.dtype)
        try:
            for channel, rows in enumerate(band):
                row = (frame * channels + channel) * height + top
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


def _start_npy(path: Path, layout: Layout) -> None:
    """Write the header of a `.npy`, and reserve its pixels."""
    with path.open("wb") as file:
        header = {"descr": layout.dtype.str, "fortran_order": False, "shape": layout.full_shape}
        np.lib.format.write_array_header_2_0(file, header)
        file.truncate(file.tell() + layout.num_byte)


def _start_tiff(path: Path, layout: Layout) -> None:
    """Write a TIFF with no pixels yet: ImageJ's where that holds type and size, else OME-TIFF, BigTIFF over 4 GB."""
    import tifffile

    imagej = layout.num_byte < BIG and layout.dtype != np.uint32 and set(layout.axes) <= set("TZ")
    metadata: dict[str, Any] = {"axes": layout.all_axes}
    options: dict[str, Any] = {}
    if {"X", "Y"} <= layout.pixel.keys():
        in_cm = layout.unit == "micron" and not imagej  # ImageJ's files name the unit themselves
        per = 1e4 if in_cm else 1
        options["resolution"] = (per / layout.pixel["X"], per / layout.pixel["Y"])
        options["resolutionunit"] = "CENTIMETER" if in_cm else "NONE"
    if imagej:
        metadata |= {"unit": layout.unit} if layout.unit and layout.unit.isascii() else {}
        metadata |= {"spacing": layout.pixel["Z"]} if "Z" in layout.pixel else {}
    else:
        metadata |= {f"PhysicalSize{axis}": size for axis, size in layout.pixel.items()}
        unit = {"micron": "µm"}.get(layout.unit, layout.unit)
        metadata |= {f"PhysicalSize{axis}Unit": unit for axis in layout.pixel if unit}
    with tifffile.TiffWriter(path, bigtiff=layout.num_byte >= BIG, imagej=imagej, ome=not imagej) as tif:
        tif.write(
            None, shape=layout.full_shape, dtype=layout.dtype, photometric="minisblack", metadata=metadata, **options
        )


def _place_of(path: Path) -> tuple[int, np.dtype]:
    """Where the pixels of a flat file begin, and their type with its byte order."""
    if path.suffixes[-2].lower() in TIFF:
        import tifffile

        with tifffile.TiffFile(path) as tif:
            series = tif.series[0]
            return series.dataoffset, np.dtype(tif.byteorder + series.dtype.char)
    array = np.lib.format.open_memmap(path, mode="r")
    return array.offset, array.dtype


class PngWriter(Writer):
    """A folder with one PNG a frame, or with several channels one a channel; each appears when it is whole.

    Parameters
    ----------
    names : list of Path
        File of each frame, without the ending; their folder is made. Objects become 16-bit PNGs.
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
            raise UserError(f"{name}.png: {pixels.max()} objects, a PNG counts to 65535: write .tif, .npy or .zarr")
        pixels = pixels.astype(np.uint16) if pixels.dtype == np.uint32 else pixels
        for channel, plane in enumerate(pixels):
            ending = f"-class{channel}" if len(pixels) > 1 else ""
            with atomic_write(name.with_name(f"{name.name}{ending}.png")) as file:
                Image.fromarray(plane).save(file, format="png")


class ZarrWriter(Writer):
    """An OME-Zarr 0.5 image with a pyramid; what an error leaves is kept, and a second run goes on from it.

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
    run : dict
        What must be the same for a second run to go on.
    """

    def __init__(self, path: Path, layout: Layout, first: bool, tall: int, run: dict[str, Any]) -> None:
        check_module("zarr", str(path))
        import zarr

        self.path, self.partial, self.layout, self._zarr = path, partial_of(path), layout, zarr
        self.bands = self.partial / ".bands"  # an empty file for each band that is done
        self._array: Any = None
        if first:
            try:
                self._start(tall, json.dumps(run, sort_keys=True))
            except OSError as error:
                raise cannot_write(path, error) from error

    def _start(self, tall: int, run: str) -> None:
        """Make the array, unless an earlier run like this one has."""
        note = self.partial / ".run.json"
        if note.is_file() and note.read_text("utf-8") == run:
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        self.bands.mkdir(parents=True)
        self._create("0", self.layout.full_shape, tall)
        note.write_text(run, "utf-8")

    def _create(self, name: str, shape: tuple[int, ...], tall: int) -> Any:
        lead = len(shape) - 2
        chunks = (*[1] * lead, min(tall, shape[-2]), min(CHUNK, shape[-1]))
        return self._zarr.create_array(
            self.partial / name,
            shape=shape,
            dtype=self.layout.dtype,
            chunks=chunks,
            dimension_names=list(self.layout.all_axes.lower()),
        )

    def is_done(self, frame: int, top: int) -> bool:
        """Whether an earlier run has written a band."""
        return (self.bands / f"{frame}-{top}").is_file()

    def write(self, frame: int, top: int, band: np.ndarray) -> None:
        """Write rows (C, h, W) of a frame, the first of which is `top`."""
        try:
            if self._array is None:
                self._array = self._zarr.open_array(self.partial / "0", mode="r+")
            place = np.unravel_index(frame, self.layout.lengths) if self.layout.lengths else ()
            channels = (slice(None),) if self.layout.shape[1] > 1 else ()
            rows = slice(top, top + band.shape[1])
            self._array[(*map(int, place), *channels, rows)] = band if channels else band[0]
            (self.bands / f"{frame}-{top}").touch()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def finish(self) -> None:
        """Add the pyramid and the description, and give the folder its name."""
        try:
            scales = self._pyramid()
            group = self._zarr.open_group(self.partial, mode="a")
            group.attrs["ome"] = {"version": "0.5", "multiscales": [self._description(scales)]}
            shutil.rmtree(self.bands)
            (self.partial / ".run.json").unlink()
            old = self.path.with_name(f"{self.path.name}.old")
            if self.path.exists():
                self.path.rename(old)
            self.partial.rename(self.path)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _pyramid(self) -> list[tuple[float, float]]:
        """Write the smaller levels, each half as high and wide; return their factors along Y and X."""
        array = self._zarr.open_array(self.partial / "0", mode="r")
        scales = [(1.0, 1.0)]
        while max(array.shape[-2:]) > CHUNK:
            tall = array.chunks[-2]
            half = (*array.shape[:-2], -(-array.shape[-2] // 2), -(-array.shape[-1] // 2))
            smaller = self._create(str(len(scales)), half, tall)
            for place in np.ndindex(array.shape[:-2]):
                for top in range(0, half[-2], tall):
                    rows = array[(*place, slice(2 * top, 2 * (top + tall)))]
                    smaller[(*place, slice(top, top + tall))] = _halved(rows, self.layout.labels)
            scales.append((scales[-1][0] * 2, scales[-1][1] * 2))
            array = smaller
        return scales

    def _description(self, scales: list[tuple[float, float]]) -> dict[str, Any]:
        """Entry `multiscales` of the specification, https://ngff.openmicroscopy.org/0.5."""
        layout = self.layout
        kinds = {"T": "time", "C": "channel"}
        unit = {"micron": "micrometer"}.get(layout.unit)
        axes = [{"name": axis.lower(), "type": kinds.get(axis, "space")} for axis in layout.all_axes]
        for axis in axes:
            if axis["type"] == "space" and unit:
                axis["unit"] = unit
        datasets = []
        for level, (y, x) in enumerate(scales):
            factors = {"Y": y, "X": x}
            scale = [layout.pixel.get(axis, 1.0) * factors.get(axis, 1.0) for axis in layout.all_axes]
            datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
        return {"name": self.path.stem, "axes": axes, "datasets": datasets}


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
            self._file.write(np.ascontiguousarray(rows, np.float32))
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
