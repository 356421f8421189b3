"""What a CZI needs besides bioio-czi: patience with its metadata, and the scenes and planes that it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from images.rows import LazyImage


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


def mark_missing(path: Path, scene: int, axes: str, lengths: tuple[int, ...], images: Sequence[LazyImage]) -> None:
    """Mark the frames of a scene of which the file lacks a channel or all, as after an aborted acquisition."""
    tiles = _tiles(path, scene)
    if not tiles or any(axis not in tiles[0] for axis in axes):
        return
    first = {axis: min(tile[axis] for tile in tiles) for axis in axes}
    channels: dict[tuple[int, ...], set[int]] = {}  # of each frame
    for tile in tiles:
        channels.setdefault(tuple(tile[axis] - first[axis] for axis in axes), set()).add(tile.get("C", 0))
    num = len(set().union(*channels.values()))
    for image, frame in zip(images, np.ndindex(*lengths), strict=True):
        image.is_missing = len(channels.get(frame, ())) < num


def _tiles(path: Path, scene: int) -> list[dict[str, int]]:
    """Indices along T, Z, C and so on of each tile of a scene."""
    from aicspylibczi import CziFile

    file = CziFile(str(path))
    boxes = file.get_all_mosaic_tile_bounding_boxes() if file.is_mosaic() else file.get_all_tile_bounding_boxes()
    tiles = [dict(tile.dimension_coordinates) for tile in boxes]
    scenes = sorted({tile.get("S", 0) for tile in tiles})
    return [tile for tile in tiles if tile.get("S", 0) == scenes[scene]]
