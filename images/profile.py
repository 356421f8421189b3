"""What images are, in a few values: kept of a training's images, and compared with those that come later."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from images.geometry import Geometry
from images.readers import Frame, geometries_of, is_indexed
from images.rows import Rows
from rules import is_list, is_number
from utils import UserError, spread

NUM_SAMPLED = 16  # images whose grey values are read, evenly spaced among all
NUM_BAND, BAND_ROWS = 4, 16  # bands of rows of each, and their height [px]
OTHER_SCALE = 10.0  # factor between the widths of two ranges from which they are of different grey scales
FAR = 3.0  # standard deviations between two means from which images are unlike those of the training
SCALE_WAYS = "scale them to these, or train with --normalize image, which any scale suits"
OTHER_SIZE = 1.5  # factor between two pixel sizes from which objects look unlike those of the training


@dataclass(frozen=True)
class Profile:
    """What the images of a database or of a prediction are; the channels are those of a section itself."""

    dtypes: list[str]  # types of the pixels
    mean: list[float]  # (C,) mean grey value of each channel
    low: list[float]  # (C,) grey value that 0.1 % of its pixels lie below
    high: list[float]  # (C,) and above
    channels: list[str]  # names of the channels; empty: unknown, or not the same in all files
    pixel_size: list[float]  # [µm] height and width of a pixel, the median of the files that give one; else empty
    is_grey: bool = False  # three channels are equal in each pixel: grey saved as colour
    is_indexed: bool = False  # the grey values of some are the indices of a palette of colours

    @classmethod
    def from_dict(cls, values: Any, nch: int) -> Profile | None:
        """Profile of so many channels from a file of ours; None if it can't be used."""
        rules: dict[str, Callable[[Any], bool]] = {
            "dtypes": lambda names: is_list(names, _is_text),
            "mean": lambda numbers: is_list(numbers, is_number, nch),
            "low": lambda numbers: is_list(numbers, is_number, nch),
            "high": lambda numbers: is_list(numbers, is_number, nch),
            "channels": lambda names: is_list(names, _is_text) and len(names) in (0, nch),
            "pixel_size": lambda sides: is_list(sides, lambda side: is_number(side, 1e-9)) and len(sides) in (0, 2),
            "is_grey": lambda value: isinstance(value, bool),
            "is_indexed": lambda value: isinstance(value, bool),
        }
        values = {"is_indexed": False} | values if isinstance(values, dict) else {}  # some have no such entry
        is_valid = values.keys() == rules.keys()
        return cls(**values) if is_valid and all(rules[name](values[name]) for name in rules) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def profile_of(frames: Sequence[Frame]) -> Profile:
    """Profile of images, of which some pixels of at most `NUM_SAMPLED` are read."""
    images = [frame.open() for frame in frames]
    sizes = [geometry.pixel_size for geometry in geometries_of(frames) if geometry.pixel_size]
    sampled = [images[n] for n in spread(len(frames), NUM_SAMPLED)]
    profile = make_profile(sampled, common_names(frames), sizes)
    return replace(profile, dtypes=sorted({of.dtype.name for of in images}), is_indexed=are_indexed(frames))


def are_indexed(frames: Sequence[Frame]) -> bool:
    """Whether the grey values of any of at most `NUM_SAMPLED` images are the indices of a palette of colours."""
    return any(is_indexed(frames[n]) for n in spread(len(frames), NUM_SAMPLED))


def make_profile(images: Iterable[Rows | np.ndarray], channels: list[str], sizes: Sequence[Sequence[float]]) -> Profile:
    """Profile of images (H, W, C), of which some pixels are read; `sizes` are the pixel sizes that are known [µm]."""
    dtypes, parts = zip(*((image.dtype.name, _some_pixels(image)) for image in images), strict=True)
    pixels = np.concatenate(parts)
    is_finite = np.isfinite(pixels).all(1)  # others are refused when they are used
    pixels = pixels[is_finite] if is_finite.any() else np.zeros_like(pixels[:1])
    low, high = np.percentile(pixels, (0.1, 99.9), axis=0)
    return Profile(
        dtypes=sorted({*dtypes}),
        mean=pixels.mean(0).tolist(),
        low=low.tolist(),
        high=high.tolist(),
        channels=channels,
        pixel_size=[statistics.median(side) for side in zip(*sizes, strict=True)],
        is_grey=pixels.shape[1] == 3 and bool((pixels == pixels[:, :1]).all()),
    )


def common_names(frames: Sequence[Frame]) -> list[str]:
    """Names of the channels of images; empty if they are unknown, or not the same in all files."""
    geometries = geometries_of(frames)
    pairs = zip(frames, geometries, strict=True)
    names = {channel_names(frame, geometry, frame.open().shape[2]) for frame, geometry in pairs}
    return list(names.pop()) if len(names) == 1 else []


def channel_names(frame: Frame, geometry: Geometry, num: int) -> tuple[str, ...]:
    """Names of the channels that are read of a frame; empty if the file doesn't name all of them."""
    names = geometry.channels
    if names and frame.channels:
        names = tuple(names[number] for number in frame.channels)
    return names if len(names) == num and all(names) and len({*names}) == num else ()


def by_name(frames: list[Frame], trained: Profile | None) -> tuple[list[Frame], list[tuple[Path, str]]]:
    """Frames whose channels are those of a training by their names, and a note on each file where that matters."""
    if not (trained and trained.channels):
        return frames, []
    notes: dict[tuple[Path, str], None] = {}
    of_training = []
    for frame, geometry in zip(frames, geometries_of(frames), strict=True):
        names = () if frame.channels else channel_names(frame, geometry, frame.open().shape[2])  # --channel overrides
        channels = channels_by_name(trained.channels, names, frame.path)
        if channels:
            pairs = zip(trained.channels, channels, strict=True)
            order = ", ".join(f"{name} is channel {number}" for name, number in pairs)
            notes[frame.path, f"channels are taken by name, as in the training: {order}"] = None
        of_training.append(replace(frame, channels=channels or frame.channels))
    return of_training, list(notes)


def _some_pixels(image: Rows | np.ndarray) -> np.ndarray:
    """Pixels (P, C) of a few bands of rows of an image."""
    height = image.shape[0]
    tops = {int(top) for top in np.linspace(0, max(height - BAND_ROWS, 0), NUM_BAND)}
    bands = [np.asarray(image[top : min(top + BAND_ROWS, height)], np.float64) for top in sorted(tops)]
    return np.concatenate([band.reshape(-1, band.shape[2]) for band in bands])


def channels_by_name(trained: Sequence[str], new: Sequence[str], source: object) -> tuple[int, ...]:
    """Indices of new channels that have the names of those of a training, in their order; empty: take them as they are.

    Raises
    ------
    UserError
        A name of the training is missing among the new ones.

    Examples
    --------
    >>> channels_by_name(["DAPI", "GFP"], ["GFP", "RFP", "DAPI"], "a.tif"), channels_by_name(["DAPI"], [], "a.tif")
    ((2, 0), ())
    """
    if not trained or not new or list(trained) == list(new):
        return ()
    if missing := [name for name in trained if name not in new]:
        what = f"{source}: channels {', '.join(new)}, in the training {', '.join(trained)}"
        raise UserError(f"{what}: no {', '.join(missing)}: name the channels that are meant with --channel")
    return tuple(list(new).index(name) for name in trained)


def compare(
    trained: Profile,
    new: Profile,
    std: Sequence[float],
    source: object,
    *,
    by_data: bool,
    advice: str = "",
    ways: str = SCALE_WAYS,
) -> list[str]:
    """Lines, which begin with `source`, that tell how images differ from those of a training; refuses other scales.

    `std` (C,) is the standard deviation of the grey values of the training. The scale counts only if images are
    normalised `by_data`, by the mean and standard deviation of the training. `advice` is on another pixel size,
    `ways` on another scale.
    """
    lines = _other_greys(trained, new, std, source, ways) if by_data else []
    if trained.is_grey != new.is_grey and len(trained.low) == 3:
        one, other = ("grey, saved as colour", "coloured")[:: 1 if new.is_grey else -1]
        lines.append(f"{source}: {one}; in the training the images are {other}")
    if trained.is_indexed != new.is_indexed:
        one, other = ("have a palette of colours, whose indices are read", "have none")[:: 1 if new.is_indexed else -1]
        lines.append(f"{source}: images that {one}; in the training they {other}")
    pairs = [*zip(trained.pixel_size, new.pixel_size, strict=False)]  # along y and x, if both are known
    ours, theirs = max(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1])), default=(1.0, 1.0))
    if not 1 / OTHER_SIZE <= ours / theirs <= OTHER_SIZE:
        is_larger, factor = ours > theirs, max(ours / theirs, theirs / ours)
        size = f"{factor:.3g} times as large [px] as" if is_larger else f"{factor:.3g} times smaller [px] than"
        what = f"a pixel has {theirs:.4g} µm, in the training {ours:.4g} µm"
        lines.append(f"{source}: {what}: objects are {size} in the training{advice}")
    return lines


def _other_greys(trained: Profile, new: Profile, std: Sequence[float], source: object, ways: str) -> list[str]:
    """Line about grey values that lie elsewhere; refuses those of another scale."""
    lows, highs = np.array([trained.low, new.low]), np.array([trained.high, new.high])
    deviation = np.asarray(std)[: len(new.mean)]
    factor = ((highs[1] - lows[1]) / np.maximum(highs[0] - lows[0], deviation)).max()  # a constant channel has no width
    ranges = [f"{low.min():.4g} to {high.max():.4g}" for low, high in zip(lows, highs, strict=True)]
    what = f"{source}: grey values {ranges[1]} ({', '.join(new.dtypes)}), in the training {ranges[0]}"
    what += f" ({', '.join(trained.dtypes)})"
    apart = bool((lows.max(0) > highs.min(0)).all())
    if apart or (not 1 / OTHER_SCALE < factor < OTHER_SCALE and set(trained.dtypes) != set(new.dtypes)):
        raise UserError(f"{what}: {ways}")
    far = np.abs(np.subtract(new.mean, trained.mean)) / deviation
    if far.max() > FAR or not 1 / OTHER_SCALE < factor < OTHER_SCALE:
        return [f"{what}: the result may be poor: was the exposure another? --normalize image is for such images"]
    return []
