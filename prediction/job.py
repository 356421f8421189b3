"""One run of `--mode predict`: which part each process computes, and how the results are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from description import DataInfo
from distributed import World
from images.drawing import Range
from images.layout import ORDER, Layout
from images.readers import Frame, Rows, drop_cached_pages, read_geometry
from images.writers import TIFF, TIFF_WRITERS, FlatWriter, PngWriter, RowFile, Writer
from images.zarr_writer import ZarrWriter
from prediction.linking import StackLinker
from prediction.object_outputs import (
    FrameObjects,
    FrameOutputs,
    display_range,
    outline_colours,
    with_rows_beside,
    write_table,
)
from prediction.objects import KEEP_ALL, TILE_HEIGHT, ObjectFilter, ObjectList, filter_bands, separate_bands
from prediction.output_files import OutputFiles
from prediction.predictor import Predictor
from prediction.rois import RoiWriter
from prediction.tiling import Band, TileGrid, write_in_background
from utils import UserError, echo


class FrameRows:
    """A section with its neighbours as additional channels; the files are opened only while rows are read."""

    def __init__(self, frames: list[Frame]) -> None:
        self.frames = frames
        height, width, nch = frames[0].open().shape
        self.shape, self.dtype = (height, width, nch * len(frames)), frames[0].open().dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        images = [frame.open() for frame in self.frames]
        block = np.concatenate([image[rows] for image in images], axis=-1)  # a copy
        for image in images:
            drop_cached_pages(image)
        return block


def open_frame(frames: list[Frame], info: DataInfo) -> Rows:
    """Image of a frame in the middle of its context; checks the channels."""
    image = FrameRows(frames)
    if image.shape[2] != info.nch_in:
        nch, asked = (number // len(frames) for number in (image.shape[2], info.nch_in))
        some = f"choose {asked} of them, such as --channel {','.join(map(str, range(asked)))}"
        advice = f"{some if nch > asked else 'choose other images'}, or another checkpoint with --scope and --name_data"
        raise UserError(f"{frames[info.context]}: {nch} channel(s), the network was trained on {asked}: {advice}")
    return image


@dataclass(frozen=True)
class Part:
    """Rows of a frame, starting at row `top`: an array (C, h, W) for each output."""

    frame: int
    top: int
    outputs: dict[str, np.ndarray]

    def write(self, writers: dict[str, Writer]) -> None:
        """Write each output with its writer."""
        for output, rows in self.outputs.items():
            writers[output].write(self.frame, self.top, rows)


@dataclass
class PredictionJob:
    """One prediction run, and this process's part of it.

    Attributes
    ----------
    predictor : Predictor
        The network.
    images : list of Rows
        Images to segment, each with its context; in the order of `files.frames`.
    files : OutputFiles
        Files to write.
    grids : dict
        Tiles of the images of each height and width, the same in every process; see `tile_grids`.
    world : World
        The processes of the run.
    tta : bool
        Average over the eight flips and quarter turns.
    dtype : {"uint8", "float32"}
        Type of the probability.
    compression : {"auto", "zlib", "none"}
        Compression of TIFFs; auto: zlib for labels.
    object_filter : ObjectFilter
        Which objects are kept.
    linker : StackLinker or None
        Gives objects one number through the sections of a stack; None: numbers start again in each section.
    objects : list of FrameObjects
        Filled by `run`, if objects are wanted.
    """

    predictor: Predictor
    images: list[Rows]
    files: OutputFiles
    grids: dict[tuple[int, int], TileGrid]
    world: World
    tta: bool
    dtype: str
    compression: str = "auto"
    object_filter: ObjectFilter = KEEP_ALL
    linker: StackLinker | None = None
    objects: list[FrameObjects] = field(default_factory=list)
    _rois: RoiWriter | None = None
    _ranges: dict[Path, Range] = field(default_factory=dict)  # grey values shown as black and white in overlays

    def run(self) -> None:
        """Compute and write this process's part, and gather the objects of all processes."""
        with closing(self.linker) if self.linker else nullcontext(), self._open_writers() as writers:
            write_in_background(self._parts(), lambda part: part.write(writers))
        self.objects = sorted(self.world.gather(self.objects), key=lambda objects: objects.frame)

    @contextmanager
    def _open_writers(self) -> Iterator[dict[str, Writer]]:
        """Writer of each output; the files are renamed at the end, and removed after an error."""
        writers: dict[str, Writer] = {}
        try:
            if not self.world.is_main:
                self.world.barrier()  # the first process creates the files, the others open them
            if self.files.roi_files:
                writers["rois"] = self._rois = RoiWriter(list(self.files.roi_files))
            for output in self.files.images:
                writers[output] = self._writer(output)
            if self.world.is_main:
                self.world.barrier()
            yield writers
            if self._rois:
                self._append(self._rois)
            for writer in writers.values():
                writer.close()
            self.world.barrier()  # wait for the last bands of the others
            if self.world.is_main:
                for writer in writers.values():
                    writer.finish()
        except BaseException:
            for writer in writers.values():
                writer.discard() if self.world.is_main else writer.close()
            raise

    def _append(self, rois: RoiWriter) -> None:
        """Add the outlines of one process after the other to the files, in the order of the frames."""
        for rank in range(self.world.size):
            if rank == self.world.rank:
                rois.append(create=rank == 0)
            self.world.barrier()

    def _writer(self, output: str) -> Writer:
        """Writer of one output."""
        path, is_main = self.files.paths[output], self.world.is_main
        if self.files.to_png:
            return PngWriter(self.files.png_names[output], [image.shape[0] for image in self.images])
        layout = self._layout(output, ORDER.get(path.suffix.lower(), ""))
        if path.suffix.lower() in TIFF:
            auto = "zlib" if layout.labels else "none"
            return TIFF_WRITERS[auto if self.compression == "auto" else self.compression](path, layout, is_main)
        if path.suffix.lower() != ".zarr":
            return FlatWriter(path, layout, is_main)
        band_height = min(TILE_HEIGHT, layout.shape[2]) if output == "cells" else self._grid(0).rows[0].interior.stop
        return ZarrWriter(path, layout, is_main, band_height)

    def _layout(self, output: str, order: str) -> Layout:
        """Layout of the file of one output; all images must have the same size."""
        sizes = {image.shape[:2]: str(frame) for image, frame in zip(self.images, self.files.frames, strict=True)}
        if len(sizes) > 1:
            (one, first), (other, second), *_ = sizes.items()
            raise UserError(f"{first} has {one} px, {second} {other}: one file can't hold both, name a folder")
        dtype = {"probability": self.dtype, "cells": "uint32"}.get(output, "uint8")
        shape = (len(self.images), self.files.channels(output), *self.images[0].shape[:2])
        geometry, labels = read_geometry(self.files.frames), output in ("mask", "cells")
        return Layout(shape, np.dtype(dtype), geometry, labels, order, rgb=output == "overlay")

    def _grid(self, frame: int) -> TileGrid:
        """Tiles of a frame."""
        return self.grids[self.images[frame].shape[:2]]

    def _tasks(self) -> dict[int, list[int]]:
        """Bands of each frame that this process computes: whole frames for PNGs or objects, whole stacks to link."""
        counts = [len(self._grid(frame).rows) for frame in range(len(self.images))]
        bands = [(frame, number) for frame, count in enumerate(counts) for number in range(count)]
        units = list(range(len(bands)))
        if self.linker:
            stacks = self.linker.stacks
            bands.sort(key=lambda band: (stacks[band[0]], band))
            units = [stacks[frame] for frame, _ in bands]
        elif self.files.has_objects or self.files.to_png:
            units = [frame for frame, _ in bands]
        num = units[-1] + 1
        first, last = (rank * num // self.world.size for rank in (self.world.rank, self.world.rank + 1))
        own = [band for unit, band in zip(units, bands, strict=True) if first <= unit < last]
        return {frame: [number for _, number in group] for frame, group in groupby(own, key=lambda band: band[0])}

    def _parts(self) -> Iterator[Part]:
        """Everything that this process computes, with a progress bar in the main process."""
        tasks = self._tasks()
        num = sum(map(len, tasks.values()))
        if self.files.has_objects:
            num += sum(-(-self.images[frame].shape[0] // TILE_HEIGHT) for frame in tasks)
        with tqdm(total=num, desc="segment", unit="band", disable=None if self.world.is_main else True) as bar:
            for frame, numbers in tasks.items():
                try:
                    for part in self._frame_parts(frame, numbers):
                        yield part
                        bar.update()
                except UserError as error:
                    text, name = str(error), self.files.frames[frame]
                    named = any(word in text for word in (str(name.path), self.files.target))
                    raise type(error)(text if named else f"{name}: {text}") from error

    def _frame_parts(self, frame: int, numbers: list[int]) -> Iterator[Part]:
        """Some bands of a frame, then its objects, which need all of them."""
        bands = self.predictor.bands(self.images[frame], self._grid(frame), tta=self.tta)
        with ExitStack() as stack:
            num_plane = min(self.predictor.num_channel, 2) if self.files.has_objects else 0
            kept = [stack.enter_context(RowFile(Path(self.files.target))) for _ in range(num_plane)]
            # map: unlike a loop it holds no band while the next one is computed
            yield from map(partial(self._pixel_part, frame, kept), bands.compute(numbers))
            if kept:
                yield from self._object_parts(frame, *kept)

    def _pixel_part(self, frame: int, kept: list[RowFile], band: Band) -> Part:
        """Probability and mask of a band; the values that objects are computed from are kept."""
        if kept:
            for file, plane in zip(kept, self.predictor.object_planes(band.values), strict=True):
                file.append(plane)
        outputs: dict[str, np.ndarray] = {}
        if "probability" in self.files.outputs:
            outputs["probability"] = PROBABILITY[self.dtype](band.values)
        if "mask" in self.files.outputs:
            outputs["mask"] = _mask(band.values, self.predictor)
        return Part(frame, band.rows.start, outputs)

    def _object_parts(self, frame: int, probability: RowFile, class_ids: RowFile | None = None) -> Iterator[Part]:
        """Outputs of the objects of a frame band by band; stores the class and measures of each object at the end."""
        found, outputs = ObjectList(), self._frame_outputs(frame)
        foreground = 1 - self.predictor.background
        with ExitStack() as stack:
            for band, beside in with_rows_beside(self._objects(stack, frame, probability, class_ids)):
                found.add(band.values, None if class_ids is None else class_ids[band.rows])
                class_of = (
                    np.full(len(found.class_id), foreground)
                    if class_ids is None
                    else found.class_id.astype(np.int64) - 1
                )
                yield Part(frame, band.rows.start, outputs.add(band, beside, class_of))
        numbers = np.flatnonzero(found.area[1:]) + 1
        self.objects.append(FrameObjects(frame, numbers, class_of[numbers], outputs.finish()))

    def _objects(self, stack: ExitStack, frame: int, probability: RowFile, class_ids: RowFile | None) -> Iterable[Band]:
        """Objects of a frame (h, W) uint32 band by band, filtered and linked as wanted."""
        bands: Iterable[Band] = separate_bands(probability, self.predictor.object_threshold, class_ids=class_ids)
        if self.object_filter.is_active:
            unfiltered = stack.enter_context(RowFile(Path(self.files.target), np.uint32))
            for band in bands:
                unfiltered.append(band.values)
            bands = filter_bands(unfiltered, self.object_filter)
        return self.linker.link(frame, bands, class_ids) if self.linker else bands

    def _frame_outputs(self, frame: int) -> FrameOutputs:
        """Maker of the outputs of the objects of a frame."""
        info, path = self.predictor.info, self.files.frames[frame].path
        if "overlay" in self.files.outputs and path not in self._ranges:
            self._ranges = {path: display_range(self.files.by_path[path])}
        colours = outline_colours(info.num_class, self.predictor.background)
        return FrameOutputs(self.files, frame, self._rois, colours, self._ranges.get(path, []))

    def report_objects(self) -> None:
        """Print the number of objects of each class, and write their table if there is one."""
        info, background = self.predictor.info, self.predictor.background
        stacks = self.linker.stacks if self.linker else list(range(len(self.images)))  # numbers count again in each
        keys = np.concatenate([stacks[found.frame] * 2**32 + found.numbers for found in self.objects])
        each = np.unique(keys, return_index=True)[1]  # a linked object counts once
        classes = np.concatenate([found.classes for found in self.objects])[each]
        counts = np.bincount(classes, minlength=info.num_class)
        text = ", ".join(f"{counts[k]} of {name}" for k, name in enumerate(info.class_names) if k != background)
        linked = f", linked in {len({*self.linker.stacks})} stack(s)" if self.linker else ""
        echo(f"objects: {text}{linked}; background is {info.class_names[background]}")
        if self.files.table:
            names = info.class_names if self.predictor.num_channel > 1 else None
            write_table(self.files.table, self.files, self.objects, names, stacks if self.linker else [])


def tile_grids(predictor: Predictor, images: list[Rows], tile: int, world: World) -> dict[tuple[int, int], TileGrid]:
    """Tiles for each height and width; chosen by the main process, since free memory differs between processes."""
    sizes = dict.fromkeys(image.shape[:2] for image in images)
    return world.broadcast({size: predictor.tile_grid(size, tile) for size in sizes})


def _mask(probability: np.ndarray, predictor: Predictor) -> np.ndarray:
    """Mask (1, h, W) of a probability (K, h, W): 0 and 255 for two classes, else the class index."""
    if predictor.num_channel > 1:
        return probability.argmax(0)[None].astype(np.uint8)
    return (probability > predictor.threshold) * np.uint8(255)


def _to_bytes(probability: np.ndarray) -> np.ndarray:
    """Probability (K, h, W) in 8 bits; row by row, to save memory for a second band in float32."""
    scaled = np.empty(probability.shape, np.uint8)
    for row in range(probability.shape[1]):
        scaled[:, row] = np.round(probability[:, row] * np.float32(255))
    return scaled


PROBABILITY: dict[str, Callable[[np.ndarray], np.ndarray]] = {"uint8": _to_bytes, "float32": lambda values: values}
