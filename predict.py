"""Segment images with a checkpoint: `load` and `predict_array` for Python, `predict_files` for main.py."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
from config import WHAT, Config
from dataset import DataInfo, image_statistics
from images import ARRAYS, SUFFIXES, Frame, Rows, list_frames, neighbours, read_geometry
from model import MARGIN, EightFold, Sides, UNet, class_probability, convert_legacy, fold_norm, memory_format
from objects import separate_objects
from parallel import World
from tiling import Bands, Span, ahead, spans, window_shape
from utils import UserError, pick_device, pick_precision
from writers import FlatWriter, Layout, PngWriter, Writer, ZarrWriter

WINDOW = 2**20  # [px] of a window on a CPU, at most
BYTES = 40  # [bytes] that a pixel of a window needs for each channel of the first level, at most
OVERLAP = 32  # [px] over which windows are blended that were normalised differently
FILES = (".tif", ".tiff", ".npy", ".zarr")


@dataclass(frozen=True)
class Predictor:
    """A trained network with what it needs to segment an image; made by `load`.

    Attributes
    ----------
    net : nn.Module
        The averaged weights, with batch normalisation folded into the convolutions.
    info : DataInfo
        Channels, classes, and how images are normalised.
    threshold : float
        Probability of class 1 over which the validation scored best.
    device : torch.device
        What it computes on.
    precision : torch.dtype or None
        Of its arithmetic; None for float32.
    """

    net: nn.Module
    info: DataInfo
    threshold: float
    device: torch.device
    precision: torch.dtype | None = None

    @property
    def num_channel(self) -> int:
        """Channels of a probability: 1 for two classes, else one a class."""
        return 1 if self.info.num_class == 2 else self.info.num_class

    def bands(self, image: Rows, *, tta: bool = True, tile: int = 0) -> Bands:
        """Probability of an image (H, W, C), computed by bands.

        Raises
        ------
        UserError
            The image has other channels than the network.
        """
        height, width, nch = image.shape
        if nch != self.info.nch_in:
            raise UserError(f"{nch} channel(s), the network was trained on {self.info.nch_in}: give it such images")
        if self.info.normalize == "image":
            mean, std = image_statistics(image)
        else:
            mean, std = np.float32(self.info.mean), np.float32(self.info.std)

        def read(first: int, last: int) -> Tensor:
            pixels = image[first:last].astype(np.float32)
            if not np.isfinite(pixels).all():
                raise UserError("it holds NaN or infinity: repair the image")
            pixels = torch.from_numpy((pixels - mean) / std)
            return pixels.movedim(-1, 0).to(self.device)

        return Bands(self._network(tta), read, *self.windows(height, width, tile))

    def windows(self, height: int, width: int, tile: int) -> tuple[list[Span], list[Span]]:
        """Rows and columns of the windows of an image."""
        blend = OVERLAP if self.net.arguments["norm"] in ("inorm", "gnorm") else 0
        most = self._most_pixels(height * width if blend else 0)
        shape = (tile, 4 * tile) if tile else window_shape(height, width, most)
        rows, columns = (spans(n, t, MARGIN, blend) for n, t in zip((height, width), shape, strict=True))
        return rows, columns

    def _network(self, tta: bool) -> Any:
        """Function from a window to the probability of its pixels."""
        net = EightFold(self.net) if tta else self.net

        def run(window: Tensor, inner: Sides) -> Tensor:
            with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
                logits = net(window, inner)
            probability = class_probability(logits.float())
            return probability[:, 1:] if self.num_channel == 1 else probability

        return run

    def _most_pixels(self, wanted: int) -> int:
        """Pixels that a window may have; `wanted` if memory allows so many."""
        each = BYTES * self.net.arguments["nch_ker"]
        if self.device.type == "cuda":
            room = torch.cuda.mem_get_info(self.device)[0] // 2
            return room // each
        room = _memory() // 4
        return min(max(WINDOW, wanted), room // each)


def _memory() -> int:
    """Memory of the machine [bytes]; 4 GiB where it doesn't say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 2**32


def load(path: str | os.PathLike, gpu_ids: str = "-1", amp: str = "off") -> Predictor:
    """Network of a checkpoint, ready to segment.

    Parameters
    ----------
    path : path-like
        A `.pth` of `main.py --mode train`, or of pytorch-UNET.
    gpu_ids : str
        GPU number, or `"-1"` for the CPU.
    amp : {"off", "bf16", "fp16"}
        Arithmetic; a type of 16 bits is faster where the machine computes it, and changes probabilities by about 0.01.

    Raises
    ------
    UserError
        The file is no checkpoint of this network.

    Examples
    --------
    A probability for each pixel of an image::

        from predict import load, predict_array
        predictor = load("checkpoints/unet/em/model_epoch0300.pth")
        probability = predict_array(predictor, tifffile.imread("new.tif"))
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file: name a checkpoint that main.py --mode train wrote")
    saved = checkpoint.load(path)
    with checkpoint.fitting(path):
        if "netG" in saved:
            saved = convert_legacy(saved)
            saved["data"] = asdict(_legacy_info(**saved["arch"]))
        net = UNet(**saved["arch"])
        net.load_state_dict((saved.get("average") or saved)["net"])
    info, device = DataInfo.from_dict(saved["data"], path), pick_device(gpu_ids)
    precision = pick_precision(amp, device)
    net = fold_norm(net).to(device, memory_format=memory_format(saved["arch"]["norm"], precision))
    return Predictor(net, info, saved.get("threshold", 0.5), device, precision)


def _legacy_info(nch_in: int, nch_out: int, **_: Any) -> DataInfo:
    """Description that pytorch-UNET's checkpoints lack: it scaled [0, 255] to [-1, 1]."""
    classes = list(range(max(nch_out, 2)))
    half = [127.5] * nch_in
    return DataInfo(nch_in, classes, [str(k) for k in classes], [1 / len(classes)] * len(classes), half, half, [0, 255])


def predict_array(predictor: Predictor, image: np.ndarray, *, tta: bool = True, tile: int = 0) -> np.ndarray:
    """Probability of each pixel of an image or a stack.

    Parameters
    ----------
    predictor : Predictor
        From `load`.
    image : ndarray
        (..., H, W), or (..., H, W, C) for a network of several channels; any integer or float type. A network with
        context sections takes them as its channels.
    tta : bool
        Average over the eight flips and quarter turns; eight times slower.
    tile : int
        Height of a window [px], a multiple of 16; 0: as memory allows.

    Returns
    -------
    ndarray of float32
        (..., H, W) of class 1, or (..., K, H, W) of K classes; in [0, 1].

    Raises
    ------
    UserError
        The image has other channels than the network, or holds NaN or infinity.
    """
    image = np.asarray(image)
    image = image[..., None] if predictor.info.nch_in == 1 else image
    if image.ndim < 3 or 0 in image.shape or image.dtype.kind not in "uifb":
        raise UserError(f"an image of shape {image.shape} and type {image.dtype}: give numbers (H, W) or (H, W, C)")
    result = []
    for frame in image.reshape(-1, *image.shape[-3:]):
        bands = predictor.bands(frame, tta=tta, tile=tile)
        result.append(np.concatenate([band for _, band in bands.compute(range(len(bands)))], axis=1))
    probability = np.stack(result).reshape(*image.shape[:-3], -1, *image.shape[-3:-1])
    return probability[..., 0, :, :] if predictor.num_channel == 1 else probability


class ContextRows:
    """A section with its neighbours as further channels."""

    def __init__(self, frames: list[Frame]) -> None:
        self.frames = frames
        height, width, nch = frames[0].open().shape
        self.shape, self.dtype = (height, width, nch * len(frames)), frames[0].open().dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W, C) of the image."""
        return np.concatenate([frame.open()[rows] for frame in self.frames], axis=-1)


def predict_files(config: Config, device: torch.device, world: World) -> int:
    """Segment what `--input` names and write `--output`: `main.py --mode predict`.

    Raises
    ------
    UserError
        Something is missing or does not fit, or an image or the goal can't be read or written.
    """
    if not config.input or not config.output:
        raise UserError("--mode predict needs --input IMAGES and --output FILE or FOLDER")
    path = checkpoint.find(Path(config.dir_checkpoint) / config.scope / config.name_data, config.epoch)
    predictor = load(path, config.gpu_ids, "off" if config.amp == "auto" else config.amp)
    frames = list_frames(Path(config.input), (*SUFFIXES, *ARRAYS))
    images = [_open(frames, i, predictor.info) for i in range(len(frames))]
    whats = [what for what in WHAT if what in config.what.split(",")]
    job = _Job(config, predictor, frames, images, whats, world)
    with job.writers(str(path)) as writers:
        for frame, top, band in job.results(writers):
            for what, values in _outputs(band, whats, predictor, config.dtype).items():
                writers[what].write(frame, top, values)
    if world.first:
        for goal in job.goals().values():
            print(f"segmented {len(frames)} image(s) with {path}: {goal}")
    return 0


def _open(frames: list[Frame], index: int, info: DataInfo) -> Rows:
    """Image of a frame, with its context; the channels are checked."""
    frame = frames[index]
    image = ContextRows(neighbours(frames, index, info.context)) if info.context else frame.open()
    if image.shape[2] != info.nch_in:
        share = 2 * info.context + 1
        raise UserError(
            f"{frame}: {image.shape[2] // share} channel(s), the network was trained on {info.nch_in // share}: "
            "choose other images, or another checkpoint by --scope and --name_data"
        )
    return image


def _outputs(band: np.ndarray, whats: list[str], predictor: Predictor, dtype: str) -> dict[str, np.ndarray]:
    """What is written of a probability (K, h, W): arrays (C, h, W)."""
    made: dict[str, np.ndarray] = {}
    if "probability" in whats:
        made["probability"] = band if dtype == "float32" else np.round(band * 255).astype(np.uint8)
    if "mask" in whats:
        two = predictor.num_channel == 1
        mask = (band > predictor.threshold) * np.uint8(255) if two else band.argmax(0)[None].astype(np.uint8)
        made["mask"] = mask
    if "cells" in whats:
        foreground = band[0] if predictor.num_channel == 1 else 1 - band[0]
        made["cells"] = separate_objects(foreground, predictor.threshold)[None]
    return made


@dataclass(frozen=True)
class _Job:
    """What is to be done for one command, and which part of it this process does."""

    config: Config
    predictor: Predictor
    frames: list[Frame]
    images: list[Rows]
    whats: list[str]
    world: World

    def goals(self) -> dict[str, Path]:
        """File or folder of each thing asked for; where they are several, the name says which."""
        output = Path(self.config.output)
        if not self._is_file(output) or len(self.whats) == 1:
            return dict.fromkeys(self.whats, output)
        return {what: output.with_name(f"{output.stem}-{what}{output.suffix}") for what in self.whats}

    @staticmethod
    def _is_file(output: Path) -> bool:
        if output.suffix.lower() in FILES:
            return True
        if output.suffix and not output.is_dir():
            raise UserError(f"--output {output}: unknown ending {output.suffix}: use {', '.join(FILES)} or a folder")
        return False

    @contextmanager
    def writers(self, network: str) -> Iterator[dict[str, Writer]]:
        """Open writers; at the end their files get their names, after an error nothing is left under those."""
        with ExitStack() as stack:
            made: dict[str, Writer] = {}
            if self.world.first:
                made = {what: self._writer(what, goal, network) for what, goal in self._checked_goals().items()}
                stack.callback(lambda: [writer.discard() for writer in made.values()])
            self.world.same(None)
            if not self.world.first:
                made = {what: self._writer(what, goal, network) for what, goal in self.goals().items()}
                stack.callback(lambda: [writer.close() for writer in made.values()])
            yield made
            for writer in made.values():
                writer.close()
            self.world.same(None)  # wait for the others' last bands
            if self.world.first:
                for writer in made.values():
                    writer.finish()
                stack.pop_all()

    def _checked_goals(self) -> dict[str, Path]:
        """Goals, none of which is an input."""
        goals = self.goals()
        inputs = {frame.path.resolve() for frame in self.frames}
        folder = not self._is_file(Path(self.config.output))
        files = [name.with_name(f"{name.name}.png") for what in self.whats for name in self._names(what)]
        for goal in files if folder else goals.values():
            if goal.resolve() in inputs:
                raise UserError(f"--output {self.config.output} would replace the input {goal}: choose another")
        if folder and len({*files}) < len(files):
            twice = next(file for file, num in Counter(files).items() if num > 1)
            raise UserError(f"{self.config.input}: two images would become {twice}: rename one, or write a stack")
        return goals

    def _names(self, what: str) -> list[Path]:
        """PNG of each frame, without the ending."""
        num = Counter(frame.path for frame in self.frames)
        ending = f"-{what}" if len(self.whats) > 1 else ""
        numbers = [f"-{frame.index:04d}" if num[frame.path] > 1 else "" for frame in self.frames]
        folder = Path(self.config.output)
        return [folder / f"{f.path.stem}{number}{ending}" for f, number in zip(self.frames, numbers, strict=True)]

    def _writer(self, what: str, goal: Path, network: str) -> Writer:
        if not self._is_file(goal):
            if what == "probability" and self.config.dtype == "float32":
                raise UserError("--dtype float32: a PNG has no such type: write .tif, .npy or .zarr")
            return PngWriter(self._names(what), [image.shape[0] for image in self.images])
        layout = self._layout(what)
        if goal.suffix.lower() != ".zarr":
            return FlatWriter(goal, layout, self.world.first)
        c = self.config
        run = {"network": network, "input": c.input, "what": what, "tta": c.tta, "tile": c.tile}
        run |= {
            "dtype": c.dtype,
            "shape": layout.full_shape,
            "changed": [Path(p).stat().st_mtime_ns for p in (network, self.frames[0].path)],
        }
        tall = self.predictor.windows(*layout.shape[2:], c.tile)[0][0]
        return ZarrWriter(goal, layout, self.world.first, tall.stop - tall.start, run)

    def _layout(self, what: str) -> Layout:
        """What a file of one thing holds; all images must have one size."""
        sizes = {image.shape[:2]: str(frame) for image, frame in zip(self.images, self.frames, strict=True)}
        if len(sizes) > 1:
            (one, first), (other, second), *_ = sizes.items()
            raise UserError(f"{first} has {one} px, {second} {other}: one file can't hold both, name a folder")
        dtype = {"probability": self.config.dtype, "mask": "uint8", "cells": "uint32"}[what]
        channels = self.predictor.num_channel if what == "probability" else 1
        geometry = read_geometry(self.frames)
        shape = (len(self.frames), channels, *self.images[0].shape[:2])
        return Layout(shape, np.dtype(dtype), *geometry, labels=what != "probability")

    def bands(self, frame: int) -> Bands:
        """Windows of a frame."""
        return self.predictor.bands(self.images[frame], tta=self.config.tta, tile=self.config.tile)

    def results(self, writers: dict[str, Writer]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Frame, first row and probability (K, h, W) of all that this process does."""
        mine = self._units(writers)
        if not self.world.first:
            yield from self._computed(mine)
            return
        with tqdm(total=len(mine), desc="segment", unit="band", disable=None) as bar:
            for result in self._computed(mine):
                yield result
                bar.update()

    def _units(self, writers: dict[str, Writer]) -> list[tuple[int, int]]:
        """Frames and bands that this process does: whole frames where objects are wanted, which have no seams."""
        bands = [self.predictor.windows(*image.shape[:2], self.config.tile)[0] for image in self.images]
        whole = "cells" in self.whats or not self._is_file(Path(self.config.output))
        units = [[(frame, number) for number in range(len(part))] for frame, part in enumerate(bands)]
        groups = units if whole else [[unit] for part in units for unit in part]
        rank, size = self.world.rank, self.world.size
        mine = groups[rank * len(groups) // size : (rank + 1) * len(groups) // size]
        zarrs = [writer for writer in writers.values() if isinstance(writer, ZarrWriter)]

        def is_done(frame: int, number: int) -> bool:
            top = 0 if "cells" in self.whats else bands[frame][number].start
            return bool(zarrs) and all(writer.is_done(frame, top) for writer in zarrs)

        return [unit for group in mine for unit in group if not is_done(*unit)]

    def _computed(self, units: list[tuple[int, int]]) -> Iterator[tuple[int, int, np.ndarray]]:
        for frame, group in groupby(units, key=lambda unit: unit[0]):
            bands = self.bands(frame)
            try:
                results = list if "cells" in self.whats else iter
                parts = results(ahead(bands.compute([number for _, number in group])))
                if "cells" in self.whats:
                    yield frame, 0, np.concatenate([band for _, band in parts], axis=1)
                    continue
                for number, band in parts:
                    yield frame, bands.rows[number].start, band
            except UserError as error:
                text = str(error)
                named = str(self.frames[frame].path) in text
                raise UserError(text if named else f"{self.frames[frame]}: {text}") from error
