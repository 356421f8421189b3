"""The halo of a tile, with which it gives the same logits as the whole image, and the forward pass of a tile."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from model import UNet, pad_to_multiple


class Sides(NamedTuple):
    """Sides of a tile that have a halo; at the other sides the image ends."""

    top: bool = False
    left: bool = False
    bottom: bool = False
    right: bool = False

    def turned(self, quarters: int) -> Sides:
        """Sides after quarter turns counter-clockwise, which move the right side to the top and the top to the left."""
        return Sides(*self[4 - quarters :], *self[: 4 - quarters])

    def flipped(self) -> Sides:
        """Sides after left and right are exchanged."""
        return Sides(self.top, self.right, self.bottom, self.left)


WHOLE = Sides()  # of an image that is a single tile


def decoder_halos(num_level: int) -> list[int]:
    """Halo of the output of each decoder [px of its level]; the last entry is that of the bottom.

    Two 3x3 convolutions read 2 px beyond their output, and a 2x2 transposed convolution reads half of it (rounded up)
    one level down.

    >>> decoder_halos(4)
    [0, 1, 2, 2, 2]
    """
    pixels = [0]
    for _ in range(num_level):
        pixels.append(-(-(pixels[-1] + 2) // 2))
    return pixels


def receptive_radius(num_level: int) -> int:
    """Pixels beyond each side of a tile, placed at a multiple of the stride, that its logits depend on.

    >>> [receptive_radius(num_level) for num_level in (3, 4, 5)]
    [46, 94, 190]
    """
    pixels = decoder_halos(num_level)
    radius = pixels[-1] + 2
    for level in reversed(range(num_level)):  # pooling reads twice as many pixels one level up
        radius = max(2 * radius, pixels[level] + 2) + 2
    return radius


def halo(num_level: int) -> int:
    """Pixels that a tile reads beyond its output: the receptive radius rounded up to a multiple of the stride.

    >>> [halo(num_level) for num_level in (3, 4, 5)]
    [48, 96, 192]
    """
    stride = 2**num_level
    return -(-receptive_radius(num_level) // stride) * stride


def forward_tile(net: UNet, x: Tensor, sides: Sides) -> Tensor:
    """Logits of a tile (N, C, H, W) of any height and width, without the halo on its sides."""
    around = halo(net.num_level)
    height = x.shape[-2] - around * (sides.top + sides.bottom)
    width = x.shape[-1] - around * (sides.left + sides.right)
    return forward_padded(net, pad_to_multiple(x, net.stride), sides)[..., :height, :width]


def forward_padded(net: UNet, x: Tensor, sides: Sides = WHOLE) -> Tensor:
    """`forward_tile` for a tile whose height and width are multiples of the stride."""
    skips = []
    for encoder in net.encoders:
        skips.append(encoder(x))
        x = net.pool(skips[-1])
    x = net.bottom(x)
    needed, around = decoder_halos(net.num_level), halo(net.num_level)
    present = around // net.stride  # halo of x [px of its level]
    for level, decoder in zip(reversed(range(net.num_level)), net.decoders, strict=True):
        x = crop_sides(x, sides, present - needed[level + 1])
        present = 2 * needed[level + 1]
        x = decoder(x, crop_sides(skips.pop(), sides, around // 2**level - present))
    return net.fc(crop_sides(x, sides, present))


def crop_sides(x: Tensor, sides: Sides, num: int) -> Tensor:
    """Image or feature map without `num` rows or columns on each side that has a halo."""
    if not any(sides):
        return x
    top, left, bottom, right = (num * side for side in sides)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
