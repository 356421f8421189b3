"""Zarr folders, OME-Zarr images and plates as frames (H, W, C), read chunk by chunk."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from images.calibration import in_micron, in_seconds
from images.chunks import ChunkedArray, usual_axes
from images.geometry import Geometry
from images.rows import Frames, Series, listed
from utils import UserError, check_module, natural_key


class ZarrImage(NamedTuple):
    """A Zarr array, or the full resolution of an OME-Zarr image."""

    array: Any
    axes: str  # one letter each
    levels: int  # number of resolutions
    sizes: dict[str, tuple[Any, str]]  # pixel size and unit along the axes that have one
    channels: tuple[str, ...]  # their names


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr array or group of version 2 or 3."""
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def read_zarr(path: Path) -> Frames:
    """Frames of a Zarr array, the full resolution of an OME-Zarr image, or all images of a plate or group."""
    node = _open(path)
    names = _image_names(path, node)
    is_array = hasattr(node, "dtype")
    part = next((part for part in ("plate", "well") if not is_array and _entry(node, part)), "")
    frames = Frames(kind="Zarr" if is_array else f"OME-Zarr {part}".strip(), named=bool(part) or len(names) > 1)
    for name in names:
        _refuse_link(path, name)
        image = _open_image(path / name)
        source = ChunkedArray(path / name, image.array, image.axes)
        geometry = partial(_geometry, image, source)
        frames.add(source.images(), Series(name, source.outer_axes, source.outer_lengths, geometry, image.levels))
    if len(names) > 1 and not part:
        members = listed([path / name for name in names])
        frames.ambiguous = f"{path}: not one OME-Zarr image: name one of its members ({members}), or choose by --series"
    return frames


def _geometry(image: ZarrImage, source: ChunkedArray) -> Geometry:
    """Axes of the frames of an image, pixel size, time step and names of the channels."""
    space = [axis for axis in "ZYX" if axis in image.sizes]
    steps, units = ({axis: image.sizes[axis][part] for axis in space} for part in (0, 1))
    pixel, unknown = in_micron(steps, units)
    interval = in_seconds(*image.sizes["T"]) if "T" in image.sizes else None
    return Geometry(source.outer_axes, source.outer_lengths, pixel, unknown, interval, channels=image.channels)


def _open(path: Path) -> Any:
    """Array or group of a Zarr folder, in which no link is followed."""
    check_module("zarr", str(path))
    import zarr
    from zarr.storage import LocalStore, WrapperStore

    class LinklessStore(WrapperStore):
        """Store of a folder that refuses links in it."""

        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            """Metadata or a chunk."""
            _refuse_link(path, key)
            return await super().get(key, prototype, byte_range)

    return zarr.open(LinklessStore(LocalStore(path, read_only=True)), mode="r")


def _image_names(path: Path, node: Any) -> list[str]:
    """Paths of the images in a Zarr folder; an empty one for the folder itself.

    A plate has its fields well by well, other groups their members, as bioformats2raw writes them.
    """
    if hasattr(node, "dtype"):
        return [""]
    _check_version(path, node)
    if _entry(node, "multiscales"):
        return [""]
    if plate := _entry(node, "plate"):
        wells = sorted((str(well["path"]) for well in plate["wells"]), key=natural_key)
        missing = [well for well in wells if well not in node]
        if missing:
            what = f"the well {missing[0]} of the plate is missing"
            raise UserError(f"{path}: {what}: copy the folder again, with all wells")
        return [f"{well}/{field['path']}" for well in wells for field in _entry(node[well], "well").get("images", [])]
    if well := _entry(node, "well"):
        return [str(field["path"]) for field in well["images"]]
    names = sorted((name for name, member in node.groups() if _entry(member, "multiscales")), key=natural_key)
    if not names:
        members = listed([path / name for name in sorted(name for name, _ in node.members())])
        raise UserError(f"{path}: not one OME-Zarr image: name one of its members ({members or 'nothing'})")
    return names


def _check_version(path: Path, group: Any) -> None:
    """Refuse OME-Zarr of version 0.6 and later, whose axes and sizes are stored elsewhere."""
    scales = _entry(group, "multiscales")
    version = str(_entry(group, "version") or (scales and scales[0].get("version")) or "")
    number = re.match(r"(\d+)\.(\d+)", version)
    if (number and (int(number[1]), int(number[2])) > (0, 5)) or (scales and "coordinateSystems" in scales[0]):
        raise UserError(
            f"{path}: OME-Zarr {version or 0.6}: up to 0.5 is read: write it as OME-Zarr 0.5, or as OME-TIFF"
        )


def _open_image(path: Path) -> ZarrImage:
    """Image of a Zarr folder; refused if it is none."""
    node = _open(path)
    is_array = hasattr(node, "dtype")
    image = ZarrImage(node, usual_axes(node.shape), 1, {}, ()) if is_array else _ome_image(node)
    array, axes = image.array, image.axes
    if len(axes) != array.ndim or "Y" not in axes or "X" not in axes or array.dtype.kind not in "uifb":
        what = f"shape {array.shape} of {array.dtype}, axes {axes}"
        raise UserError(f"{path}: {what}: must be numbers with axes Y and X, and otherwise only T, C and Z")
    return image


def _ome_image(group: Any) -> ZarrImage:
    """Image of an OME-Zarr group."""
    scale = _entry(group, "multiscales")[0]
    named = scale.get("axes", "tczyx")  # no axes in OME-Zarr 0.1 and 0.2, only names in 0.3
    named = [{"name": axis} if isinstance(axis, str) else axis for axis in named]
    axes = "".join(axis["name"] for axis in named).upper()
    full = scale["datasets"][0]
    transformations = [*full.get("coordinateTransformations", []), *scale.get("coordinateTransformations", [])]
    steps: list[Any] = []
    for item in transformations:  # the scale of all levels multiplies that of the level
        if "scale" in item:
            steps = [a * b for a, b in zip(steps or [1] * len(axes), item["scale"], strict=False)]
    units = [str(axis.get("unit", "")) for axis in named]
    sizes = {axis: (step, unit) for axis, step, unit in zip(axes, steps, units, strict=False)}
    channels = tuple(str(channel.get("label", "")) for channel in _entry(group, "omero").get("channels", []))
    return ZarrImage(group[full["path"]], axes, len(scale["datasets"]), sizes, channels)


def _refuse_link(path: Path, inner: str) -> None:
    """Refuse to leave a Zarr folder: by a link, which may lead to any file, or by a path in its metadata."""
    parts = [part for part in inner.split("/") if part not in ("", ".")]
    if ".." in parts or Path(inner).is_absolute():
        raise UserError(f"{path}: its metadata name {inner}, which lies outside: name that folder itself")
    for number in range(len(parts)):
        member = path.joinpath(*parts[: number + 1])
        if member.is_symlink():
            what = "is a link, which is not followed inside a Zarr folder"
            raise UserError(f"{member}: {what}: copy what it leads to, or name that itself")


def _entry(node: Any, name: str) -> Any:
    """Metadata of a group by OME-Zarr 0.5 or older; an empty dict if it has none of that name."""
    attributes = dict(node.attrs)
    return dict(attributes.get("ome", attributes)).get(name, {})
