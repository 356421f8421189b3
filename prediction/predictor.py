"""A trained network for new images: `load` and `predict_array`."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from checkpoint import Checkpoint
from config import find_network
from dataset import as_tensor, normalise, statistics_of
from description import DataInfo
from device import abilities, pick_device, pick_precision, to_device
from flags import SCALE, scale_factors
from images.readers import Rows
from images.resample import resampled
from model import CNR2d, UNet, class_probability
from prediction.gaps import grown
from prediction.halo import forward_tile, halo
from prediction.linking import SectionLinker
from prediction.objects import ObjectFilter, filter_objects, foreground_class_ids, join_bands, separate_bands
from prediction.scaling import Scale, restored
from prediction.threshold import at_threshold, of_foreground, origin_of
from prediction.tiling import Bands, Tile, TileGrid, tile_shape, tiles_along
from prediction.views import TilePlace, augmented_logits
from utils import DivergenceError, UserError, name_hint

TILE_PIXELS = 2**20  # largest tile on a CPU
TILE_BYTES = 40  # memory per pixel of a tile and channel of the first level, at most
BAND_BYTES = 8  # additional memory per pixel of a band of tiles and channel of the result
OVERLAP = 32  # [px] width of the blend between tiles that were normalised differently
ALIKE = ("nch_in", "context", "class_values", "class_names")  # what the networks of an ensemble must share


def fold_norm(net: UNet) -> UNet:
    """Copy of a network for evaluation, whose batch normalisations are part of the convolutions before them.

    It gives the same logits up to rounding, in 0.9 of the time at 16 channels on a CPU; without batch normalisation it
    is a plain copy. Source: Jacob et al. 2018, arXiv 1712.05877, section 3.2.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, CNR2d) and isinstance(module.norm, nn.BatchNorm2d | nn.SyncBatchNorm):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
    return net


@dataclass(frozen=True)
class Member:
    """A trained network: the only one of a `Predictor`, or one of an ensemble."""

    net: UNet  # the averaged weights, with batch normalisation folded into the convolutions
    info: DataInfo  # channels, classes, and how images are normalised


@dataclass(frozen=True)
class Predictor:
    """A trained network, or an ensemble of them, with what is needed to segment an image; made by `load`."""

    members: tuple[Member, ...]  # usually one; the probability is the mean of theirs
    threshold: float  # of the probability of class 1, the best on the validation set; the mean of the members'
    device: torch.device
    precision: torch.dtype | None = None  # data type of mixed precision; None for float32
    background: int = 0  # index of the class whose pixels belong to no object
    threshold_origin: str = "as given"  # in words, where it comes from
    certainty: float = 0.0  # that the probability of an object exceeds somewhere, the least of the members'

    @property
    def info(self) -> DataInfo:
        """Channels and classes, the same for all members; mean, range and fractions are those of the first one."""
        return self.members[0].info

    @property
    def stride(self) -> int:
        """Tiles lie on multiples of this [px], as every member needs; the strides are powers of two."""
        return max(member.net.stride for member in self.members)

    @property
    def halo(self) -> int:
        """Pixels that a tile reads beyond its output, enough for every member."""
        return max(halo(member.net.num_level) for member in self.members)

    @property
    def is_tile_dependent(self) -> bool:
        """Whether a member normalises its feature maps by the tile it sees."""
        return any(member.net.arguments["norm"] in ("inorm", "gnorm") for member in self.members)

    @property
    def has_gaps(self) -> bool:
        """Whether the labels of the training left a gap between objects that touch."""
        return any(member.info.gap for member in self.members)

    @property
    def object_threshold(self) -> float:
        """Probability above which a pixel is foreground; 0.5 with more than two classes."""
        return 0.5 if self.info.num_class > 2 else of_foreground(self.threshold, self.background)

    @property
    def threshold_text(self) -> str:
        """The threshold of the foreground, and where it comes from."""
        return f"{self.object_threshold:g}, {self.threshold_origin}"

    @property
    def object_filter(self) -> ObjectFilter:
        """Filter of the objects by the training, the mildest of all members and classes with objects."""
        foreground = [k for k in range(self.info.num_class) if k != self.background]
        infos = [member.info for member in self.members]
        sizes = [(info.min_size or [0] * info.num_class)[k] for info in infos for k in foreground]
        fill = [(info.fill_holes or [False] * info.num_class)[k] for info in infos for k in foreground]
        return ObjectFilter(min(sizes), all(fill), self.certainty)

    @property
    def num_channel(self) -> int:
        """Channels of a probability: 1 for two classes, else one per class."""
        return 1 if self.info.num_class == 2 else self.info.num_class

    def object_planes(self, probability: np.ndarray) -> list[np.ndarray]:
        """Planes that objects are computed from: probability of the foreground, and with several classes the class."""
        if self.num_channel == 1:
            return [probability[0] if self.background == 0 else 1 - probability[0]]
        return [probability.max(0), foreground_class_ids(probability.argmax(0), self.background)]

    def bands(self, image: Rows, grid: TileGrid, *, tta: bool, every_class: bool = False) -> Bands:
        """Probability of an image (H, W, C), computed by bands; `every_class`: also for class 0 of two classes.

        If the grid is that of another size, the image is resampled to it.
        """
        nch = image.shape[2]
        if nch != self.info.nch_in:
            raise UserError(f"{nch} channel(s), the network was trained on {self.info.nch_in}: choose other images")
        scaled = image if grid.shape == image.shape[:2] else resampled(image, grid.shape)
        statistics = list(self._statistics(image, scaled))
        first_class = 0 if every_class else self.info.num_class - self.num_channel

        def probability(tile: np.ndarray, rows: Tile, columns: Tile) -> Tensor:
            pixels = as_tensor(np.array(tile))  # a copy, since torch refuses read-only arrays
            total = torch.zeros(())
            for member, (mean, std) in zip(self.members, statistics, strict=True):
                x = normalise(pixels, mean, std)
                place = TilePlace(rows, columns, unused=self.halo - halo(member.net.num_level))
                total = total + self._member_probability(member.net, x, place, tta)
            if total.isnan().any():
                in_range = "compute with --amp off, or " if self.precision is torch.float16 else ""
                raise DivergenceError(
                    f"the network's output is NaN: {in_range}train with a lower --lr: it has diverged"
                )
            return total[first_class:] / len(self.members)

        return Bands(probability, lambda rows: scaled[rows], grid)

    def _member_probability(self, net: UNet, x: Tensor, place: TilePlace, tta: bool) -> Tensor:
        """Probability (K, h', w') of the output of a tile by one network, from normalised pixels (h, w, C)."""
        if not x.isfinite().all():
            raise UserError("it holds NaN or infinity: repair the image")
        x = x.movedim(-1, 0)[None].to(self.device)  # (h, w, C) -> (1, C, h, w)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            logits = augmented_logits(net, x, place) if tta else place.output(forward_tile(net, *place.seen(x)))
        return class_probability(logits.float())[0]

    def _statistics(self, image: Rows, scaled: Rows) -> Iterator[tuple[Tensor, Tensor]]:
        """Mean and standard deviation by which each member normalises a scaled image."""
        statistics: dict[str, tuple[Tensor, Tensor]] = {}
        for info in (member.info for member in self.members):
            by = info.normalize
            if by == "data" or by not in statistics:  # those of the image itself are measured once
                mean, std = statistics_of(image if by == "legacy" else scaled, info)  # legacy: by the type of the file
                statistics[by] = torch.from_numpy(mean), torch.from_numpy(std)
            yield statistics[by]

    def tile_grid(self, shape: tuple[int, ...], tile: int) -> TileGrid:
        """Tiles of an image (H, W, ...); `tile` is their height [px], 0: as large as the free memory allows."""
        (height, width), stride = shape[:2], self.stride
        overlap = max(OVERLAP, stride) if self.is_tile_dependent else 0
        if tile:
            tile_height = max(-(-tile // stride) * stride, 2 * overlap)
            tile_width = 4 * tile_height
        else:
            pixel_bytes = TILE_BYTES * max(member.net.fc.in_channels for member in self.members)  # one runs at a time
            wanted = height * width if overlap else 0  # the fewer tiles, the fewer different statistics
            most = self._max_pixels(pixel_bytes, wanted)
            band_cost = BAND_BYTES * self.num_channel / pixel_bytes
            tile_height, tile_width = tile_shape(height, width, most, band_cost, stride)
        sides = ((height, tile_height), (width, tile_width))
        return TileGrid(*(tiles_along(length, size, self.halo, overlap, stride) for length, size in sides))

    def _max_pixels(self, pixel_bytes: int, wanted: int) -> int:
        """Largest number of pixels in a tile that need so much memory each; at least `wanted`, if memory allows."""
        if free_memory := abilities(self.device).free_memory:
            return free_memory(self.device) // 2 // pixel_bytes
        try:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            memory = 2**32
        return min(max(TILE_PIXELS, wanted), memory // 4 // pixel_bytes)


def load(
    path: str | os.PathLike | Sequence[str | os.PathLike], gpu_ids: str = "-1", amp: str = "off", background: str = ""
) -> Predictor:
    """Network of a checkpoint, or the ensemble of several, ready to segment.

    Parameters
    ----------
    path : path-like, or list of them
        A `.pth` of `main.py --mode train` or of pytorch-UNET, or `nuclei` or `em`, which come along. Of several the
        mean probability is predicted; they may differ in architecture and normalisation, not in channels and classes.
    gpu_ids : str
        GPU number, or `"-1"` for the CPU.
    amp : {"off", "auto", "bf16", "fp16"}
        Mixed precision. `auto`, main.py's default, is bfloat16 if supported: about twice as fast, with the same scores.
        The default here is float32, so that results are the same on every machine.
    background : str
        Name or value of the class whose pixels belong to no object; default: as in the training, else the first.

    Raises
    ------
    UserError
        A file is not a checkpoint of this network, it has no such class, or the networks can't be an ensemble.

    Examples
    --------
    A probability for each pixel of an image::

        from predict import load, predict_array
        probability = predict_array(load("nuclei"), tifffile.imread("new.tif"))
    """
    paths = [find_network(each) for each in ([path] if isinstance(path, str | os.PathLike) else path)]
    for each in paths:
        if not each.is_file():
            raise UserError(f"{each}: no such file: name a checkpoint that main.py --mode train wrote")
    device, trained = pick_device(gpu_ids), {each: Checkpoint.load(each) for each in paths}
    return predictor_of(trained, device, pick_precision(amp, device), background)


def predictor_of(
    trained: Mapping[Path, Checkpoint],
    device: torch.device,
    precision: torch.dtype | None,
    background: str,
    threshold: float | None = None,
) -> Predictor:
    """Network of a checkpoint, or the ensemble of several, ready to segment; their own threshold, or another one."""
    if not trained:
        raise UserError("no checkpoint named: give the path of at least one")
    members, backgrounds, certainties = [], [], []
    first, one = next(iter(trained.items()))
    for path, saved in trained.items():
        _check_alike(first, one.info, path, saved.info)
        net = fold_norm(saved.network(path))
        net = to_device(net, net.arguments["norm"], device, precision)  # a damaged file may leave the norm out
        members.append(Member(net, saved.info))
        own = saved.config.get("background", "")
        backgrounds.append(find_background(saved.info, background or own))
        is_own = backgrounds[-1] == find_background(saved.info, own)  # whose objects the certainty was chosen on
        certainties.append(saved.certainty if is_own else 0.0)
        if backgrounds[-1] != backgrounds[0]:
            raise UserError(f"{first} and {path} were trained with different backgrounds: choose one by --background")
    mean = fmean(saved.threshold for saved in trained.values())
    origin = origin_of(*(saved.chosen_on for saved in trained.values()))
    predictor = Predictor(tuple(members), mean, device, precision, backgrounds[0], origin, min(certainties))
    return at_threshold(predictor, threshold)


def _check_alike(first: Path, one: DataInfo, path: Path, info: DataInfo) -> None:
    """Raise a `UserError` if two networks cannot be of one ensemble."""
    for entry in ALIKE:
        ours, theirs = getattr(one, entry), getattr(info, entry)
        if ours != theirs:
            rule = "the networks of an ensemble must have the same channels and classes"
            raise UserError(f"{first} was trained with {entry} {ours}, {path} with {theirs}: {rule}")
    names = {tuple(each.profile.channels) for each in (one, info) if each.profile} - {()}
    if len(names) > 1:
        what = " and ".join(", ".join(each) for each in sorted(names))
        raise UserError(f"{first} and {path}: their channels are {what}: an ensemble must agree")


def find_background(info: DataInfo, name: str) -> int:
    """Index of the class with the name or value of `--background`; 0 if it is empty."""
    if not name:
        return 0
    choices = [*info.class_names, *map(str, info.class_values)]
    if name in choices:
        return choices.index(name) % info.num_class
    names = [*dict.fromkeys(choices)]
    raise UserError(f"--background {name}: no such class: {name_hint(name, names)}choose from {', '.join(names)}")


def predict_array(
    predictor: Predictor,
    image: np.ndarray,
    *,
    tta: bool = True,
    tile: int = 0,
    what: str = "probability",
    min_size: int | None = None,
    fill_holes: bool | None = None,
    certainty: float | None = None,
    link: float = 0.0,
    scale: float | tuple[float, float] = 1.0,
    threshold: float | None = None,
) -> np.ndarray:
    """Probability of each pixel of an image or a stack, or its objects.

    Parameters
    ----------
    predictor : Predictor
        From `load`.
    image : ndarray
        (..., H, W) or (..., H, W, 1) for a network of one channel, else (..., H, W, C); any integer or float type. For
        a network with context, the channels are the neighbouring sections. A last axis of up to 4 that is shorter than
        the two before it counts as channels: pass images that narrow as (..., H, W, 1).
    tta : bool
        Average over the eight flips and quarter turns; eight times slower.
    tile : int
        Height of a tile [px], rounded up to a multiple of the network's stride; 0: as memory allows.
    what : {"probability", "cells"}
        What to return.
    min_size, fill_holes, certainty
        Filter of the cells, as in `separate_objects`; None: as chosen in the training, `predictor.object_filter`, whose
        size is converted to pixels of the image.
    link : float
        Give the cells of neighbouring sections of a stack (N, H, W) one number if their intersection over union is at
        least this; 0: numbers start again in each section.
    scale : float, or tuple of two
        How many times larger, or higher and wider, the image becomes for the network, so that its objects are as large
        as those of the training: the size of its pixels divided by that in the training. The result has the size of
        the image.
    threshold : float
        Probability of the foreground, of two classes, above which pixels are cells; None: the best of validation.

    Returns
    -------
    ndarray of float32 or uint32
        Probability (..., H, W) of class 1, or (..., K, H, W) of K classes, in [0, 1]; or cells (..., H, W), 0 for the
        background.

    Raises
    ------
    UserError
        The image has a different number of channels than the network, holds NaN or infinity, or is no stack to link.
    """
    if what not in ("probability", "cells"):
        raise UserError(f"what={what!r}: choose probability or cells")
    image = _with_channels(np.asarray(image), predictor.info.nch_in)
    if link and (what != "cells" or image.ndim != 4 or len(image) < 2):
        raise UserError(f"link={link:g} of an image of shape {image.shape}: links the cells of a stack (N, H, W)")
    predictor = at_threshold(predictor, threshold, "threshold")
    given: dict[str, Any] = {"min_size": min_size, "fill_holes": fill_holes, "certainty": certainty}
    given_filter = {name: value for name, value in given.items() if value is not None}
    object_filter = (factors := _scale_from(scale)).filter(predictor.object_filter)._replace(**given_filter)
    result, linker = [], SectionLinker(link) if link else None
    for frame in image.reshape(-1, *image.shape[-3:]):
        values = _probability(predictor, frame, tta, tile, factors)
        result.append(values if what == "probability" else _cells(predictor, values, object_filter, linker)[None])
    stacked = np.stack(result).reshape(*image.shape[:-3], -1, *image.shape[-3:-1])
    return stacked[..., 0, :, :] if what == "cells" or predictor.num_channel == 1 else stacked


def _with_channels(image: np.ndarray, nch: int) -> np.ndarray:
    """Image or stack (..., H, W, C) of a network of so many channels."""
    if nch == 1 and not _has_channels(image.shape):
        image = image[..., None]
    if image.ndim < 3 or 0 in image.shape or image.dtype.kind not in "uifb":
        raise UserError(f"an image of shape {image.shape} and type {image.dtype}: give numbers (H, W) or (H, W, C)")
    return image


def _scale_from(scale: Any) -> Scale:
    """Scale from a number or two."""
    factors = scale_factors(",".join(map(str, np.ravel(scale).tolist())))
    if not factors:
        raise UserError(f"scale={scale}: give {SCALE[1].removeprefix('must be auto, ')}")
    return Scale(*factors)


def _probability(predictor: Predictor, image: np.ndarray, tta: bool, tile: int, scale: Scale) -> np.ndarray:
    """Probability (K, H, W) of an image (H, W, C) that is scaled for the network."""
    grid = predictor.tile_grid(scale.shape(image.shape), tile)
    probability = np.concatenate([band.values for band in predictor.bands(image, grid, tta=tta).compute()], axis=1)
    if grid.shape == image.shape[:2]:
        return probability
    bands = restored(probability.transpose(1, 2, 0), image.shape[:2])
    return np.concatenate([band.values for band in bands], axis=1)


def _cells(
    predictor: Predictor, probability: np.ndarray, object_filter: ObjectFilter, linker: SectionLinker | None
) -> np.ndarray:
    """Objects (H, W) of a probability (K, H, W), numbered in their stack if they are linked."""
    foreground, *class_ids = predictor.object_planes(probability)
    bands = separate_bands(foreground, predictor.object_threshold, class_ids=class_ids[0] if class_ids else None)
    objects = filter_objects(join_bands(bands, foreground.shape), foreground, object_filter)
    objects = grown(objects) if predictor.has_gaps else objects
    return linker.link(objects, *class_ids)[objects] if linker else objects


def _has_channels(shape: tuple[int, ...]) -> bool:
    """Whether the last axis of an array is channels, not columns.

    >>> [_has_channels(shape) for shape in [(512, 512, 3), (512, 512, 1), (30, 512, 512), (30, 1, 1), (3, 200, 3)]]
    [True, True, False, False, False]
    """
    return len(shape) > 2 and shape[-1] <= 4 and shape[-1] < min(shape[-3:-1])
