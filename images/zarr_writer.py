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

CHUNK = 512  # [px] width of a chunk, and largest size of the last pyramid level


class ZarrWriter(Writer):
    """Writes an OME-Zarr 0.5 image with a pyramid to `NAME.partial`, which is renamed when it is complete.

    An older image and the new one are exchanged in one step where the system can do that, else the older one is
    `NAME.old` until the new one has its name. The next writer cleans up after a killed process; it must hold the lock
    of the path and have called `check_replaceable`. A chunk holds one band of one plane: processes never share one.
    """

    def __init__(self, path: Path, layout: Layout, create: bool, band_height: int) -> None:
        check_module("zarr", str(path))
        import zarr

        self.path, self.partial, self.layout, self._zarr = path, partial_of(path), layout, zarr
        self._array: Any = None
        if create:  # the other processes open the array
            with self.discard_on_error(), explain_write_errors(path):
                self._mend()
                make_folder(self.partial)
                self._create_level(0, layout.full_shape, band_height)

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

    def _create_level(self, level: int, shape: tuple[int, ...], band_height: int) -> Any:
        return self._zarr.create_array(
            self.partial / str(level),
            shape=shape,
            dtype=self.layout.dtype,
            chunks=(*[1] * (len(shape) - 2), min(band_height, shape[-2]), min(CHUNK, shape[-1])),
            dimension_names=list(self.layout.axes.lower()),
        )

    def write(self, frame: int, top: int, band: np.ndarray) -> None:
        """Write rows (C, h, W) of a frame, from row `top` on."""
        with explain_write_errors(self.path):
            if self._array is None:
                self._array = self._zarr.open_array(self.partial / "0", mode="r+")
            index, rows = self.layout.index(frame, slice(None)), slice(top, top + band.shape[1])
            self._array[(*index, rows)] = band if len(band) > 1 else band[0]

    def finish(self) -> None:
        """Add the pyramid and the metadata, and rename the folder."""
        with explain_write_errors(self.path):
            num_level = self._write_pyramid()
            group = self._zarr.open_group(self.partial, mode="a")
            group.attrs["ome"] = self._metadata(num_level)
            if not (self.path.exists() and swap_folders(self.partial, self.path)):
                if self.path.exists():
                    self.path.rename(old_of(self.path))
                publish(self.partial, self.path)
        self.discard()  # the older image: at the partial path after a swap

    def discard(self) -> None:
        """Remove the partial folder, and the older image if a newer one has its name."""
        with suppress(OSError):
            self._mend()

    def _write_pyramid(self) -> int:
        """Write the smaller levels, each half as high and wide; return the number of all levels."""
        array = self._zarr.open_array(self.partial / "0", mode="r")
        num_level = 1
        while max(array.shape[-2:]) > CHUNK:
            *lead, height, width = array.shape
            band_height, half_height = array.chunks[-2], -(-height // 2)
            smaller = self._create_level(num_level, (*lead, half_height, -(-width // 2)), band_height)
            for index in np.ndindex(*lead):
                for top in range(0, half_height, band_height):
                    rows = np.asarray(array[(*index, slice(2 * top, 2 * (top + band_height)))])
                    smaller[(*index, slice(top, top + band_height))] = _halved(rows, self.layout.labels)
            num_level += 1
            array = smaller
        return num_level

    def _metadata(self, num_level: int) -> dict[str, Any]:
        """Metadata after https://ngff.openmicroscopy.org/0.5; viewers open an image with `image-label` as labels."""
        geometry = self.layout.geometry
        types = {"T": "time", "C": "channel"}
        units: dict[str, str | None] = {"T": "second" if geometry.interval else None}
        units |= dict.fromkeys(geometry.pixel, "micrometer")
        sizes = geometry.pixel | {"T": geometry.interval or 1.0}
        axes, datasets = [], []
        for axis in self.layout.axes:
            unit = units.get(axis)
            axes.append({"name": axis.lower(), "type": types.get(axis, "space")} | ({"unit": unit} if unit else {}))
        for level in range(num_level):
            scale = [sizes.get(axis, 1.0) * (2.0**level if axis in "YX" else 1.0) for axis in self.layout.axes]
            datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
        label = {"image-label": {"version": "0.5"}} if self.layout.labels else {}
        image = {"name": self.path.stem, "axes": axes, "datasets": datasets}
        return {"version": "0.5", "multiscales": [image]} | label


def _halved(rows: np.ndarray, labels: bool) -> np.ndarray:
    """Rows (h, W) at half the size: every second pixel of labels, otherwise the mean of 2x2 pixels."""
    if labels:
        return rows[::2, ::2]
    even = np.pad(rows, [(0, size % 2) for size in rows.shape], mode="edge").astype(np.float32)
    mean = (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4
    return mean if rows.dtype.kind == "f" else np.round(mean).astype(rows.dtype)
