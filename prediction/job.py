"""One run of `--mode predict`: which part each process computes, and how the results are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import Config
from description import DataInfo
from distributed import World
from images.layout import ORDER, Layout
from images.readers import Frame, drop_cached_pages, read_geometry
from images.rows import Rows, listed
from images.writers import (
    TIFF,
    TIFF_WRITERS,
    FilesWriter,
    FlatWriter,
    NumberTiffWriter,
    PngWriter,
    RowFile,
    Writer,
    ZlibTiffWriter,
)
from images.zarr_writer import ZarrWriter
from prediction.gaps import grow_bands
from prediction.linking import StackLinker, stacks_to_link
from prediction.object_table import FrameObjects, ObjectTables
from prediction.objects import TILE_HEIGHT, filter_bands, separate_bands
from prediction.output_files import OutputFiles
from prediction.outputs import Labels, ObjectBand, Output, Rois, Table, object_bands
from prediction.predictor import Predictor
from prediction.preview import Preview, PreviewMaker, most_uncertain
from prediction.rois import RoiWriter
from prediction.scaling import Scale, restored, restored_rows, store, stored
from prediction.tiling import Band, TileGrid, write_in_background
from progress import Progress
from utils import UserError, echo

KEEP = "--min_size 0 --fill_holes off --certainty 0"


class FrameRows:
    """A section with its neighbours as additional channels; the files are opened only while rows are read."""

    def __init__(self, frames: list[Frame], info: DataInfo) -> None:
        image = frames[0].open()
        height, width, nch = image.shape
        self.frames, self.shape, self.dtype = frames, (height, width, nch * len(frames)), image.dtype
        nch_net = info.nch_in // len(frames)
        if self.shape[2] != info.nch_in:
            what = f"{frames[info.context]}: {nch} channel(s), the network was trained on {nch_net}"
            some = f"choose {nch_net} of them, such as --channel {','.join(map(str, range(nch_net)))}"
            advice = some if nch > nch_net else "choose other images"
            raise UserError(f"{what}: {advice}, or another checkpoint with --scope and --name_data")

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        images = [frame.open() for frame in self.frames]
        block = np.concatenate([image[rows] for image in images], axis=-1)  # a copy
        for image in images:
            drop_cached_pages(image)
        return block


class Part(NamedTuple):
    """Rows of a frame, starting at row `top`, of each output that has a writer."""

    frame: int
    top: int
    outputs: dict[str, Any]  # by name; none for rows that are computed and brought back later


class PredictionJob:
    """One prediction run of some images (each with its context and its scale), and this process's part of it."""

    def __init__(
        self,
        config: Config,
        predictor: Predictor,
        images: list[Rows],
        scales: list[Scale],
        files: OutputFiles,
        world: World,
    ) -> None:
        self.config, self.predictor, self.images, self.files, self.world = config, predictor, images, files, world
        sizes = [scale.shape(image.shape) for image, scale in zip(images, scales, strict=True)]
        self.is_scaled = [size != image.shape[:2] for image, size in zip(images, sizes, strict=True)]
        # chosen by the main process, since free memory differs between processes
        grids = world.broadcast({size: predictor.tile_grid(size, config.tile) for size in dict.fromkeys(sizes)})
        self.grids: list[TileGrid] = [grids[size] for size in sizes]
        self.filters = [scale.filter(predictor.object_filter)._replace(**config.given_filter) for scale in scales]
        self.stacks: list[int] = []  # number of the stack of each frame, if objects are linked
        self.linker: StackLinker | None = None
        if config.link:
            self.stacks = stacks_to_link(files.frames, images, config.link)
            self.linker = StackLinker(config.link, self.stacks, Path(config.output))
            num_idle = world.size - len({*self.stacks})
            if num_idle > 0 and world.is_main:
                idle = f"{num_idle} of {world.size} have nothing to do"
                echo(f"note: --link: one process segments a whole stack: {idle}")
        self.objects: list[FrameObjects] = []
        self.previews: list[Preview] = []  # of the page, in its order
        self._preview: PreviewMaker | None = None  # of the image that is computed

    @property
    def classes(self) -> list[int]:
        """Classes with objects: all but the background."""
        return [k for k in range(self.predictor.info.num_class) if k != self.predictor.background]

    def run(self) -> None:
        """Compute and write this process's part, gather the objects of all processes, and write their tables."""
        with closing(self.linker) if self.linker else nullcontext(), self._open_writers() as writers:

            def write(part: Part) -> None:
                for name, rows in part.outputs.items():
                    writers[name].write(part.frame, part.top, rows)

            write_in_background(self._parts(), write)
        self.previews = most_uncertain(self.world.gather(self.previews))
        self.objects = sorted(self.world.gather(self.objects), key=lambda objects: objects.frame)
        if self.world.is_main and self.files.tables:
            shapes, names = [image.shape for image in self.images], self.predictor.info.class_names
            ObjectTables(self.files, self.objects, shapes, names, self.classes, self.stacks).write()

    @contextmanager
    def _open_writers(self) -> Iterator[dict[str, Writer]]:
        """Writer of each output; the files are renamed at the end, and removed after an error."""
        writers: dict[str, Writer] = {}
        try:
            if not self.world.is_main:
                self.world.barrier()  # the first process creates the files, the others open them
            for name, output in self.files.outputs.items():
                if not isinstance(output, Table):
                    writers[name] = self._writer(output)
            if self.world.is_main:
                self.world.barrier()
            yield writers
            for writer in writers.values():
                if isinstance(writer, RoiWriter):
                    self._append(writer)
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

    def _writer(self, output: Output) -> Writer:
        """Writer of one output."""
        if isinstance(output, Rois):
            return RoiWriter(self.files.roi_planes())
        if isinstance(output, Labels) and self.files.to_folder:
            return self._label_writer(output)
        if self.files.to_png:
            return PngWriter(self.files.png_names[output.name], [image.shape[0] for image in self.images])
        path, is_main, frames = self.files.paths[output.name], self.world.is_main, list(range(len(self.images)))
        layout = self._layout(output, frames, ORDER.get(path.suffix.lower(), ""))
        if path.suffix.lower() in TIFF:
            auto = "zlib" if output.is_labels else "none"
            compression = auto if self.config.compression == "auto" else self.config.compression
            is_number = isinstance(output, Labels) and output.of_objects and compression == "zlib"
            return (NumberTiffWriter if is_number else TIFF_WRITERS[compression])(path, layout, is_main)
        if path.suffix.lower() != ".zarr":
            return FlatWriter(path, layout, is_main)
        first = self._restored_rows(0)[0] if any(self.is_scaled) else self.grids[0].rows[0].interior
        return ZarrWriter(path, layout, is_main, min(TILE_HEIGHT, layout.shape[2]) if output.of_objects else first.stop)

    def _label_writer(self, output: Labels) -> FilesWriter:
        """Writer of the label images in a folder: a TIFF or a PNG for each input file."""
        files = self.files.label_files
        pngs = PngWriter(files, [image.shape[0] for image in self.images])
        frames: dict[Path, list[int]] = {}
        for frame, path in enumerate(files):
            frames.setdefault(path, []).append(frame)
        make = NumberTiffWriter if output.of_objects else ZlibTiffWriter
        writers: list[tuple[Writer, int]] = [(pngs, frame) for frame in range(len(files))]
        with ExitStack() as made:
            for path, numbers in frames.items():
                if path.suffix in TIFF:
                    tiff = make(path, self._layout(output, numbers, ORDER[path.suffix]), self.world.is_main)
                    made.enter_context(tiff.discard_on_error())  # if the next one can't be made
                    for index, frame in enumerate(numbers):
                        writers[frame] = tiff, index
        return FilesWriter(writers)

    def _layout(self, output: Output, numbers: list[int], order: str) -> Layout:
        """Layout of the file of some frames of one output; they must have the same size."""
        frames = [self.files.frames[number] for number in numbers]
        sizes = {self.images[number].shape[:2]: str(self.files.frames[number]) for number in numbers}
        if len(sizes) > 1:
            (one, first), (other, second), *_ = sizes.items()
            advice = "choose by --series" if self.files.to_folder else "name a folder"
            raise UserError(f"{first} has {one} px, {second} {other}: one file can't hold both, {advice}")
        shape = (len(frames), output.num_channel, *self.images[numbers[0]].shape[:2])
        geometry = read_geometry(frames)
        return Layout(shape, np.dtype(output.dtype), geometry, output.is_labels, order, output.is_rgb)

    def _tasks(self) -> dict[int, list[int]]:
        """Bands of each frame that this process computes: its share of the units that one process must compute alone.

        A unit is a stack whose objects are linked, else a frame with objects or PNGs or that is scaled, else a band.
        They are counted through, and each process has an equal number of consecutive ones.
        """
        units: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for frame, grid in enumerate(self.grids):
            for band in range(len(grid.rows)):
                units.setdefault(self._unit_of(frame, band), []).append((frame, band))
        tasks: dict[int, list[int]] = {}
        for frame, band in chain(*(units[unit] for unit in self.world.share(sorted(units)))):
            tasks.setdefault(frame, []).append(band)
        return tasks

    def _unit_of(self, frame: int, band: int) -> tuple[int, ...]:
        """What a band must be computed together with."""
        if self.stacks:
            return (self.stacks[frame],)
        is_frame = self.files.has_objects or self.files.to_png or any(self.is_scaled)
        return (frame,) if is_frame else (frame, band)

    def _restored_rows(self, frame: int) -> list[slice]:
        """Rows of each band of a scaled image that is brought back."""
        return restored_rows(self.images[frame].shape[:2], self.predictor.num_channel)

    def _parts(self) -> Iterator[Part]:
        """Everything that this process computes, with a progress bar in the main process."""
        tasks = self._tasks()
        num = sum(map(len, tasks.values())) + sum(len(self._restored_rows(n)) for n in tasks if self.is_scaled[n])
        if self.files.has_objects:
            num += sum(-(-self.images[frame].shape[0] // TILE_HEIGHT) for frame in tasks)
        with Progress(num, "segment") as progress:
            for frame, numbers in tasks.items():
                try:
                    for part in self._frame_parts(frame, numbers):
                        yield part
                        progress.update()
                except UserError as error:
                    text, name = str(error), self.files.frames[frame]
                    is_named = any(word in text for word in (str(name.path), self.files.target))
                    raise type(error)(text if is_named else f"{name}: {text}") from error

    def _frame_parts(self, frame: int, numbers: list[int]) -> Iterator[Part]:
        """Some bands of a frame, then its objects, which need all of them."""
        image, num_channel, files = self.images[frame], self.predictor.num_channel, self.files
        if files.page:
            self._preview = PreviewMaker(frame, files.frames[frame], len(files.frames), self.predictor)
        bands: Iterator[Band] = self.predictor.bands(image, self.grids[frame], tta=self.config.tta).compute(numbers)
        with ExitStack() as stack:
            num_plane = min(num_channel, 2) if self.files.has_objects else 0
            planes = [stack.enter_context(RowFile(Path(self.files.target))) for _ in range(num_plane)]
            # map: unlike a loop it holds no band while the next one is computed
            if self.is_scaled[frame]:
                file = stack.enter_context(RowFile(Path(self.files.target)))
                yield from map(partial(self._scaled_part, frame, file), bands)
                bands = restored(stored(file, num_channel), image.shape[:2])
            yield from map(partial(self._pixel_part, frame, planes), bands)
            if planes:
                yield from map(partial(self._object_part, frame), self._objects(stack, frame, *planes))
        if self._preview:
            self.previews = most_uncertain([*self.previews, self._preview.finish()])

    @staticmethod
    def _scaled_part(frame: int, file: RowFile, band: Band) -> Part:
        """Store a band of the probability of a scaled image; nothing is written of it yet."""
        store(file, band)
        return Part(frame, 0, {})

    def _pixel_part(self, frame: int, planes: list[RowFile], band: Band) -> Part:
        """Outputs of a band of the probability; the planes that objects are computed from are stored."""
        if planes:
            for file, plane in zip(planes, self.predictor.object_planes(band.values), strict=True):
                file.append(plane)
        if self._preview:
            self._preview.add(band)
        outputs = [output for output in self.files.outputs.values() if not output.of_objects]
        return Part(frame, band.rows.start, {output.name: output.of(band) for output in outputs})

    def _objects(
        self, stack: ExitStack, frame: int, probability: RowFile, class_ids: RowFile | None = None
    ) -> Iterator[ObjectBand]:
        """Objects of a frame band by band, filtered and linked as wanted."""
        bands: Iterable[Band] = separate_bands(probability, self.predictor.object_threshold, class_ids=class_ids)
        if self.filters[frame].is_active:
            unfiltered = stack.enter_context(RowFile(Path(self.files.target), np.uint32))
            for band in bands:
                unfiltered.append(band.values)
            bands = filter_bands(unfiltered, probability, self.filters[frame])
        if self.predictor.has_gaps:
            parted = stack.enter_context(RowFile(Path(self.files.target), np.uint32))
            for band in bands:
                parted.append(band.values)
            bands = grow_bands(parted)
        if self.linker:
            bands = self.linker.link(frame, bands, class_ids)
        return object_bands(self.files.frames[frame], bands, class_ids, foreground=1 - self.predictor.background)

    def _object_part(self, number: int, band: ObjectBand) -> Part:
        """Outputs of a band of objects; with the last one the class and measures of each object are complete."""
        outputs = self.files.outputs
        made = {name: output.of(band) for name, output in outputs.items() if output.of_objects}
        if self._preview:
            self._preview.add_objects(band)
        drop_cached_pages(band.frame.open())
        if band.below is None:
            numbers = np.flatnonzero(band.area[1:]) + 1
            measures = next((output.measures for output in outputs.values() if isinstance(output, Table)), None)
            self.objects.append(FrameObjects(number, numbers, band.class_of[numbers], measures))
        return Part(number, band.rows.start, {name: rows for name, rows in made.items() if rows is not None})

    def report_objects(self) -> None:
        """Print the number of objects of each class, and their filter."""
        names, background = self.predictor.info.class_names, self.predictor.background
        stacks = self.stacks or list(range(len(self.images)))  # numbers count again in each
        keys = np.concatenate([stacks[part.frame] * 2**32 + part.numbers for part in self.objects])
        first = np.unique(keys, return_index=True)[1]  # a linked object counts once
        classes = np.concatenate([part.classes for part in self.objects])[first]
        counts = np.bincount(classes, minlength=len(names))
        # a class without a name has a number
        text = ", ".join(f"{counts[k]} {'of class ' * names[k].isdecimal()}{names[k]}" for k in self.classes)
        text += f" in {len(self.images)} image{'s' * (len(self.images) > 1)}"
        text += f", linked in {len({*self.stacks})} stack(s)" if self.linker else ""
        echo(f"objects: {text}" + (f"; background is {names[background]}" if len(names) > 2 else ""))
        filters = list(dict.fromkeys(self.filters))  # several: of images at several scales
        if any(each.is_active for each in filters):
            is_given = len(self.config.given_filter) == len(filters[0])
            origin = "" if is_given else f" (as in the training; to keep all: {KEEP})"
            echo(f"filter of the objects: {listed(filters, most=5)}{origin}")
