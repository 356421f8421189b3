"""Pictures of grey values and of objects: contrast, colours of classes, outlines."""

from __future__ import annotations

import colorsys

import numpy as np

Range = list[float] | list[list[float]]  # [low, high] of all channels, or of each
SIDE = 1024  # [px] at most of the image that its contrast is taken from: a large one counts every n-th row and column
FAINT = 4  # a channel has a range of its own if that is smaller than the common one by this factor


def palette(num_class: int) -> np.ndarray:
    """Colours of the classes, (num_class, 3) uint8: black, seven that colour-blind readers can tell apart, then others.

    Source of the first eight: Wong 2011, doi 10.1038/nmeth.1618; the hues of the others advance by the golden ratio.

    >>> palette(2).tolist()
    [[0, 0, 0], [230, 159, 0]]
    """
    wong = ["000000", "e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7"]
    colours = [tuple(bytes.fromhex(colour)) for colour in wong]
    for k in range(len(wong), num_class):
        rgb = colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.5 + 0.5 * (k % 2), 0.95)
        colours.append(tuple(round(255 * value) for value in rgb))
    return np.array(colours[:num_class], np.uint8)


def picture_channels(num: int) -> slice:
    """Channels in the picture of an image with `num` channels: all three, else the first one."""
    return slice(3 if num == 3 else 1)


def grey_range(values: np.ndarray) -> Range:
    """Grey values (low, high) that are black and white in a picture, of pixels (P, C) of its channels.

    0 and 255 for well-used 8 bits, else the 0.1 and 99.9 % percentiles. One range of all channels keeps their colours;
    if one of them would be faint in it, each has its own.

    >>> grey_range(np.array([[0, 0, 0], [200, 90, 180]], np.uint8))
    [0.0, 255.0]
    """
    common, ranges = _well_used_range(values), [_well_used_range(channel) for channel in values.T]
    is_faint = any(0 < high - low < (common[1] - common[0]) / FAINT for low, high in ranges)
    return ranges if is_faint else common


def picture_range(image: np.ndarray) -> Range:
    """`grey_range` of the picture of an image (H, W, C) by itself, so that a dim one is seen, too."""
    step = -(-max(image.shape[:2]) // SIDE)  # rounded up
    pixels = np.asarray(image[::step, ::step, picture_channels(image.shape[-1])])
    return grey_range(pixels.reshape(-1, pixels.shape[-1]))


def _well_used_range(values: np.ndarray) -> list[float]:
    low, high = np.percentile(values, (0.1, 99.9)).tolist()
    if values.dtype == np.uint8 and high >= 128:
        return [0.0, 255.0]
    return [low, high] if low < high else [float(values.min()), float(values.max())]


def input_picture(pixels: np.ndarray, value_range: Range) -> np.ndarray:
    """Picture of an input (H, W, C): its three channels (H, W, 3), else the first one (H, W).

    `value_range` are the values that become 0 and 255, see `grey_range`.
    """
    low, high = np.reshape(value_range, (-1, 2)).T
    channels = pixels[..., picture_channels(pixels.shape[-1])]
    picture = np.clip((channels - low) / np.where(high > low, high - low, 1) * 255, 0, 255).round().astype(np.uint8)
    return picture if picture.shape[-1] == 3 else picture[..., 0]


def outlines(objects: np.ndarray, above: np.ndarray | None = None, below: np.ndarray | None = None) -> np.ndarray:
    """Pixels (h, W) bool of objects that touch another object or the background by a side.

    `objects` (h, W) are numbers of objects or classes, 0 for background, of some rows of an image; `above` and `below`
    (W,) are the rows next to them. Without these the image ends there, which is no outline.

    >>> outlines(np.array([[1, 1, 1, 0, 2, 3]])).astype(int).tolist()
    [[0, 0, 1, 0, 1, 1]]
    """
    first = objects[0] if above is None else above
    last = objects[-1] if below is None else below
    around = np.concatenate([first[None], objects, last[None]])
    edge = (objects != around[:-2]) | (objects != around[2:])
    differ = objects[:, 1:] != objects[:, :-1]
    edge[:, 1:] |= differ
    edge[:, :-1] |= differ
    return edge & (objects > 0)


def overlay_picture(picture: np.ndarray, edge: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Picture (h, W) or (h, W, 3) with its pixels on an `edge` (h, W) replaced by colours (h, W, 3) or (3,), as RGB."""
    rgb = np.array(np.broadcast_to(picture if picture.ndim == 3 else picture[..., None], (*edge.shape, 3)))
    rgb[edge] = np.broadcast_to(colours, rgb.shape)[edge]
    return rgb
