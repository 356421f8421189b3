"""Images of Leica's `.lif` that bioio-lif does not read: of a colour camera, of wavelengths, and sections along Z."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from images.calibration import in_micron, positive
from images.geometry import Geometry

USUAL = {"T", "C", "Z", "M", "Y", "X"}  # axes of which bioio-lif makes images
COLOURS = ("S", "λ", "Λ")  # axes whose entries become channels: samples, wavelengths of emission and of excitation
ROWS = ("Z", "T")  # axes that become the rows of an image without Y: of an xz or xt scan
AXIS = {"1": "X", "2": "Y", "3": "Z"}  # by the number of a dimension in the metadata


class LifPlanes:
    """Image of a LIF as an array that is read frame by frame; the file is open only meanwhile."""

    def __init__(self, path: Path, number: int, image: Any) -> None:
        self._path, self._number = path, number
        self._names = tuple(image.dims)
        self.shape, self.dtype = tuple(image.shape), np.dtype(image.dtype)
        inner = image.frames.frame_sizes
        self.chunks = tuple(inner.get(name, 1) for name in self._names)
        self.axes = tuple(map(self._letter, self._names))

    def _letter(self, name: str) -> str:
        """Axis as images have it."""
        if name in COLOURS and "C" not in self._names:
            return "C"
        rows = next((axis for axis in ROWS if axis in self._names), None)
        return "Y" if "Y" not in self._names and name == rows else name

    def __getitem__(self, index: tuple[slice | int, ...]) -> np.ndarray:
        """Part of the image."""
        parts = dict(zip(self._names, index, strict=True))
        with _opened(self._path) as lif:
            frames = lif.images[self._number].frames
            inner = frames.frame_sizes
            outer = {  # numbers along the axes that count the frames
                name: np.atleast_1d(np.arange(length)[parts[name]]).tolist()
                for name, length in zip(self._names, self.shape, strict=True)
                if name not in inner
            }
            pixels = frames(**outer).asarray()
        order = [*outer, *inner]
        pixels = pixels.reshape(*map(len, outer.values()), *inner.values())
        pixels = pixels.transpose([order.index(name) for name in self._names])
        # outer axes are read already; one that was indexed by a number is dropped
        left = {name: 0 if isinstance(parts[name], int) else slice(None) for name in outer}
        return pixels[tuple((parts | left).values())]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """File of Leica, whatever its name ends with."""
    from liffile import LifFile

    with path.open("rb") as stream, LifFile(stream) as lif:
        yield lif


def unusual_image(path: Path, number: int) -> tuple[LifPlanes, Geometry] | None:
    """Image of a LIF that bioio-lif does not read, and its geometry; None for others."""
    with _opened(path) as lif:
        image = lif.images[number]
        if {*image.dims} <= USUAL and {"Y", "X"} <= {*image.dims}:
            return None
        planes = LifPlanes(path, number, image)
        return planes, _geometry(planes, image)


def _geometry(planes: LifPlanes, image: Any) -> Geometry:
    """Axes of the frames, pixel size, and names of the channels."""
    letters = dict(zip(image.dims, planes.axes, strict=True))
    sizes = {}
    for entry in image.xml_element.findall("./Data/Image/ImageDescription/Dimensions/DimensionDescription"):
        axis, num = AXIS.get(entry.get("DimID")), int(entry.get("NumberOfElements"))
        if axis in letters and num > 1 and entry.get("Unit") == "m":
            sizes[letters[axis]] = abs(float(entry.get("Length"))) * 1e6 / (num - 1)
    pixel, unknown = in_micron({axis: positive(size) for axis, size in sizes.items()}, dict.fromkeys(sizes, "µm"))
    outer = {axis: num for axis, num in zip(planes.axes, image.shape, strict=True) if axis not in "CYX"}
    names = [entry.get("LUTName", "") for entry in image.xml_element.findall(".//ChannelDescription")]
    of_samples = "S" in image.dims and "C" not in image.dims
    return Geometry("".join(outer), tuple(outer.values()), pixel, unknown, channels=tuple(names if of_samples else ()))
