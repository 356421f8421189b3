"""TIFF, NumPy and PNG output of a prediction, written band by band; OME-Zarr is in zarr_writer.py."""

from __future__ import annotations

import math
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from files import atomic_write, explain_write_errors, flush_folders, make_folder, partial_of, publish, sweep
from images.layout import Layout
from utils import UserError

TIFF = (".tif", ".tiff")
BIG = 2**32 - 2**25  # [bytes] a larger TIFF needs 64-bit offsets: BigTIFF
PREDICTED = "main.py --mode predict"  # the software of each PNG and TIFF, which tells it from other files in its folder
STRIP = 2**18  # [bytes] of a compressed TIFF, which is read strip by strip: a few rows cost no more than one strip


class Writer:
    """Base of the writers: bands come in any order, also from several processes."""

    def write(self, frame: int, top: int, band: np.ndarray) -> None:
        """Write rows (C, h, W), or (1, h, W, 3) of RGB, of a frame, from row `top` on."""
        raise NotImplementedError

    def finish(self) -> None:
        """Rename the complete file; one process calls this after all have closed."""

    def close(self) -> None:
        """Flush to disk what this process has written."""

    def discard(self) -> None:
        """Remove the partial output after an error."""

    @contextmanager
    def discard_on_error(self) -> Iterator[None]:
        """Remove the partial output if anything fails meanwhile."""
        try:
            yield
        except BaseException:
            self.discard()
            raise


class FlatWriter(Writer):
    """Writes a file whose pixels are contiguous: an uncompressed TIFF or a `.npy`; one process creates it.

    Rows are written, not memory-mapped: on a full disk a write raises an error where a mapped page kills the process
    (SIGBUS), mapped pages count as memory of the process, over NFS two machines that map one page overwrite each
    other's rows. Nor is mapping faster: it took 1.7 to 1.9 times as long on tmpfs, 1.3 to 1.5 for uint8 on a disk.
    """

    def __init__(self, path: Path, layout: Layout, create: bool) -> None:
        self.path, self.partial, self.layout = path, partial_of(path), layout
        self.file: Any = None
        if create:
            with self.discard_on_error(), explain_write_errors(path):
                make_folder(path.parent)
                self.partial.unlink(missing_ok=True)  # from a killed process, or a link, which is not followed
                sweep(path)  # from a killed process that was compressing
                with self.partial.open("x+b") as file:
                    if path.suffix.lower() in TIFF:
                        _write_tiff(file, path, layout)
                    else:
                        _start_npy(file, layout)

    def write(self, frame: int, top: int, band: np.ndarray) -> None:
        """Write rows (C, h, W), or (1, h, W, 3) of RGB, of a frame, from row `top` on."""
        with explain_write_errors(self.path):
            if self.file is None:
                self.offset, self.dtype = _find_pixels(self.partial)
                self.file = open(self.partial, "r+b", buffering=0, opener=_no_link)  # noqa: SIM115
            band = np.ascontiguousarray(band, self.dtype)
            for channel, rows in enumerate(band):
                row = self.layout.plane(frame, channel) * self.layout.shape[2] + top
                self.file.seek(self.offset + row * self.layout.row_byte)
                view = memoryview(rows).cast("B")
                while view:  # an unbuffered write may take only a part
                    view = view[self.file.write(view) :]

    def finish(self) -> None:
        """Rename the complete file."""
        with explain_write_errors(self.path):
            self.close()
            publish(self.partial, self.path)

    def close(self) -> None:
        """Flush to disk what this process has written."""
        file, self.file = self.file, None
        if file is not None:
            with file:
                os.fsync(file.fileno())

    def discard(self) -> None:
        """Remove the partial file."""
        with suppress(OSError):  # the error that led here is the one to report
            self.close()
        with suppress(OSError):
            self.partial.unlink()


class ZlibTiffWriter(FlatWriter):
    """Writes a TIFF compressed by zlib, the compression that ImageJ and every TIFF library read.

    The length of a compressed strip is not known beforehand, and bands come in any order and from several processes.
    So they go to an uncompressed partial file first, which `finish` compresses strip by strip. Both exist for a moment.
    """

    def finish(self) -> None:
        """Write the compressed file, and remove the uncompressed one."""
        with explain_write_errors(self.path):
            self.close()
            layout = self._layout_of_file()
            with self.partial.open("rb") as pixels, atomic_write(self.path) as file:
                offset, dtype = _find_pixels(self.partial)
                pixels.seek(offset)
                _write_tiff(file, self.path, layout, _compressed_strips(pixels, dtype, layout))
            self.partial.unlink()

    def _layout_of_file(self) -> Layout:
        """Layout of the compressed file."""
        return self.layout


class NumberTiffWriter(ZlibTiffWriter):
    """The same for numbers of objects: in 16 bits, as an ImageJ TIFF, where these suffice."""

    def _layout_of_file(self) -> Layout:
        """Layout of the compressed file."""
        with self.partial.open("rb") as file:
            offset, dtype = _find_pixels(self.partial)
            file.seek(offset)
            rows = math.prod(self.layout.shape[:3])
            is_small = all(np.fromfile(file, dtype, self.layout.shape[3]).max() < 2**16 for _ in range(rows))
        return replace(self.layout, dtype=np.dtype(np.uint16)) if is_small else self.layout


TIFF_WRITERS = {"none": FlatWriter, "zlib": ZlibTiffWriter}


def _compressed_strips(pixels: IO[bytes], dtype: np.dtype, layout: Layout) -> Iterator[bytes]:
    """Strips of an uncompressed file of this type, compressed one by one; a strip belongs to one plane."""
    frames, channels, height, _ = layout.shape
    rows, row_pixel = _strip_height(layout), layout.row_byte // layout.dtype.itemsize
    for _ in range(frames * channels):
        for top in range(0, height, rows):
            strip = np.fromfile(pixels, dtype, min(rows, height - top) * row_pixel)
            yield zlib.compress(strip.astype(layout.dtype, copy=False).data)


class FilesWriter(Writer):
    """Writes several files through a writer of each; only the last one is open."""

    def __init__(self, frames: list[tuple[Writer, int]]) -> None:
        self.frames = frames  # writer of each frame, and the number of the frame in it
        self.writers = [*dict.fromkeys(writer for writer, _ in frames)]
        self._last = self.writers[0]

    def write(self, frame: int, top: int, band: np.ndarray) -> None:
        """Write rows (C, h, W), or (1, h, W, 3) of RGB, of a frame, from row `top` on."""
        writer, number = self.frames[frame]
        if writer is not self._last:
            self._last.close()
        self._last = writer
        writer.write(number, top, band)

    def finish(self) -> None:
        """Rename the complete files."""
        for writer in self.writers:
            writer.finish()

    def close(self) -> None:
        """Flush to disk what this process has written."""
        for writer in self.writers:
            writer.close()

    def discard(self) -> None:
        """Remove the partial files after an error."""
        for writer in self.writers:
            writer.discard()


def _strip_height(layout: Layout) -> int:
    """Rows of a strip of a compressed TIFF."""
    return min(max(STRIP // layout.row_byte, 1), layout.shape[2])


def _no_link(path: str, flags: int) -> int:
    """Open a file without following a link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _start_npy(file: IO[bytes], layout: Layout) -> None:
    """Write the header of a `.npy` and extend the file to its full size."""
    header = {"descr": layout.dtype.str, "fortran_order": False, "shape": layout.full_shape}
    np.lib.format.write_array_header_2_0(file, header)
    file.truncate(file.tell() + layout.num_byte)


def _write_tiff(file: IO[bytes], path: Path, layout: Layout, strips: Iterator[bytes] | None = None) -> None:
    """Write the tags of a TIFF, with room for its pixels or with compressed strips.

    It is an ImageJ TIFF if that holds type and size, else OME-TIFF, as NAME.ome.tif asks for; BigTIFF over 4 GB.
    """
    import tifffile

    is_held = layout.num_byte < BIG and layout.dtype.name in ("uint8", "uint16", "float32")
    imagej = is_held and not path.stem.lower().endswith(".ome")
    pixel = layout.geometry.pixel
    options: dict[str, Any] = {"photometric": "rgb" if layout.rgb else "minisblack", "software": PREDICTED}
    if {"X", "Y"} <= pixel.keys():
        per = 1 if imagej else 1e4  # an ImageJ file names the unit in its description
        options["resolution"] = (per / pixel["X"], per / pixel["Y"])
        options["resolutionunit"] = "NONE" if imagej else "CENTIMETER"
    if strips is not None:
        options |= {"compression": "zlib", "rowsperstrip": _strip_height(layout)}
    options["metadata"] = {"axes": layout.axes} | (_imagej_metadata if imagej else _ome_metadata)(layout)
    with tifffile.TiffWriter(file, bigtiff=layout.num_byte >= BIG, imagej=imagej, ome=not imagej) as tif:
        tif.write(strips, shape=layout.full_shape, dtype=layout.dtype, **options)


def _imagej_metadata(layout: Layout) -> dict[str, Any]:
    """Pixel size, time step and frame names as ImageJ metadata."""
    geometry = layout.geometry
    unit = "micron" if geometry.pixel else ""
    metadata: dict[str, Any] = {"unit": unit, "spacing": geometry.pixel.get("Z"), "finterval": geometry.interval}
    if len(geometry.labels) == layout.shape[0]:
        planes = {layout.plane(f, c): label for f, label in enumerate(geometry.labels) for c in range(layout.shape[1])}
        metadata["Labels"] = [planes[n].encode("utf-16", "replace").decode("utf-16") for n in sorted(planes)]
    return {name: value for name, value in metadata.items() if value}


def _ome_metadata(layout: Layout) -> dict[str, Any]:
    """Pixel size and time step as OME metadata."""
    geometry = layout.geometry
    metadata: dict[str, Any] = {f"PhysicalSize{axis}": size for axis, size in geometry.pixel.items()}
    metadata |= {f"PhysicalSize{axis}Unit": "µm" for axis in geometry.pixel}
    return metadata | ({"TimeIncrement": geometry.interval, "TimeIncrementUnit": "s"} if geometry.interval else {})


def _find_pixels(path: Path) -> tuple[int, np.dtype]:
    """Offset of the first pixel [bytes], and the type with its byte order."""
    if path.stem.lower().endswith(TIFF):  # without .partial
        import tifffile

        array = tifffile.memmap(path, mode="r")
    else:
        array = np.lib.format.open_memmap(path, mode="r")
    return array.offset or 0, array.dtype


def png_files(path: Path, channels: int) -> list[Path]:
    """Files of a frame: one, or one per channel."""
    if channels == 1:
        return [path]
    return [path.with_name(f"{path.stem}-class{channel}{path.suffix}") for channel in range(channels)]


def is_predicted(path: Path) -> bool:
    """Whether a PNG or TIFF is of a writer of this file, and was not edited since."""
    if path.suffix.lower() not in TIFF:
        with path.open("rb") as file:
            return PREDICTED.encode() in file.read(256)
    import tifffile

    try:
        with tifffile.TiffFile(path) as tif:
            return tif.pages.first.software == PREDICTED
    except (tifffile.TiffFileError, IndexError):  # no TIFF
        return False


class PngWriter(Writer):
    """Writes a PNG for each frame and channel when all rows are there; object numbers in 16 bits."""

    def __init__(self, names: list[Path], heights: list[int]) -> None:
        self.names, self.heights = names, heights  # of each frame
        self._frames: dict[int, np.ndarray] = {}  # pixels of the incomplete frames
        self._missing: dict[int, int] = {}  # number of their rows that are not there yet
        self._folders: set[Path] = set()  # with new files

    def write(self, frame: int, top: int, band: np.ndarray) -> None:
        """Store rows (C, h, W), or (1, h, W, 3) of RGB, of a frame; the last ones write the file."""
        height = self.heights[frame]
        if frame not in self._frames:
            self._frames[frame] = np.empty((len(band), height, *band.shape[2:]), band.dtype)
        self._frames[frame][:, top : top + band.shape[1]] = band
        self._missing[frame] = self._missing.get(frame, height) - band.shape[1]
        if not self._missing[frame]:
            self._save(self.names[frame], self._frames.pop(frame))

    def _save(self, name: Path, pixels: np.ndarray) -> None:
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        if pixels.dtype == np.uint32:
            if pixels.max() >= 2**16:
                limit = "but a 16-bit PNG holds at most 65535: write .tif, .npy or .zarr"
                raise UserError(f"{name}: {pixels.max()} objects, {limit}")
            pixels = pixels.astype(np.uint16)
        info = PngInfo()
        info.add_text("Software", PREDICTED)
        for path, plane in zip(png_files(name, len(pixels)), pixels, strict=True):
            self._folders.add(path.parent)
            with atomic_write(path, flush_parent=False) as file:
                Image.fromarray(plane).save(file, format="png", pnginfo=info)

    def close(self) -> None:
        """Flush the names of the files to disk."""
        for folder in self._folders:
            with explain_write_errors(folder):
                flush_folders(folder)


class RowFile:  # `Rows` of a plane (H, W)
    """Temporary file of image rows (H, W): append them first, then read slices. It has no name and ends when closed."""

    shape: tuple[Any, ...]

    def __init__(self, near: Path, dtype: type = np.float32) -> None:
        self.near, self.shape, self.dtype = near, (0, 0), np.dtype(dtype)  # near: a path in the folder of the file

    def __enter__(self) -> RowFile:
        with explain_write_errors(self.near):
            make_folder(self.near.parent)
            self._file = tempfile.TemporaryFile(dir=self.near.parent)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # an error of the last flush: the rows are not needed any more
            self._file.close()

    def append(self, rows: np.ndarray) -> None:
        """Add rows (h, W) at the bottom."""
        with explain_write_errors(self.near):
            self._file.write(np.ascontiguousarray(rows, self.dtype).data)
            self._file.flush()
        self.shape = (self.shape[0] + len(rows), rows.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W) of a slice."""
        start, stop, _ = rows.indices(len(self))
        self._file.seek(start * self.shape[1] * self.dtype.itemsize)
        return np.fromfile(self._file, self.dtype, (stop - start) * self.shape[1]).reshape(-1, self.shape[1])
