"""A part of a large image gives the logits that the whole image would give: what it sees and computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model import UNet, pad_to_multiple


class Sides(NamedTuple):
    """Sides of a part of an image on which the image continues; there the part has a margin of real pixels."""

    top: bool = False
    left: bool = False
    bottom: bool = False
    right: bool = False

    def turned(self, quarters: int) -> Sides:
        """Sides after so many quarter turns counter-clockwise: the right side comes to the top, the top to the left."""
        return Sides(*self[4 - quarters :], *self[: 4 - quarters])

    def flipped(self) -> Sides:
        """Sides after left and right have changed places."""
        return Sides(self.top, self.right, self.bottom, self.left)


WHOLE = Sides()


def context(num_level: int) -> list[int]:
    """Pixels that the decoder of each level must compute around a part; the last entry is the bottom's.

    Two 3x3 convolutions reach 2 px beyond what they compute, and a 2x2 transposed convolution reads half of it
    (rounded up) one level down.

    Examples
    --------
    >>> context(4)
    [0, 1, 2, 2, 2]
    """
    pixels = [0]
    for _ in range(num_level):
        pixels.append(-(-(pixels[-1] + 2) // 2))
    return pixels


def halo(num_level: int) -> int:
    """Pixels around a part, which lies on multiples of the stride, that its logits depend on.

    Examples
    --------
    >>> [halo(num_level) for num_level in (3, 4, 5)]
    [46, 94, 190]
    """
    pixels = context(num_level)
    reach = pixels[-1] + 2
    for level in reversed(range(num_level)):  # pooling reads twice as many pixels one level up
        reach = max(2 * reach, pixels[level] + 2) + 2
    return reach


def margin(num_level: int) -> int:
    """The halo rounded up to a multiple of the stride [px].

    Examples
    --------
    >>> [margin(num_level) for num_level in (3, 4, 5)]
    [48, 96, 192]
    """
    stride = 2**num_level
    return -(-halo(num_level) // stride) * stride


def forward_inner(net: UNet, x: Tensor, inner: Sides) -> Tensor:
    """(N, C, H, W) to the logits of the part without the margins of its inner sides, of any height and width."""
    height, width = size_inside(net, x, inner)
    return forward_padded(net, pad_to_multiple(x, net.stride), inner)[..., :height, :width]


def size_inside(net: UNet, x: Tensor, inner: Sides) -> torch.Size:
    """Height and width of an image without the margins of its inner sides."""
    return torch.Size(x.shape[axis] - margin(net.num_level) * (inner[axis + 2] + inner[axis + 4]) for axis in (-2, -1))


def forward_padded(net: UNet, x: Tensor, inner: Sides = WHOLE) -> Tensor:
    """`forward_inner` of an image whose sides are multiples of the stride."""
    skips = []
    for encoder in net.encoders:
        skips.append(encoder(x))
        x = net.pool(skips[-1])
    x = net.bottom(x)
    needed, around = context(net.num_level), margin(net.num_level)
    present = around // net.stride  # [px] of this level around the part
    for level, decoder in zip(reversed(range(net.num_level)), net.decoders, strict=True):
        x = _crop(x, inner, present - needed[level + 1])
        present = 2 * needed[level + 1]
        x = decoder(x, _crop(skips.pop(), inner, around // 2**level - present))
    return net.fc(_crop(x, inner, present))


def _crop(x: Tensor, inner: Sides, num: int) -> Tensor:
    """Feature map without the outermost rows and columns of its inner sides."""
    if not any(inner):
        return x
    top, left, bottom, right = (num * side for side in inner)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
