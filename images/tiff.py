"""TIFF files as frames (H, W, C) whose strips and tiles are decoded when rows are requested."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from images.calibration import tiff_interval, tiff_sizes
from images.geometry import Geometry
from images.memory import check_size
from images.orientation import NOTE, TAG, TURNS, turned
from images.pillow import Picture
from images.rows import (
    ABORTED,
    AUXILIARY,
    Frames,
    LazyImage,
    Rows,
    Series,
    UnsupportedError,
    check_count,
    converted,
    one_line,
    reraise_as_user_error,
    split,
    to_native,
)
from utils import UserError

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes; the last two are BigTIFF
NAMELESS = ("generic", "uniform", "shaped")  # kinds of tifffile series that are not positions of a stage
WHITE_IS_ZERO, PALETTE, CMYK, YCBCR = 0, 3, 5, 6  # PhotometricInterpretation
REDUCED_OR_MASK = 1 | 4  # NewSubfileType
ALPHA = (1, 2)  # ExtraSamples
ADOBE_DEFLATE, OLD_DEFLATE, OLD_JPEG, CCITT_T4 = 8, 32946, 6, 3  # Compression
JPEG = (OLD_JPEG, 7, 34892, 33007)  # Compression whose tables are stored once
OF_BYTES = (1, 5, ADOBE_DEFLATE, OLD_DEFLATE, 32773, 34925, 50000)  # Compression that knows no colours
# PhotometricInterpretation of which only Pillow makes red, green and blue
COLOURS = {YCBCR: "YCbCr colours", 8: "CIELAB colours", 9: "ICCLAB colours", 10: "ITULAB colours"}
COLOURS |= {32844: "LogL grey values", 32845: "LogLuv colours"}


def read_tiff(path: Path) -> Frames:
    """Frames of all series of a TIFF, without lower resolutions.

    The label, macro and thumbnail of a slide come last and are only read if chosen; damaged ones do not hide the slide.
    """
    with _opened(path) as (tif, messages):
        main = [series for series in tif.series if not _is_auxiliary(series)] or tif.series
        frames, lacks = Frames(kind=_kind(tif), palette=_palette(tif)), _advice(path, messages)
        single: tuple | None = None  # shape and type of a page that is a series by itself
        for series in sorted(tif.series, key=lambda series: series not in main):
            is_main, name = series in main, series.name.strip()
            previous, single = single, None
            try:
                images = _series_images(path, tif, series)
            except Exception as error:
                if is_main and not isinstance(error, UnsupportedError):
                    raise
                frames.add_problem(path, name, error, by_default=is_main)
                continue
            # tifffile makes a series of each page that was written on its own: equal neighbours form one stack
            if is_main and len(images) == 1 and series.kind in NAMELESS:
                single = (series.shape, series.dtype)
            if single and single == previous:
                last = frames.series[-1]
                frames.images += images
                frames.stacks.append(frames.stacks[-1])
                last.axes, last.lengths = "I", (last.num_frame + 1,)
            else:
                geometry = partial(tiff_geometry, path, tif.series.index(series))
                frames.add(images, Series(name, *_outer(series), geometry, len(series.levels), is_main, lacks=lacks))
            frames.notes += _notes(series) if is_main else []
            frames.files |= {_file_of(page, path, tif) for page in series.pages if page is not None}
    frames.notes = list(dict.fromkeys(frames.notes + _notes_of_tifffile(messages)))
    return frames


def _is_auxiliary(series: Any) -> bool:
    """Whether a series is a mask, a lower resolution, or the label or thumbnail of a slide."""
    return bool(series.keyframe.subfiletype & REDUCED_OR_MASK) or series.name.strip().lower() in AUXILIARY


def _notes(series: Any) -> list[str]:
    """What users should know of a series that is read."""
    notes = [NOTE] if _orientation(series) != 1 else []
    lower = [level for level in series.levels[1:] if not level.keyframe.is_reduced]
    if lower and series.kind in NAMELESS:
        sizes = ", ".join(f"{level.keyframe.imagewidth} x {level.keyframe.imagelength} px" for level in lower)
        what = f"the page(s) of {sizes} are taken for lower resolutions of the one before, and not read"
        notes.append(f"{what}: save them as files of their own if they are other images")
    return notes


def _notes_of_tifffile(messages: list[str]) -> list[str]:
    """What tifffile logs of a file, without the name of the file, and without the missing pages that we report."""
    texts = [" ".join(message.split("> ", 1)[-1].split()) for message in messages]
    texts = [text for text in texts if not re.search("missing|out of range|failed to read", text)]
    unread = ": so each of its pages is an image of one channel, and the axes and the pixel size are unknown"
    lost = ("OME series raised", "ImageJ series metadata invalid")
    return [f"tifffile says: {text}{unread if text.startswith(lost) else ''}" for text in texts]


def _advice(path: Path, messages: list[str]) -> str:
    """What to do about missing pages; without a description of all files, none of them is read."""
    absent = re.search(r"failed to read '(.*?)'", " ".join(messages))
    if absent and any("OME series raised" in message for message in messages):
        raise UserError(f"{path}: a part of an image in several files: put {absent[1]} next to it")
    return f"put {absent[1]} next to it" if absent else ABORTED


def _kind(tif: Any) -> str:
    """Flavour of a TIFF, such as OME-TIFF, and its compression."""
    flavours = ("ome", "imagej", "lsm", "stk", "svs", "scn", "ndpi", "qpi", "bif", "philips")
    named = [flavour for flavour in flavours if getattr(tif, f"is_{flavour}")]
    compression = getattr(tif.pages[0].compression, "name", "NONE") if len(tif.pages) else "NONE"
    return "TIFF" + (f" ({named[0]})" if named else "") + (f", {compression}" if compression != "NONE" else "")


def _palette(tif: Any) -> np.ndarray | None:
    """Colours (N, 3) uint8 of the palette of the first page; None if there is none."""
    page = tif.pages[0] if len(tif.pages) else None
    if page is None or page.colormap is None or page.photometric != PALETTE:
        return None
    bits = 8 if page.colormap.max() > 255 else 0  # of 16; some programs write 8-bit colours, as libtiff knows
    return (page.colormap.T >> bits).astype(np.uint8)


def _orientation(series: Any) -> int:
    """Orientation of the pages of a series; 1 if they are as they should be displayed, also if Pillow turns them."""
    orientation = series.keyframe.tags.valueof(TAG, 1)
    return orientation if orientation in TURNS and not _by_pillow(series.keyframe) else 1


def _outer(series: Any) -> tuple[str, tuple[int, ...]]:
    """Axes that count the frames of a series, and their lengths."""
    outer = [(axis, size) for axis, size in zip(series.axes, series.shape, strict=True) if axis not in "SCYX"]
    return "".join(axis for axis, _ in outer), tuple(size for _, size in outer)


def _file_of(page: Any, path: Path, tif: Any) -> Path:
    """File that contains a page; for an OME-TIFF it may be another one."""
    return path if page.parent is tif else Path(page.parent.filehandle.path)


def _series_images(path: Path, tif: Any, series: Any) -> list[Rows]:
    """Frames of a series, as the camera saw them."""
    check_count(path, _outer(series)[1])
    if series.dtype is None or np.dtype(series.dtype).kind not in "uifb":
        raise UnsupportedError(f"{path}: pixels of {np.dtype(series.dtype).name}: they must be real numbers")
    if by_pillow := _by_pillow(series.keyframe):
        return _pictures(path, series, by_pillow)
    images, orientation = _stored_images(path, tif, series), _orientation(series)
    return images if orientation == 1 else [turned(path, image, orientation) for image in images]


def _stored_images(path: Path, tif: Any, series: Any) -> list[Rows]:
    """Frames of a series: memory-mapped if the pixels are contiguous, else read by strips or tiles."""
    from tifffile import TIFF

    key, axes = series.keyframe, series.axes
    conversion = PixelConversion.of(path, key)
    pages = [page for page in series.pages if page is not None]
    if series.dataoffset is not None and len({page.parent for page in pages}) == 1:
        dtype = np.dtype(series.dtype.newbyteorder(key.parent.byteorder).str)
        file = _file_of(key, path, tif)
        pixels = np.memmap(file, dtype, "r", offset=series.dataoffset, shape=series.shape)
        return [conversion.wrap(image) for image in split(pixels, axes, path)]
    if key.compression != 1:
        TIFF.DECOMPRESSORS[key.compression]  # raises an error that names a missing package
    is_planar = axes.endswith(key.axes) and set(key.axes) <= set("YXS")
    if len(pages) < len(series.pages) and not is_planar:
        raise UnsupportedError(f"{path}: axes {axes} with missing pages: save it as a TIFF of pages of Y and X")
    if not is_planar or {"S", "C"} <= set(axes):  # volumetric tiles; `split` refuses two channel axes
        check_size(path, math.prod(series.shape) * series.dtype.itemsize, copies=2)
        return [conversion.wrap(image) for image in split(series.asarray(), axes, path)]
    # numbers of the pages, arranged by the axes that are spread over pages: (..., C, ...) -> (frames, C)
    outer = axes[: len(axes) - len(key.axes)]
    order = np.arange(math.prod(series.shape[: len(outer)])).reshape(series.shape[: len(outer)])
    order = np.moveaxis(order, outer.index("C"), -1) if "C" in outer else order[..., None]
    images: list[Rows] = []
    for numbers in order.reshape(-1, order.shape[-1]).tolist():
        of_image = [series.pages[number] for number in numbers]
        present = [pages[0] if page is None else page for page in of_image]
        image = PagedImage(present, [_file_of(page, path, tif) for page in present], conversion)
        image.is_missing = None in of_image
        images.append(image)
    return images


def _by_pillow(key: Any) -> str:
    """Kind of a page that tifffile would read wrongly or not at all, and Pillow may convert; empty for others."""
    if key.compression == OLD_JPEG:
        return "old-style JPEG"
    if key.compression == CCITT_T4 and key.tags.valueof(292, 0) & 1:
        return "CCITT T.4 in two dimensions"
    if key.photometric == YCBCR and key.compression not in OF_BYTES:
        return ""  # a codec of pictures, which returns red, green and blue
    return COLOURS.get(key.photometric, "")


def _pictures(path: Path, series: Any, kind: str) -> list[Rows]:
    """Frames of pages that Pillow converts, one image each."""
    advice = "convert it to an RGB TIFF"
    num_image = math.prod(num for axis, num in zip(series.axes, series.shape, strict=True) if axis not in "YXS")
    is_one_each = len(series.pages) == num_image and not any(page is None or page.is_subifd for page in series.pages)
    if set(series.keyframe.axes) > set("YXS") or not is_one_each:
        raise UnsupportedError(f"{path}: {kind} in axes {series.axes}: {advice}")
    try:
        return [Picture(path, page.index) for page in series.pages]
    except Exception as error:
        raise UnsupportedError(f"{path}: {kind}, which Pillow does not read ({one_line(error)}): {advice}") from error


@dataclass(frozen=True)
class PixelConversion:
    """Converts stored samples to the pixels of an image (H, W, C): 0 is black, alpha is dropped, CMYK becomes RGB."""

    bits: int  # per sample; one bit becomes 0 and 255
    inverted: bool  # 0 is white in the file
    samples: int  # per pixel of a page
    channels: tuple[int, ...]  # indices of the samples that are not alpha
    cmyk: bool  # the first four of these are inks to be converted to red, green and blue

    @classmethod
    def of(cls, path: Path, key: Any) -> PixelConversion:
        """Make one from the tags of a page."""
        samples, extra = key.samplesperpixel, tuple(key.extrasamples or ())
        colours = samples - len(extra)
        if colours < 1:  # damaged tag
            colours, extra = samples, ()
        channels = [number for number in range(samples) if number < colours or extra[number - colours] not in ALPHA]
        cmyk = key.photometric == CMYK
        if cmyk and (colours != 4 or key.dtype not in (np.uint8, np.uint16) or key.tags.valueof(332, 1) != 1):
            inks = f"{colours} inks of {np.dtype(key.dtype).name}"
            raise UnsupportedError(f"{path}: {inks}: only CMYK is read: convert it to RGB")
        return cls(key.bitspersample, key.photometric == WHITE_IS_ZERO, samples, tuple(channels), cmyk)

    def wrap(self, image: np.ndarray) -> Rows:
        """Image that is converted when rows are read; an array that needs no conversion stays as it is."""
        is_first = self.channels == tuple(range(len(self.channels)))  # all of the channels come before alpha
        if self.bits == 1 or self.inverted or self.cmyk or not is_first or not image.dtype.isnative:
            return converted(image, self)
        return image[..., : len(self.channels)] if image.shape[2] == self.samples else image

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Convert stored samples (h, W, C)."""
        pixels = to_native(pixels != 0 if self.bits == 1 else pixels)
        if self.inverted and pixels.dtype.kind == "u":
            white = 255 if self.bits == 1 else 2 ** min(self.bits, 8 * pixels.dtype.itemsize) - 1
            pixels = pixels.dtype.type(white) - pixels
        elif self.inverted:
            pixels = ~pixels if pixels.dtype.kind == "i" else -pixels
        if len(self.channels) < self.samples == pixels.shape[-1]:  # otherwise each channel is a page
            pixels = pixels[..., list(self.channels)]
        return _rgb_of(pixels) if self.cmyk else pixels


def _rgb_of(pixels: np.ndarray) -> np.ndarray:
    """Red, green and blue (h, W, 3), followed by further channels, of cyan, magenta, yellow and black."""
    white = np.iinfo(pixels.dtype).max
    light = (white - pixels[..., :4]).astype(np.uint64)
    colours = (light[..., :3] * light[..., 3:] + white // 2) // white
    return np.concatenate([colours.astype(pixels.dtype), pixels[..., 4:]], axis=-1)


class Page(NamedTuple):
    """What remains of a page when its TIFF is closed."""

    file: Path
    name: str  # in messages
    segments: list[tuple[int, int]]  # offset and number of bytes of each strip or tile
    options: dict[str, Any]  # of the decoder


class PagedImage(LazyImage):
    """Image (H, W, C) of one TIFF page, or of one per channel, that reads only the strips or tiles that are needed."""

    def __init__(self, pages: list[Any], files: list[Path], conversion: PixelConversion) -> None:
        key = pages[0].keyframe
        _, _, height, width, _ = key.shaped
        self._samples = len(pages) if len(pages) > 1 else key.samplesperpixel
        self._stored, self._conversion, self._decode = np.dtype(key.dtype), conversion, key.decode
        sample = conversion(np.zeros((1, 1, self._samples), self._stored))
        super().__init__((height, width, sample.shape[2]), sample.dtype, self._rows)
        self._pages: list[Page] = []
        for page, file in zip(pages, files, strict=True):
            name = f"{file}, page {page.index + 1}"
            segments = list(zip(page.dataoffsets, page.databytecounts, strict=True))
            if any(offset + count > page.parent.filehandle.size for offset, count in segments):
                raise UserError(f"{name}: truncated: copy the file again")
            tables = {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader}
            self._pages.append(Page(file, name, segments, tables if key.compression in JPEG else {}))
        self._segment_height = key.tilelength if key.is_tiled else min(key.rowsperstrip, height)
        segment_width = key.tilewidth if key.is_tiled else width
        self._num_across = math.ceil(width / key.tilewidth) if key.is_tiled else 1
        self._decoded: dict[tuple[int, int], tuple] = {}
        samples = key.samplesperpixel if key.planarconfig == 1 else 1
        num_byte = self._segment_height * segment_width * samples * self._stored.itemsize
        check_size(self._pages[0].name, num_byte, copies=2)

    def _rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        out = np.zeros((bottom - top, self.shape[1], self._samples), self._stored)
        height = self._segment_height
        # Bands are requested from top to bottom, and a strip or tile may extend into the next band. Each call keeps
        # what it decoded, only for the next call.
        previous, self._decoded = self._decoded, {}
        for number, page in enumerate(self._pages):
            with reraise_as_user_error(f"{page.name}: damaged", "copy the file again"):
                # segments are numbered row by row; with planar samples, one plane after another
                num_down = math.ceil(self.shape[0] / height)
                tops = np.arange(len(page.segments)) // self._num_across % num_down * height
                for index in np.flatnonzero((tops < bottom) & (tops + height > top)).tolist():
                    decoded = previous.get((number, index)) or self._segment(page, index)
                    if bottom < self.shape[0]:
                        self._decoded[number, index] = decoded
                    self._copy(out, top, number, *decoded)
        return self._conversion(out)

    def _segment(self, page: Page, index: int) -> tuple:
        """One strip or tile (1, h, w, C), and its position (sample, depth, y, x, channel)."""
        offset, count = page.segments[index]
        with page.file.open("rb") as file:
            file.seek(offset)
            return self._decode(file.read(count) or None, index, **page.options)[:2]

    def _copy(self, out: np.ndarray, top: int, number: int, segment: np.ndarray | None, position: tuple) -> None:
        """Copy the part of a strip or tile that lies in the rows from `top` on; a tile may extend beyond the image."""
        if segment is None:  # a hole in a sparse file
            return
        sample, _, y, x, _ = position
        pixels = segment[0][max(top - y, 0) : top + len(out) - y, : out.shape[1] - x]
        first, channel = max(y - top, 0), sample if len(self._pages) == 1 else number
        out[first : first + len(pixels), x : x + pixels.shape[1], channel : channel + pixels.shape[2]] = pixels


_messages: dict[int | None, list[str]] = {}  # that tifffile has logged, by the thread that is inside `_opened`


def _capture(record: logging.LogRecord) -> bool:
    """Keep a message of a thread inside `_opened` for it; whether it is to be logged, as those of other threads."""
    messages = _messages.get(record.thread)
    if messages is not None:
        messages.append(record.getMessage())
    return messages is None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, list[str]]]:
    """TIFF file, and the messages that tifffile logs meanwhile.

    A broken chain of pages is refused; tifffile only logs it and continues with fewer pages.
    """
    import tifffile

    logging.getLogger("tifffile").addFilter(_capture)  # added once, however often this is called
    messages = _messages[threading.get_ident()] = []
    try:
        with tifffile.TiffFile(path) as tif:
            len(tif.pages)  # walks the chain of pages: a broken link is logged here
            yield tif, messages
    finally:
        del _messages[threading.get_ident()]
    broken = [message for message in messages if "TiffPages" in message]
    if broken:
        raise UserError(f"{path}: truncated or damaged ({broken[0].split('> ')[-1]}): copy the file again")


def tiff_geometry(path: Path, number: int) -> Geometry:
    """Axes of the frames of a series, pixel size, time step and names of the frames and channels.

    Empty if the tags are damaged: the pixels can be read without them.
    """
    with suppress(Exception), _opened(path) as (tif, _):  # damaged tags raise all kinds of exceptions
        series = tif.series[number]
        sizes = dict(zip(series.axes, series.shape, strict=True))
        axes = "".join(axis for axis in sizes if axis in "TZ")
        lengths = tuple(sizes[axis] for axis in axes)
        images = ElementTree.fromstring(tif.ome_metadata).findall(".//{*}Pixels") if tif.ome_metadata else []
        image = images[number] if number < len(images) else ElementTree.Element("Pixels")
        channels = tuple(channel.get("Name", "") for channel in image.findall("{*}Channel"))
        pixel, unknown = tiff_sizes(tif, number)
        interval = tiff_interval(tif, number)
        if TURNS.get(_orientation(series), (False,))[0]:
            pixel = {{"X": "Y", "Y": "X"}.get(axis, axis): size for axis, size in pixel.items()}
        names = (tif.imagej_metadata or {}).get("Labels", [])
        names = [names] if isinstance(names, str) else names  # a single one is no list
        labels = tuple(map(str, names[:: sizes.get("C", 1)]))  # ImageJ has a name for each channel of a frame
        labels = labels if len(labels) == math.prod(lengths) else ()
        return Geometry(axes, lengths, pixel, unknown, interval, labels, channels)
    return Geometry(unknown="its tags are damaged")
