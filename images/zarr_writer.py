"""OME-Zarr output of a prediction, written band by band."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from files import explain_write_errors, flush_folders, make_folder, partial_of, publish, swap_folders
from images.layout import Layout
from images.output_paths import old_of
from images.writers import Writer
from utils import check_module

CHUNK = 512  # [px] widest chunk of a Zarr array


class ZarrWriter(Writer):
    """An OME-Zarr 0.5 image with a pyramid, written to `NAME.partial` and renamed when it is complete.

    An older image and the new one are exchanged in one step where the system can do that, else the older one is
    `NAME.old` until the new one is in place. The next writer cleans up after a killed process; it must hold the lock
    of the path and have called `check_replaceable`.

    Parameters
    ----------
    path : Path
        The Zarr folder.
    layout : Layout
        Shape, type and geometry.
    create : bool
        Whether this process creates the array; the others open it afterwards.
    tall : int
        Height of a band and of a chunk [px].
    chunk : int
        Width of a chunk, and largest size of the last pyramid level [px].
    """

    def __init__(self, path: Path, layout: Layout, create: bool, tall: int, chunk: int = CHUNK) -> None:
        check_module("zarr", str(path))
        import zarr

        self.path, self.partial, self.layout, self._zarr = path, partial_of(path), layout, zarr
        self.chunk = chunk
        self._array: Any = None
        if create:
            with self.discard_on_error(), explain_write_errors(path):
                self._mend()
                make_folder(self.partial)
                self._create("0", layout.full_shape, tall)

    def _mend(self) -> None:
        """Restore the older image if there is no other, and remove everything else that a writer left."""
        old = old_of(self.path)
        if (old / "zarr.json").is_file() and not self.path.exists():
            old.rename(self.path)
            flush_folders(self.path.parent)
        for folder in (old, self.partial):
            if folder.is_dir():
                (folder / "zarr.json").unlink(missing_ok=True)  # first, so that a half-removed image is never restored
                shutil.rmtree(folder)

    def _create(self, name: str, shape: tuple[int, ...], tall: int) -> Any:
        """Create one level; a chunk holds one band of one plane, so processes never share a chunk."""
        lead = len(shape) - 2
        chunks = (*[1] * lead, min(tall, shape[-2]), min(self.chunk, shape[-1]))
        return self._zarr.create_array(
            self.partial / name,
            shape=shape,
            dtype=self.layout.dtype,
            chunks=chunks,
            dimension_names=list(self.layout.axes.lower()),
        )

    def write(self, frame: int, top: int, band: np.ndarray) -> None:
        """Write rows (C, h, W) of a frame, from row `top` on."""
        with explain_write_errors(self.path):
            if self._array is None:
                self._array = self._zarr.open_array(self.partial / "0", mode="r+")
            place, rows = self.layout.place(frame, slice(None)), slice(top, top + band.shape[1])
            self._array[(*place, rows)] = band if len(band) > 1 else band[0]

    def finish(self) -> None:
        """Add the pyramid and the metadata, and rename the folder."""
        with explain_write_errors(self.path):
            scales = self._pyramid()
            group = self._zarr.open_group(self.partial, mode="a")
            group.attrs["ome"] = self._metadata(scales)
            if not (self.path.exists() and swap_folders(self.partial, self.path)):
                if self.path.exists():
                    self.path.rename(old_of(self.path))
                publish(self.partial, self.path)
        self.discard()  # the older image: at the partial path after a swap

    def discard(self) -> None:
        """Remove the partial folder, and the older image if a newer one is in place."""
        with suppress(OSError):
            self._mend()

    def _pyramid(self) -> list[tuple[float, float]]:
        """Write the smaller levels, each half as high and wide; return their factors along Y and X."""
        array = self._zarr.open_array(self.partial / "0", mode="r")
        scales = [(1.0, 1.0)]
        while max(array.shape[-2:]) > self.chunk:
            tall = array.chunks[-2]
            half = (*array.shape[:-2], -(-array.shape[-2] // 2), -(-array.shape[-1] // 2))
            smaller = self._create(str(len(scales)), half, tall)
            for place in np.ndindex(array.shape[:-2]):
                for top in range(0, half[-2], tall):
                    rows = np.asarray(array[(*place, slice(2 * top, 2 * (top + tall)))])
                    smaller[(*place, slice(top, top + tall))] = _halved(rows, self.layout.labels)
            scales.append((scales[-1][0] * 2, scales[-1][1] * 2))
            array = smaller
        return scales

    def _metadata(self, scales: list[tuple[float, float]]) -> dict[str, Any]:
        """Metadata of the image; a viewer opens one with `image-label` as labels, not as grey values."""
        label = {"image-label": {"version": "0.5"}} if self.layout.labels else {}
        return {"version": "0.5", "multiscales": [self._description(scales)]} | label

    def _description(self, scales: list[tuple[float, float]]) -> dict[str, Any]:
        """Metadata entry `multiscales`, after https://ngff.openmicroscopy.org/0.5."""
        axes, geometry = self.layout.axes, self.layout.geometry
        kinds = {"T": "time", "C": "channel"}
        units = {"time": "second" if geometry.interval else None}
        units |= {"space": {"micron": "micrometer"}.get(geometry.unit)}
        named: list[dict[str, str]] = [{"name": axis.lower(), "type": kinds.get(axis, "space")} for axis in axes]
        for axis in named:
            if unit := units.get(axis["type"]):
                axis["unit"] = unit
        sizes = geometry.pixel | {"T": geometry.interval or 1.0}
        datasets = []
        for level, (y, x) in enumerate(scales):
            factors = {"Y": y, "X": x}
            scale = [sizes.get(axis, 1.0) * factors.get(axis, 1.0) for axis in axes]
            datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
        return {"name": self.path.stem, "axes": named, "datasets": datasets}


def _halved(rows: np.ndarray, labels: bool) -> np.ndarray:
    """Rows (h, W) at half the size: every second pixel of labels, otherwise the mean of 2x2 pixels."""
    if labels:
        return rows[::2, ::2]
    even = np.pad(rows, [(0, size % 2) for size in rows.shape], mode="edge").astype(np.float32)
    mean = (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4
    return mean if rows.dtype.kind == "f" else np.round(mean).astype(rows.dtype)
