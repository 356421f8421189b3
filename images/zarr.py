"""Zarr folders, OME-Zarr images and plates as frames (H, W, C), read chunk by chunk."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from images.chunks import ChunkedArray, usual_axes
from images.geometry import Geometry, in_micron, in_seconds
from images.rows import Frames, Series, check_count, listed
from utils import UserError, check_module, natural_key


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr array or group of version 2 or 3."""
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def read_zarr(path: Path) -> Frames:
    """Frames of a Zarr array, the full resolution of an OME-Zarr image, or all images of a plate or group."""
    node = _open(path)
    names = _image_names(path, node)
    part = next((part for part in ("plate", "well") if _is_group(node) and _entry(node, part)), "")
    found = Frames(kind=f"OME-Zarr {part}".strip() if _is_group(node) else "Zarr", named=bool(part) or len(names) > 1)
    for name in names:
        refuse_link(path, name)
        source, levels = _open_array(path / name)
        axes, lengths = source.outer
        check_count(path, (*lengths, len(names)))
        geometry = partial(zarr_geometry, path / name)
        found.add(source.images(), Series(name, axes, lengths, geometry, levels))
    if len(names) > 1 and not part:
        inside = listed([path / name for name in names])
        found.ambiguous = f"{path}: not one OME-Zarr image: name one of its members ({inside}), or choose by --series"
    return found


def _open_array(path: Path) -> tuple[ChunkedArray, int]:
    """Array of one image, and its number of levels."""
    array, axes, _, levels = open_zarr(path)
    source = ChunkedArray(path, array, axes)
    array.store.most = 8 * source.chunk_byte + 2**20  # filters may change the size a little
    return source, levels


def zarr_geometry(path: Path) -> Geometry:
    """Axes of the frames of a Zarr image, pixel size, time step and names of the channels."""
    array, letters, sizes, _ = open_zarr(path)
    space = [axis for axis in "ZYX" if axis in sizes]
    pixel, unit = in_micron({axis: sizes[axis][0] for axis in space}, {axis: sizes[axis][1] for axis in space})
    axes = "".join(axis for axis in letters if axis not in "CYX")
    lengths = tuple(array.shape[letters.index(axis)] for axis in axes)
    interval = in_seconds(*sizes["T"]) if "T" in sizes else None
    names = [str(channel.get("label", "")) for channel in _entry(_open(path), "omero").get("channels", [])]
    return Geometry(axes, lengths, pixel, unit, interval, channels=tuple(names))


def _open(path: Path) -> Any:
    """Array or group of a Zarr folder."""
    check_module("zarr", str(path))
    import zarr

    return zarr.open(_careful_store(path), mode="r")


def _is_group(node: Any) -> bool:
    return hasattr(node, "groups")


def _image_names(path: Path, node: Any) -> list[str]:
    """Paths of the images in a Zarr folder; an empty one for the folder itself.

    Those of OME-Zarr 0.6 and later are refused.

    A plate has its fields well by well, other groups their members, as bioformats2raw writes them.
    """
    if not _is_group(node):
        return [""]
    _check_version(path, node)
    if _multiscales(node):
        return [""]
    if plate := _entry(node, "plate"):
        wells = sorted((str(well["path"]) for well in plate["wells"]), key=natural_key)
        return [f"{well}/{field['path']}" for well in wells for field in _fields(path, node, well)]
    if well := _entry(node, "well"):
        return [str(field["path"]) for field in well["images"]]
    names = sorted((name for name, inner in node.groups() if _multiscales(inner)), key=natural_key)
    if not names:
        inside = listed([path / name for name in sorted(name for name, _ in node.members())])
        raise UserError(f"{path}: not one OME-Zarr image: name one of its members ({inside or 'nothing'})")
    return names


def _check_version(path: Path, group: Any) -> None:
    """Refuse OME-Zarr of a version whose axes and sizes stand elsewhere."""
    scales = _multiscales(group)
    version = str(_entry(group, "version") or (scales and scales[0].get("version")) or "")
    found = re.match(r"(\d+)\.(\d+)", version)
    if (found and (int(found[1]), int(found[2])) > (0, 5)) or (scales and "coordinateSystems" in scales[0]):
        raise UserError(
            f"{path}: OME-Zarr {version or 0.6}: up to 0.5 is read: write it as OME-Zarr 0.5, or as OME-TIFF"
        )


def _fields(path: Path, plate: Any, well: str) -> list[dict]:
    """Entries of the fields of a well."""
    if well not in plate:
        raise UserError(f"{path}: the well {well} of the plate is missing: copy the folder again, with all wells")
    return _entry(plate[well], "well").get("images", [])


def open_zarr(path: Path) -> tuple[Any, str, dict[str, tuple[Any, str]], int]:
    """Array of a Zarr image, its axes as letters, pixel size and unit along each of them, and the number of levels.

    Raises
    ------
    UserError
        The package `zarr` is missing, or the folder is not an image.
    """
    node = _open(path)
    pixel: dict[str, tuple[Any, str]] = {}
    if _is_group(node):
        array, axes, pixel, levels = _open_image(node)
    else:
        array, axes, levels = node, usual_axes(node.shape), 1
    if len(axes) != array.ndim or "Y" not in axes or "X" not in axes or array.dtype.kind not in "uifb":
        what = f"shape {array.shape} of {array.dtype}, axes {axes}"
        raise UserError(f"{path}: {what}: must be numbers with axes Y and X, and otherwise only T, C and Z")
    return array, axes, pixel, levels


def _careful_store(path: Path) -> Any:
    """Store of a folder that refuses links, and a chunk whose header claims more than `most` bytes."""
    from zarr.storage import LocalStore, WrapperStore

    class CarefulStore(WrapperStore):
        most = 2**63

        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            refuse_link(path, key)
            chunk = await super().get(key, prototype, byte_range)
            claimed = 0 if chunk is None else _claimed(chunk.as_numpy_array()[:18].tobytes(), len(chunk))
            if claimed > self.most:
                raise ValueError(f"{key} unpacks to {claimed} bytes")
            return chunk

    return CarefulStore(LocalStore(path, read_only=True))


def refuse_link(path: Path, inner: str) -> None:
    """Refuse to leave a Zarr folder: by a link, which may lead to any file, or by a path in its metadata."""
    parts = [part for part in inner.split("/") if part not in ("", ".")]
    if ".." in parts or Path(inner).is_absolute():
        raise UserError(f"{path}: its metadata name {inner}, which lies outside: name that folder itself")
    for number in range(len(parts)):
        member = path.joinpath(*parts[: number + 1])
        if member.is_symlink():
            what = "is a link, which is not followed inside a Zarr folder"
            raise UserError(f"{member}: {what}: copy what it leads to, or name that itself")


def _claimed(start: bytes, length: int) -> int:
    """Uncompressed size claimed by the header of a Zstandard or Blosc chunk; 0 for other codecs.

    Sources: RFC 8878, section 3.1.1.1, and README_CHUNK_FORMAT.rst of c-blosc.
    """
    if start[:4] == b"\x28\xb5\x2f\xfd" and len(start) > 5:
        # magic number (4 bytes), flags, window descriptor unless single-segment, dictionary id, size of the content
        flags = start[4]
        single = flags >> 5 & 1
        size = (single, 2, 4, 8)[flags >> 6]
        first = 6 - single + (0, 1, 2, 4)[flags & 3]
        return int.from_bytes(start[first : first + size], "little") + 256 * (size == 2)  # two bytes: minus 256
    of_blosc = start[:1] == b"\2" and int.from_bytes(start[12:16], "little") == length
    return int.from_bytes(start[4:8], "little") if of_blosc else 0


def _open_image(group: Any) -> tuple[Any, str, dict[str, tuple[Any, str]], int]:
    """What `open_zarr` returns, for an OME-Zarr image."""
    scales = _multiscales(group)
    named = scales[0].get("axes", "tczyx")  # no axes in OME-Zarr 0.1 and 0.2, only names in 0.3
    named = [{"name": axis} if isinstance(axis, str) else axis for axis in named]
    axes = "".join(axis["name"] for axis in named).upper()
    first = scales[0]["datasets"][0]
    sizes: list[Any] = next(
        (item["scale"] for item in first.get("coordinateTransformations", []) if "scale" in item), []
    )
    units = [str(axis.get("unit", "")) for axis in named]
    pixel = {axis: (size, unit) for axis, size, unit in zip(axes, sizes, units, strict=False)}
    return group[first["path"]], axes, pixel, len(scales[0]["datasets"])


def _multiscales(group: Any) -> list[dict]:
    """Entry `multiscales` of a group by OME-Zarr 0.5 or older; empty if it has none."""
    return _entry(group, "multiscales") or []


def _entry(node: Any, name: str) -> Any:
    """Metadata of a group by OME-Zarr 0.5 or older; an empty dict if it has none of that name."""
    attributes = dict(node.attrs)
    return dict(attributes.get("ome", attributes)).get(name, {})
