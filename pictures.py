"""PNG, JPEG, BMP, GIF and what else Pillow reads: one frame (H, W, C), decoded when its rows are asked for."""

from __future__ import annotations

import math
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from frames import Frames, Readable, naming, plain
from memory import ANY, DEFLATE, ByteCache, check_size
from utils import UserError

_decoded = ByteCache(2**28)  # a band is read after another, and a section as its neighbours' neighbour
_opening = Lock()
SAMPLES = {2: 3, 4: 1, 6: 3}  # channels but alpha of a PNG, by its colour type: RGB, grey and alpha, RGB and alpha
AS_RGB = ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV")  # modes that become the colours they stand for


def read_picture(path: Path) -> Frames:
    """The one frame of a picture; nothing but its header is read."""
    return Frames([Picture(path)], [0])


def _open(path: Path) -> Any:
    """Picture whose header is read; how large it may be is for the caller to say, and not for Pillow's global limit."""
    from PIL import Image

    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


class Picture(Readable):
    """Image (H, W, C) of a file that Pillow reads.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    UserError
        It holds several images, needs a package that is missing, or claims more pixels than can be.
    """

    def __init__(self, path: Path) -> None:
        status = path.stat()
        self._path, self._version = path, (status.st_mtime_ns, status.st_size)
        with _open(path) as image:
            number = getattr(image, "n_frames", 1)
            if number > 1 and image.format != "MPO":  # that is a JPEG with a preview inside
                raise UserError(f"{path}: {number} images in one file: save them as a TIFF stack")
            self._deep = _is_deep_png(path) if image.format == "PNG" else 0
            size, kind, mode = image.size, image.format, image.mode
        pixel = np.zeros((1, 1, self._deep), np.uint16) if self._deep else _pixels(_blank(mode))
        self.shape, self.dtype = (size[1], size[0], pixel.shape[2]), pixel.dtype
        ratio = DEFLATE if kind == "PNG" else ANY
        check_size(path, math.prod(self.shape) * self.dtype.itemsize, status.st_size, ratio=ratio, copies=3)
        if self._deep:
            _png_decoder(path)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        return _decoded.get((self._path, self._version), self._decode)[rows]

    def _decode(self) -> np.ndarray:
        with naming(f"{self._path}: damaged or truncated", "check or replace the file"):
            if self._deep:
                pixels = _png_decoder(self._path)(self._path.read_bytes())
                pixels = pixels[..., None] if pixels.ndim == 2 else pixels[..., : self._deep]
            else:
                with _open(self._path) as image:
                    image.load()
                    pixels = _pixels(image)
        if (pixels.shape, pixels.dtype) != (self.shape, self.dtype):
            raise UserError(f"{self._path}: damaged (not the pixels of its header): check or replace the file")
        return pixels


def _blank(mode: str) -> Any:
    from PIL import Image

    return Image.new(mode, (1, 1))


def _pixels(image: Any) -> np.ndarray:
    """Pixels (H, W, C) of a picture of Pillow, without alpha."""
    pixels = plain(np.asarray(image.convert("RGB") if image.mode in AS_RGB else image))
    if pixels.ndim == 2:
        return pixels[..., None]
    return pixels[..., :-1] if pixels.shape[-1] in (2, 4) else pixels


def _is_deep_png(path: Path) -> int:
    """Number of channels of a PNG with colours or alpha in 16 bits, which Pillow would cut to 8; 0 for others."""
    with path.open("rb") as file:
        header = file.read(26)
    return SAMPLES.get(header[25], 0) if header[24] == 16 else 0


def _png_decoder(path: Path) -> Any:
    """Decoder of PNGs in 16 bits."""
    try:
        from imagecodecs import png_decode
    except ImportError as error:
        raise UserError(f"{path}: colours in 16 bits need the package imagecodecs: pip install imagecodecs") from error
    return png_decode
