"""PNG, JPEG, BMP, GIF and other pictures that Pillow reads: one frame (H, W, C), decoded when it is needed."""

from __future__ import annotations

import math
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from images.foreign import check_content
from images.memory import ByteCache, check_size
from images.notes import captured_warnings, say_once
from images.orientation import NOTE, orientation_of, turn
from images.rows import Frames, LazyImage, Series, reraise_as_user_error, to_native
from utils import UserError

_decoded = ByteCache(2**28)  # a picture is read band by band, and again as the neighbour of other sections
_opening = Lock()
SAMPLES = {2: 3, 4: 1, 6: 3}  # PNG colour type -> channels without alpha
DECODERS = {"PNG": "png_decode", "JPEG2000": "jpeg2k_decode"}  # functions of imagecodecs
JPEG2000_SIZE = b"\xff\x4f\xff\x51"  # markers before the size and the depth of each sample
AS_RGB = ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV")  # modes that are converted to RGB


def read_picture(path: Path, *, is_named_so: bool) -> Frames | None:
    """The frame of a picture, of which only the header is read; None if Pillow does not know the format.

    A file that is named as an image, and is none, is refused with what it is instead.
    """
    from PIL import UnidentifiedImageError

    try:
        with captured_warnings() as warned:
            picture = Picture(path)
    except UnidentifiedImageError:
        if not is_named_so:
            return None
        check_content(path)
        raise
    frames = Frames(kind=picture.kind, notes=[f"Pillow says: {text}" for text in warned])
    if picture.orientation != 1:
        frames.notes.append(NOTE)
    frames.add([picture], Series())
    return frames


def _open(path: Path, page: int | None = None) -> Any:
    """Open a picture, or a page of a TIFF, without Pillow's global size limit: the caller checks the size."""
    from PIL import Image, TiffImagePlugin

    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        by_libtiff, TiffImagePlugin.READ_LIBTIFF = TiffImagePlugin.READ_LIBTIFF, page is not None
        try:
            image = Image.open(path)
            if page:
                image.seek(page)
            return image
        finally:
            Image.MAX_IMAGE_PIXELS, TiffImagePlugin.READ_LIBTIFF = limit, by_libtiff


def picture_palette(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Indices (H, W) and colours (256, 3) uint8 of a picture with a palette."""
    with captured_warnings(), _open(path) as image:
        indices, colours = turn(np.asarray(image), orientation_of(image)), np.array(image.getpalette("RGB"))
        return indices, np.pad(colours, (0, 768 - len(colours))).reshape(256, 3).astype(np.uint8)


class Picture(LazyImage):
    """Image (H, W, C) of a file that Pillow reads, as it was seen by the camera.

    Of a TIFF it is a page, from 0, whose pixels only Pillow converts, and which it turns by its own orientation.
    """

    def __init__(self, path: Path, page: int | None = None) -> None:
        from PIL import Image

        status = path.stat()
        self._path, self._page, self._version = path, page, (status.st_mtime_ns, status.st_size, page)
        with _open(path, page) as image:
            number = getattr(image, "n_frames", 1) if page is None else 1
            if number > 1 and image.format != "MPO":  # that is a JPEG with a preview inside
                raise UserError(f"{path}: {number} images in one file: save them as a TIFF stack")
            self.kind, size, mode = image.format, image.size, image.mode
            self.has_palette = mode == "P" and page is None
            self.orientation = orientation_of(image) if page is None else 1
        self._deep = _deep_channels(path, self.kind)
        pixel = np.zeros((1, 1, self._deep), np.uint16) if self._deep else _pixels(Image.new(mode, (1, 1)))
        height, width = turn(np.broadcast_to(np.uint8(0), size[::-1]), self.orientation).shape
        super().__init__((height, width, pixel.shape[2]), pixel.dtype, self._rows)
        check_size(path, math.prod(self.shape) * self.dtype.itemsize, copies=3)
        if self._deep:
            _decoder(path, self.kind)  # refuses it without the package

    def _rows(self, top: int, bottom: int) -> np.ndarray:
        return _decoded.get((self._path, self._version), self._decode)[top:bottom]

    def _decode(self) -> np.ndarray:
        damaged = f"{self._path}: damaged or truncated"
        with captured_warnings() as warned, reraise_as_user_error(damaged, "check or replace the file"):
            if self._deep:
                pixels = _decoder(self._path, self.kind)(self._path.read_bytes())
                pixels = pixels[..., None] if pixels.ndim == 2 else pixels[..., : self._deep]
            else:
                with _open(self._path, self._page) as image:
                    image.load()
                    pixels = _pixels(image)
        pixels = turn(pixels, self.orientation)
        if (pixels.shape, pixels.dtype) != (self.shape, self.dtype):
            raise UserError(f"{self._path}: damaged (not the pixels of its header): check or replace the file")
        for text in warned:
            say_once(self._path, f"Pillow says: {text}")
        return pixels


def _pixels(image: Any) -> np.ndarray:
    """Pixels (H, W, C) of a Pillow image, without alpha."""
    image.info.pop("transparency", None)  # of a palette; Pillow warns that it is lost
    pixels = to_native(np.asarray(image.convert("RGB") if image.mode in AS_RGB else image))
    if pixels.ndim == 2:
        return pixels[..., None]
    return pixels[..., :-1] if pixels.shape[-1] in (2, 4) else pixels


def _deep_channels(path: Path, kind: str) -> int:
    """Number of channels of a 16-bit picture with colours or alpha, which Pillow would cut to 8 bits; 0 for others."""
    with path.open("rb") as file:
        header = file.read(2**12)
    if kind == "PNG":  # bytes 24 and 25 of the IHDR chunk: bit depth and colour type
        return SAMPLES.get(header[25], 0) if header[24] == 16 else 0
    # the SIZ marker of JPEG 2000: number of components at byte 37, depth of the first (minus one) at 38
    _, _, size = header.partition(JPEG2000_SIZE) if kind == "JPEG2000" else (b"", b"", b"")
    samples, depth = (size[37], (size[38] & 127) + 1) if len(size) > 38 else (1, 8)
    return {2: 1, 4: 3}.get(samples, samples) if samples > 1 and 8 < depth <= 16 else 0


def _decoder(path: Path, kind: str) -> Any:
    """Decoder of 16-bit pictures."""
    try:
        import imagecodecs
    except ImportError as error:
        raise UserError(f"{path}: 16-bit colours need the package imagecodecs: pip install imagecodecs") from error
    return getattr(imagecodecs, DECODERS[kind])
