"""What a CZI needs besides bioio-czi: patience with its metadata, and the scenes and planes that it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from images.rows import Missing, Rows


def patient_reader() -> Any:
    """Reader of bioio-czi that reads the pixels though the metadata lack a scale or name other channels."""
    from bioio_base.types import PhysicalPixelSizes
    from bioio_czi.aicspylibczi_reader.reader import Reader

    class PatientReader(Reader):
        @staticmethod
        def _get_coords_and_physical_px_sizes(xml: Any, scene_index: int, dims_shape: dict[str, Any]) -> Any:
            try:
                coords, sizes = Reader._get_coords_and_physical_px_sizes(xml, scene_index, dims_shape)
            except Exception:  # no scale, or one that is no number
                return {}, PhysicalPixelSizes(None, None, None)
            return {axis: values for axis, values in coords.items() if axis in dims_shape}, sizes

    return PatientReader


def missing_scenes(path: Path, num_named: int) -> list[str]:
    """Note of a file that has more scenes than its metadata name: bioio-czi reads those only."""
    from aicspylibczi import CziFile

    spans = [shape.get("S", (0, 1)) for shape in CziFile(str(path)).get_dims_shape()]
    num = sum(last - first for first, last in spans)
    what = f"{num} scenes, of which its metadata name {num_named}, which bioio reads: export the others with ZEN"
    return [what] if num > num_named else []


def without_missing(path: Path, scene: int, axes: str, lengths: tuple[int, ...], images: Sequence[Rows]) -> list[Rows]:
    """Frames of a scene, those marked of which the file lacks a channel or all, as after an aborted acquisition."""
    places = _places(path, scene)
    if not places or any(axis not in places[0] for axis in axes):
        return list(images)
    first = {axis: min(place[axis] for place in places) for axis in axes}
    channels: dict[tuple[int, ...], set[int]] = {}
    for place in places:
        frame = tuple(place[axis] - first[axis] for axis in axes)
        channels.setdefault(frame, set()).add(place.get("C", 0))
    num = len(set().union(*channels.values()))
    is_there = [len(channels.get(frame, ())) == num for frame in np.ndindex(*lengths)]
    return [
        image if there else Missing(image.shape, image.dtype) for image, there in zip(images, is_there, strict=True)
    ]


def _places(path: Path, scene: int) -> list[dict[str, int]]:
    """Indices along T, Z, C and so on of each tile of a scene."""
    from aicspylibczi import CziFile

    file = CziFile(str(path))
    boxes = file.get_all_mosaic_tile_bounding_boxes() if file.is_mosaic() else file.get_all_tile_bounding_boxes()
    places = [dict(tile.dimension_coordinates) for tile in boxes]
    scenes = sorted({place.get("S", 0) for place in places})
    return [place for place in places if place.get("S", 0) == scenes[scene]]
