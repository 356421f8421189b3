"""Zarr folders and OME-Zarr images as frames (H, W, C), read chunk by chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from geometry import Geometry, in_micron, in_seconds
from utils import UserError, check_module


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr array or group, of version 2 or 3."""
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def read_zarr(path: Path) -> list[ZarrImage]:
    """Frames of a Zarr array, or of the first and largest array of an OME-Zarr image."""
    array, axes, _ = open_zarr(path)
    others = [axis for axis in axes if axis not in "CYX"]
    places = np.ndindex(*(array.shape[axes.index(axis)] for axis in others))
    return [ZarrImage(path, array, axes, dict(zip(others, place, strict=True))) for place in places]


def zarr_geometry(path: Path) -> Geometry:
    """Axes that the frames of a Zarr are counted along, the size of a pixel, and the time between frames."""
    array, letters, sizes = open_zarr(path)
    space = [axis for axis in "ZYX" if axis in sizes]
    pixel, unit = in_micron({axis: sizes[axis][0] for axis in space}, {axis: sizes[axis][1] for axis in space})
    axes = "".join(axis for axis in letters if axis not in "CYX")
    lengths = tuple(array.shape[letters.index(axis)] for axis in axes)
    return Geometry(axes, lengths, pixel, unit, in_seconds(*sizes["T"]) if "T" in sizes else None)


def open_zarr(path: Path) -> tuple[Any, str, dict[str, tuple[Any, str]]]:
    """Array of a Zarr folder, its axes as letters, and the size of a pixel with its unit along each of them.

    Raises
    ------
    UserError
        The package `zarr` is missing, or there is no image.
    """
    check_module("zarr", str(path))
    import zarr

    node = zarr.open(path, mode="r")
    if isinstance(node, zarr.Array):
        array, axes, pixel = node, _usual_axes(node.shape), {}
    else:
        array, axes, pixel = _open_image(path, node)
    if len(axes) != array.ndim or "Y" not in axes or "X" not in axes or array.dtype.kind not in "uifb":
        what = f"shape {array.shape} of {array.dtype}, axes {axes}"
        raise UserError(f"{path}: {what}: must be numbers along Y and X, and none but T, C and Z besides")
    return array, axes, pixel


def _usual_axes(shape: tuple[int, ...]) -> str:
    """Axes of an array that doesn't name them; channels are last where there are 2 to 4 at the end.

    Examples
    --------
    >>> _usual_axes((30, 512, 512)), _usual_axes((512, 512, 3)), _usual_axes((2, 30, 512, 512))
    ('ZYX', 'YXC', 'CZYX')
    """
    if len(shape) == 3 and shape[-1] > 4:
        return "ZYX"
    return ("TZYXC" if len(shape) > 2 and shape[-1] <= 4 else "TCZYX")[-len(shape) :]


def _open_image(path: Path, group: Any) -> tuple[Any, str, dict[str, tuple[Any, str]]]:
    """What `open_zarr` returns, of an OME-Zarr image, or of the only one in a group, as bioformats2raw writes it."""
    scales = _multiscales(group)
    if not scales:
        images = [(name, inner) for name, inner in sorted(group.groups()) if _multiscales(inner)]
        if len(images) != 1:
            inside = ", ".join(f"{path / name}" for name in sorted(name for name, _ in images or group.members()))
            raise UserError(f"{path}: not one OME-Zarr image: name one of what is in it ({inside or 'nothing'})")
        group = images[0][1]
        scales = _multiscales(group)
    named = scales[0].get("axes", "tczyx")  # no axes in OME-Zarr 0.1 and 0.2, names alone in 0.3
    named = [{"name": axis} if isinstance(axis, str) else axis for axis in named]
    axes = "".join(axis["name"] for axis in named).upper()
    first = scales[0]["datasets"][0]
    sizes = next((item["scale"] for item in first.get("coordinateTransformations", []) if "scale" in item), [])
    units = [str(axis.get("unit", "")) for axis in named]
    pixel = {axis: (size, unit) for axis, size, unit in zip(axes, sizes, units, strict=False)}
    return group[first["path"]], axes, pixel


def _multiscales(group: Any) -> list[dict]:
    """Resolutions of the images of a group, by OME-Zarr 0.5 or older; empty if it has none."""
    attributes = dict(group.attrs)
    return attributes.get("ome", attributes).get("multiscales", [])


class ZarrImage:
    """One image (H, W, C) of a Zarr array with named axes, read chunk by chunk."""

    def __init__(self, path: Path, array: Any, axes: str, place: dict[str, int]) -> None:
        self._path, self._array, self._axes, self._place = path, array, axes, place
        channels = array.shape[axes.index("C")] if "C" in axes else 1
        self.shape = (array.shape[axes.index("Y")], array.shape[axes.index("X")], channels)
        self.dtype = np.dtype(np.uint8) if array.dtype == bool else array.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        index = tuple(rows if axis == "Y" else self._place.get(axis, slice(None)) for axis in self._axes)
        try:
            block = np.asarray(self._array[index])
        except Exception as error:  # decoders raise whatever a damaged chunk makes them stumble over
            where = ", ".join(f"{axis} {number}" for axis, number in self._place.items())
            place = f"{self._path}, {where}" if where else str(self._path)
            raise UserError(f"{place}: damaged chunk ({str(error).strip()}): copy the folder again") from error
        left = [axis for axis in self._axes if axis not in self._place]
        block = block.transpose([left.index(axis) for axis in "YXC" if axis in left])
        block = block * np.uint8(255) if block.dtype == bool else block
        return block if "C" in left else block[..., None]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All pixels."""
        return self[:].astype(dtype or self.dtype, copy=False)
