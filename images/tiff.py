"""TIFF files as frames (H, W, C) whose strips and tiles are decoded when rows are requested."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from images.geometry import Geometry, in_micron, in_seconds
from images.memory import check_size
from images.orientation import NOTE as ORIENTATION_NOTE
from images.orientation import TAG as ORIENTATION
from images.orientation import TURNS, turned
from images.pillow import Picture
from images.rows import (
    ABORTED,
    AUXILIARY,
    Converted,
    Frames,
    Missing,
    Readable,
    Rows,
    Series,
    UnsupportedError,
    check_count,
    one_line,
    reraise_as_user_error,
    split,
    to_native,
)
from utils import UserError

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes; the last two are BigTIFF
NAMELESS = ("generic", "uniform", "shaped")  # kinds of tifffile series that are not positions of a stage
WHITE_IS_ZERO, CMYK = 0, 5  # PhotometricInterpretation
REDUCED_OR_MASK = 1 | 4  # NewSubfileType
ALPHA = (1, 2)  # ExtraSamples
ADOBE_DEFLATE, OLD_DEFLATE, OLD_JPEG, CCITT_T4 = 8, 32946, 6, 3  # Compression
OF_BYTES = (1, 5, ADOBE_DEFLATE, OLD_DEFLATE, 32773, 34925, 50000)  # Compression that knows no colours
YCBCR = 6  # PhotometricInterpretation, as these
COLOURS = {YCBCR: "YCbCr colours", 8: "CIELAB colours", 9: "ICCLAB colours", 10: "ITULAB colours"}
COLOURS |= {32844: "LogL grey values", 32845: "LogLuv colours"}


def read_tiff(path: Path) -> Frames:
    """Frames of all series of a TIFF, without lower resolutions.

    The label, macro and thumbnail of a slide come last, and are only read if they are chosen.
    """
    found, before = Frames(), None
    with _opened(path) as (tif, messages):
        found.kind = _kind(tif)
        main = _main_series(tif)
        for series in main:
            try:
                images = _series_frames(path, tif, series, messages)
            except UnsupportedError as error:  # the other series can be read
                found.add_problem(path, series.name.strip(), error, by_default=True)
                before = None
                continue
            # tifffile makes a series of each page that was written on its own: equal neighbours form one stack
            single = (series.shape, series.dtype) if len(images) == 1 and series.kind in NAMELESS else None
            if single and single == before:
                last = found.series[-1]
                found.images += images
                found.stacks.append(found.stacks[-1])
                last.axes, last.lengths = "I", (last.num_frame + 1,)
            else:
                found.add(images, _described(path, tif, series, lacks=_advice(messages)))
            before = single
            found.files |= {_file_of(page, path, tif) for page in series.pages if page is not None}
            found.notes += _notes(series)
        for series in (series for series in tif.series if series not in main):
            _add_auxiliary(found, path, tif, series, messages)
    found.notes = list(dict.fromkeys(found.notes + _heard_notes(messages)))
    return found


def _notes(series: Any) -> list[str]:
    """What is to be said of a series that is read."""
    notes = [ORIENTATION_NOTE] if _orientation(series) != 1 else []
    lower = [level for level in series.levels[1:] if not level.keyframe.is_reduced]
    if lower and series.kind in NAMELESS:
        sizes = ", ".join(f"{level.keyframe.imagewidth} x {level.keyframe.imagelength} px" for level in lower)
        what = f"the page(s) of {sizes} are taken for lower resolutions of the one before, and not read"
        notes.append(f"{what}: save them as files of their own if they are other images")
    return notes


def _heard_notes(messages: list[str]) -> list[str]:
    """What tifffile logs of a file, without the name of the file, and without the missing pages that we tell."""
    texts = [" ".join(message.split("> ", 1)[-1].split()) for message in messages]
    texts = [text for text in texts if not re.search("missing|out of range|failed to read", text)]
    unread = ": so each of its pages is an image of one channel, and the axes and the pixel size are unknown"
    lost = ("OME series raised", "ImageJ series metadata invalid")
    return [f"tifffile says: {text}{unread if text.startswith(lost) else ''}" for text in texts]


def _advice(messages: list[str]) -> str:
    """What to do about missing pages."""
    absent = re.search(r"failed to read '(.*?)'", " ".join(messages))
    return f"put {absent[1]} next to it" if absent else ABORTED


def _main_series(tif: Any) -> list[Any]:
    """Series that are images, or all series if none is."""
    kept = [
        series
        for series in tif.series
        if not series.keyframe.subfiletype & REDUCED_OR_MASK and series.name.strip().lower() not in AUXILIARY
    ]
    return kept or tif.series


def _kind(tif: Any) -> str:
    """Flavour of a TIFF, such as OME-TIFF."""
    flavours = ("ome", "imagej", "lsm", "stk", "svs", "scn", "ndpi", "qpi", "bif", "philips")
    named = [flavour for flavour in flavours if getattr(tif, f"is_{flavour}")]
    return f"TIFF ({named[0]})" if named else "TIFF"


def _series_frames(path: Path, tif: Any, series: Any, messages: list[str]) -> list[Rows]:
    """Frames of a series, as seen by the camera."""
    absent = re.search(r"failed to read '(.*?)'", " ".join(messages))
    if absent and any("OME series raised" in message for message in messages):
        raise UserError(f"{path}: a part of an image in several files: put {absent[1]} next to it")
    check_count(path, _frame_axes(series)[1])
    if series.dtype is None or np.dtype(series.dtype).kind not in "uifb":
        raise UnsupportedError(f"{path}: pixels of {np.dtype(series.dtype).name}: they must be real numbers")
    images, orientation = _frames(path, tif, series), _orientation(series)
    return images if orientation == 1 else [turned(path, image, orientation) for image in images]


def _orientation(series: Any) -> int:
    """Orientation of the pages of a series; 1 if they are as they should be shown, also if Pillow turns them."""
    orientation = series.keyframe.tags.valueof(ORIENTATION, 1)
    return orientation if orientation in TURNS and not _by_pillow(series.keyframe) else 1


def _frame_axes(series: Any) -> tuple[str, tuple[int, ...]]:
    """Axes that count the frames of a series, and their lengths."""
    outer = [(axis, size) for axis, size in zip(series.axes, series.shape, strict=True) if axis not in "SCYX"]
    return "".join(axis for axis, _ in outer), tuple(size for _, size in outer)


def _described(path: Path, tif: Any, series: Any, **more: Any) -> Series:
    """Description of a series."""
    geometry = partial(tiff_geometry, path, tif.series.index(series))
    return Series(series.name.strip(), *_frame_axes(series), geometry, len(series.levels), **more)


def _add_auxiliary(found: Frames, path: Path, tif: Any, series: Any, messages: list[str]) -> None:
    """Add a series that is not read by default; what prevents its reading is only said if it is chosen."""
    try:
        found.add(_series_frames(path, tif, series, messages), _described(path, tif, series, by_default=False))
    except Exception as error:  # a damaged thumbnail must not prevent the reading of the slide
        problem = f"can't be read ({one_line(error)}): choose another"
        found.series.append(Series(series.name.strip(), by_default=False, problem=problem))


def _file_of(page: Any, path: Path, tif: Any) -> Path:
    """File that contains a page; for an OME-TIFF it may be another one."""
    return path if page.parent is tif else Path(page.parent.filehandle.path)


def _frames(path: Path, tif: Any, series: Any) -> list[Rows]:
    """Frames of a series: memory-mapped if the pixels are contiguous, else read by strips or tiles."""
    from tifffile import TIFF

    key, axes = series.keyframe, series.axes
    if by_pillow := _by_pillow(key):
        return _pictures(path, series, by_pillow)
    conversion = PixelConversion.of(path, key)
    pages = [page for page in series.pages if page is not None]
    if series.dataoffset is not None and len({page.parent for page in pages}) == 1:
        dtype = np.dtype(series.dtype.newbyteorder(key.parent.byteorder).str)
        file = _file_of(key, path, tif)
        pixels = np.memmap(file, dtype, "r", offset=series.dataoffset, shape=series.shape)
        return [conversion.wrap(image) for image in split(pixels, axes, path)]
    outer = axes[: len(axes) - len(key.axes)]
    if key.compression != 1:
        TIFF.DECOMPRESSORS[key.compression]  # raises an error that names a missing package
    is_planar = axes.endswith(key.axes) and set(key.axes) <= set("YXS")
    if len(pages) < len(series.pages) and not is_planar:
        raise UnsupportedError(f"{path}: axes {axes} with missing pages: save it as a TIFF of pages of Y and X")
    if not is_planar or {"S", "C"} <= set(axes):  # volumetric tiles; `split` refuses two channel axes
        check_size(path, math.prod(series.shape) * series.dtype.itemsize, copies=2)
        return [conversion.wrap(image) for image in split(series.asarray(), axes, path)]
    # numbers of the pages, arranged by the axes that are spread over pages: (..., C, ...) -> (frames, C)
    order = np.arange(math.prod(series.shape[: len(outer)])).reshape(series.shape[: len(outer)])
    if "C" in outer:
        order = np.moveaxis(order, outer.index("C"), -1)
    order = order.reshape(-1, order.shape[-1] if "C" in outer else 1)
    return _paged_images(
        path, tif, [[series.pages[int(number)] for number in numbers] for numbers in order], conversion
    )


def _paged_images(path: Path, tif: Any, pages: list[list[Any]], conversion: PixelConversion) -> list[Rows]:
    """Images of one page, or one page per channel, each; where a page is missing there is none."""
    there = [page for of_image in pages for page in of_image if page is not None]
    files = {page.parent: _file_of(page, path, tif) for page in there}
    sizes = {file: file.stat().st_size for file in files.values()}
    images: list[Rows] = []
    for of_image in pages:
        if None in of_image:
            like = PagedImage([there[0]] * len(of_image), files, sizes, conversion)
            images.append(Missing(like.shape, like.dtype))
        else:
            images.append(PagedImage(of_image, files, sizes, conversion))
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
    if set(series.keyframe.axes) > set("YXS") or any(page is None or page.is_subifd for page in series.pages):
        raise UnsupportedError(f"{path}: {kind} in axes {series.axes}: {advice}")
    try:
        pictures: list[Rows] = [Picture(path, page.index) for page in series.pages]
    except Exception as error:
        raise UnsupportedError(f"{path}: {kind}, which Pillow does not read ({one_line(error)}): {advice}") from error
    return pictures


@dataclass(frozen=True)
class PixelConversion:
    """Converts stored samples to the pixels of an image (H, W, C): 0 is black, alpha is dropped, CMYK becomes RGB.

    Attributes
    ----------
    bits : int
        Bits per sample; one bit becomes 0 and 255.
    inverted : bool
        Whether 0 is white in the file.
    samples : int
        Samples per pixel of a page.
    kept : tuple of int
        Indices of the samples that are channels, not alpha.
    cmyk : bool
        Whether the first four of these are inks to be converted to red, green and blue.
    """

    bits: int
    inverted: bool
    samples: int
    kept: tuple[int, ...]
    cmyk: bool

    @classmethod
    def of(cls, path: Path, key: Any) -> PixelConversion:
        """Make one from the tags of a page."""
        samples, extra = key.samplesperpixel, tuple(key.extrasamples or ())
        colours = samples - len(extra)
        if colours < 1:  # damaged tag
            colours, extra = samples, ()
        kept = [number for number in range(samples) if number < colours or extra[number - colours] not in ALPHA]
        cmyk = key.photometric == CMYK
        if cmyk and (colours != 4 or key.dtype not in (np.uint8, np.uint16) or key.tags.valueof(332, 1) != 1):
            raise UnsupportedError(
                f"{path}: {colours} inks of {np.dtype(key.dtype).name}: only CMYK is read: convert it to RGB"
            )
        return cls(key.bitspersample, key.photometric == WHITE_IS_ZERO, samples, tuple(kept), cmyk)

    def wrap(self, image: np.ndarray) -> Rows:
        """Image that is converted when rows are read; an array that needs no conversion stays as it is."""
        is_plain = image.dtype.isnative and self.bits > 1 and not self.inverted and not self.cmyk
        if is_plain and (self.kept == tuple(range(len(self.kept))) or image.shape[2] != self.samples):
            return image[..., : len(self.kept)] if image.shape[2] == self.samples else image
        return Converted(image, self)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Convert stored samples (h, W, C)."""
        if self.bits == 1:
            pixels = pixels != 0
        pixels = to_native(pixels)
        if self.inverted:
            pixels = self._inverted(pixels)
        if len(self.kept) < self.samples == pixels.shape[-1]:  # otherwise each channel is a page
            pixels = pixels[..., list(self.kept)]
        return _rgb_of(pixels) if self.cmyk else pixels

    def _inverted(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels with black and white exchanged."""
        if pixels.dtype.kind == "i":
            return ~pixels
        if pixels.dtype.kind == "f":
            return -pixels
        white = 255 if self.bits == 1 else 2 ** min(self.bits, 8 * pixels.dtype.itemsize) - 1
        return pixels.dtype.type(white) - pixels


def _rgb_of(pixels: np.ndarray) -> np.ndarray:
    """Red, green and blue (h, W, 3), followed by further channels, of cyan, magenta, yellow and black."""
    white = np.iinfo(pixels.dtype).max
    light = (white - pixels[..., :4]).astype(np.uint64)
    colours = (light[..., :3] * light[..., 3:] + white // 2) // white
    return np.concatenate([colours.astype(pixels.dtype), pixels[..., 4:]], axis=-1)


class PagedImage(Readable):
    """Image (H, W, C) of one TIFF page, or of one page per channel, that reads only the strips or tiles needed.

    Parameters
    ----------
    pages : list of tifffile.TiffPage
        Pages of open files; the files may be closed afterwards.
    files : dict
        File of each `page.parent`.
    sizes : dict
        Size of each file [bytes].
    conversion : PixelConversion
        Converts samples to pixels.
    """

    def __init__(
        self, pages: list[Any], files: dict[Any, Path], sizes: dict[Path, int], conversion: PixelConversion
    ) -> None:
        key = pages[0].keyframe
        _, _, height, width, _ = key.shaped
        self._samples = len(pages) if len(pages) > 1 else key.samplesperpixel
        self._stored, self._conversion, self._decode = np.dtype(key.dtype), conversion, key.decode
        sample = conversion(np.zeros((1, 1, self._samples), self._stored))
        self.shape, self.dtype = (height, width, sample.shape[2]), sample.dtype
        self._files = [files[page.parent] for page in pages]
        self._numbers = [page.index + 1 for page in pages]
        self._where = [list(zip(page.dataoffsets, page.databytecounts, strict=True)) for page in pages]
        jpeg = key.compression in (6, 7, 34892, 33007)
        self._options = [
            {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader} if jpeg else {} for page in pages
        ]
        self._tall = key.tilelength if key.is_tiled else key.rowsperstrip
        self._across = math.ceil(width / key.tilewidth) if key.is_tiled else 1
        self._kept: dict[tuple[int, int], tuple] = {}
        for page, where in enumerate(self._where):
            if any(offset + count > sizes[self._files[page]] for offset, count in where):
                raise UserError(f"{self._place(page)}: truncated: copy the file again")
        self._check_segments(key)

    def _check_segments(self, key: Any) -> None:
        """Refuse strips or tiles that claim more pixels than fit in memory."""
        wide = key.tilewidth if key.is_tiled else key.imagewidth
        samples = key.samplesperpixel if key.planarconfig == 1 else 1
        segment = min(self._tall, key.imagelength if not key.is_tiled else self._tall) * wide * samples
        check_size(self._place(0), segment * self._stored.itemsize, copies=2)

    def _place(self, page: int) -> str:
        """Name of a page in messages."""
        return f"{self._files[page]}, page {self._numbers[page]}"

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        top, bottom, step = rows.indices(self.shape[0])
        out = np.zeros((max(bottom - top, 0), self.shape[1], self._samples), self._stored)
        # Bands are requested from top to bottom, and a strip or tile may reach into the next band. Each call keeps what
        # it decoded, only for the next call.
        kept, self._kept = self._kept, {}
        for page in range(len(self._numbers)):
            with reraise_as_user_error(f"{self._place(page)}: damaged", "copy the file again"):
                for index in self._overlapping(page, top, bottom):
                    decoded = kept.get((page, index)) or self._segment(page, index)
                    if bottom < self.shape[0]:
                        self._kept[page, index] = decoded
                    self._copy(out, top, page, *decoded)
        return self._conversion(out)[::step]

    def _overlapping(self, page: int, top: int, bottom: int) -> list[int]:
        """Numbers of the strips or tiles of a page that overlap some rows.

        They are numbered row by row; with planar samples, one plane after another.
        """
        down = math.ceil(self.shape[0] / self._tall)
        tops = [index // self._across % down * self._tall for index in range(len(self._where[page]))]
        return [index for index, first in enumerate(tops) if first < bottom and first + self._tall > top]

    def _segment(self, page: int, index: int) -> tuple:
        """One strip or tile (1, h, w, C), and its position (sample, depth, y, x, channel)."""
        offset, count = self._where[page][index]
        with self._files[page].open("rb") as file:
            file.seek(offset)
            segment, place, _ = self._decode(file.read(count) or None, index, **self._options[page])
        return segment, place

    def _copy(self, out: np.ndarray, top: int, page: int, segment: np.ndarray | None, place: tuple) -> None:
        """Copy the part of a strip or tile that lies in the rows from `top` on; a tile may extend beyond the image."""
        if segment is None:  # a hole in a sparse file
            return
        sample, _, y, x, _ = place
        pixels = segment[0][max(top - y, 0) : top + len(out) - y, : out.shape[1] - x]
        first, channel = max(y - top, 0), sample if len(self._where) == 1 else page
        out[first : first + len(pixels), x : x + pixels.shape[1], channel : channel + pixels.shape[2]] = pixels


_heard = threading.local()


class _Listener(logging.Filter):
    """Captures the messages that tifffile logs in a thread inside `_opened`; those of other threads pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a message is to be logged."""
        messages = getattr(_heard, "messages", None)
        if messages is not None:
            messages.append(record.getMessage())
        return messages is None


_LISTENER = _Listener()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, list[str]]]:
    """TIFF file, and the messages that tifffile logs meanwhile.

    A broken chain of pages is refused; tifffile only logs it and continues with fewer pages.
    """
    import tifffile

    logging.getLogger("tifffile").addFilter(_LISTENER)  # added once, however often this is called
    before = getattr(_heard, "messages", None)
    messages: list[str] = []
    _heard.messages = messages
    try:
        with tifffile.TiffFile(path) as tif:
            len(tif.pages)  # walks the chain of pages: a broken link is logged here
            yield tif, messages
    finally:
        _heard.messages = before
    broken = [message for message in messages if "TiffPages" in message]
    if broken:
        raise UserError(f"{path}: truncated or damaged ({broken[0].split('> ')[-1]}): copy the file again")


def tiff_geometry(path: Path, number: int) -> Geometry:
    """Axes of the frames of a series, pixel size, time step and names of the frames and channels.

    Empty if the tags are damaged: the pixels can be read without them.
    """
    try:
        with _opened(path) as (tif, _):
            series = tif.series[number]
            sizes = dict(zip(series.axes, series.shape, strict=True))
            axes = "".join(axis for axis in sizes if axis in "TZ")
            swapped = TURNS.get(_orientation(series), (False,))[0]
            image = _ome_image(tif, number) if tif.ome_metadata else None
            pixel, unit, interval = _imagej_sizes(tif) if image is None else _ome_sizes(image)
            channels = () if image is None else tuple(c.get("Name", "") for c in image.findall("{*}Channel"))
            num_channel = sizes.get("C", 1)  # ImageJ has a name for each channel of a frame
            names = (tif.imagej_metadata or {}).get("Labels", [])
            names = ([names] if isinstance(names, str) else names)[::num_channel]  # a single one is no list
            labels = tuple(map(str, names)) if len(names) == math.prod(sizes[axis] for axis in axes) else ()
            lengths = tuple(sizes[axis] for axis in axes)
            if swapped:
                pixel = {{"X": "Y", "Y": "X"}.get(axis, axis): size for axis, size in pixel.items()}
            return Geometry(axes, lengths, pixel, unit, interval, labels, channels)
    except Exception:  # damaged tags raise all kinds of exceptions
        return Geometry()


def tiff_palette(path: Path) -> np.ndarray | None:
    """Colours (N, 3) uint8 of the palette of a TIFF; None if it has none."""
    with _opened(path) as (tif, _):
        page = tif.pages[0]
        return None if page.colormap is None or page.photometric != 3 else (page.colormap.T >> 8).astype(np.uint8)


def _ome_image(tif: Any, number: int) -> ElementTree.Element:
    """Element `Pixels` of a series in the XML of an OME-TIFF; an empty one if it has none."""
    images = ElementTree.fromstring(tif.ome_metadata).findall(".//{*}Pixels")
    return images[number] if number < len(images) else ElementTree.Element("Pixels")


def _ome_sizes(image: ElementTree.Element) -> tuple[dict[str, float], str, float | None]:
    """Pixel size, its unit, and the time step [s] from the element `Pixels` of an OME-TIFF."""
    found = image.attrib
    sizes = {axis: found[f"PhysicalSize{axis}"] for axis in "XYZ" if f"PhysicalSize{axis}" in found}
    units = {axis: found.get(f"PhysicalSize{axis}Unit", "µm") for axis in sizes}
    return *in_micron(sizes, units), in_seconds(found.get("TimeIncrement"), found.get("TimeIncrementUnit", "s"))


def _imagej_sizes(tif: Any) -> tuple[dict[str, float], str, float | None]:
    """Pixel size, its unit, and the time step [s] from the tags of ImageJ or of baseline TIFF."""
    page, imagej = tif.pages[0], tif.imagej_metadata or {}
    interval = in_seconds(imagej.get("finterval"), str(imagej.get("tunit", "s")))
    x, y = page.resolution
    unit = str(imagej.get("unit", {2: "inch", 3: "cm"}.get(int(page.resolutionunit), "")))
    unit = unit.replace("\\u00B5", "µ").replace("\\u00C5", "Å")  # as ImageJ writes them
    if not unit or not x or not y:
        return {}, "", interval
    sizes = {"X": 1 / x, "Y": 1 / y} | ({"Z": imagej["spacing"]} if "spacing" in imagej else {})
    return *in_micron(sizes, dict.fromkeys(sizes, unit)), interval
