"""The U-Net, as a loop over levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_LEVEL = 4  # of the paper, of pytorch-UNET, and of checkpoints without that entry

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "bnorm": nn.BatchNorm2d,
    "inorm": nn.InstanceNorm2d,
    "gnorm": lambda nch: nn.GroupNorm(math.gcd(8, nch), nch),
    "none": lambda _: nn.Identity(),
}
POOLS: dict[str, Callable[[int], nn.Module]] = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}
INITS: dict[str, Callable[..., Tensor]] = {
    "normal": lambda weight, generator: nn.init.normal_(weight, 0.0, 0.02, generator=generator),
    "xavier": lambda weight, generator: nn.init.xavier_normal_(weight, generator=generator),
    "kaiming": lambda weight, generator: nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator),
    "orthogonal": lambda weight, generator: nn.init.orthogonal_(weight, generator=generator),
}


class CNR2d(nn.Module):
    """3x3 convolution, normalisation, ReLU."""

    def __init__(self, nch_in: int, nch_out: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(nch_in, nch_out, kernel_size=3, padding=1, bias=norm != "bnorm")
        self.norm = NORMS[norm](nch_out)

    def forward(self, x: Tensor) -> Tensor:
        """(N, nch_in, H, W) to (N, nch_out, H, W)."""
        return F.relu(self.norm(self.conv(x)), inplace=True)


class Decoder(nn.Module):
    """Doubles height and width, puts the skip in front, and convolves twice."""

    def __init__(self, nch: int, nch_out: int, norm: str) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(nch, nch, kernel_size=2, stride=2)
        self.convs = nn.Sequential(CNR2d(2 * nch, nch, norm), CNR2d(nch, nch_out, norm))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(N, nch, H, W) and the skip (N, nch, 2 H, 2 W) to (N, nch_out, 2 H, 2 W)."""
        return self.convs(torch.cat([skip, self.up(x)], dim=1))


class Architecture(TypedDict, total=False):
    """Arguments of a `UNet` that its weights depend on; older checkpoints name no `num_level`."""

    nch_in: int
    nch_out: int
    nch_ker: int
    norm: str
    pool: str
    num_level: int


class UNet(nn.Module):
    """U-Net of pytorch-UNET: Ronneberger, Fischer and Brox 2015, with normalisation and average pooling.

    `forward` takes (N, nch_in, H, W) floats of any height and width and returns (N, nch_out, H, W) logits.
    An image whose sides are not multiples of `stride` is padded at the bottom and right by reflection, and the logits
    are cropped. Parameters are registered in the order of the original network, so that its optimiser's state fits.
    Source: arXiv 1505.04597, figure 1.

    >>> UNet(1, 1, nch_ker=2)(torch.zeros(2, 1, 33, 48)).shape
    torch.Size([2, 1, 33, 48])
    """

    def __init__(
        self,
        nch_in: int,  # channels of the input
        nch_out: int,  # channels of the logits
        nch_ker: int = 64,  # channels of the first level; each level down has twice as many
        norm: str = "bnorm",  # after each convolution
        pool: str = "avg",  # 2x2, between the levels; the paper uses `max`
        dropout: float = 0.0,  # at the bottom in training, as in the paper; the weights fit any
        num_level: int = NUM_LEVEL,  # poolings on the way down, and decoders on the way up
    ) -> None:
        super().__init__()
        self.num_level = num_level
        self.arguments = Architecture(
            nch_in=nch_in, nch_out=nch_out, nch_ker=nch_ker, norm=norm, pool=pool, num_level=num_level
        )
        widths = [nch_ker * 2**level for level in range(num_level + 1)]  # 64, 128, 256, 512, 1024
        ins = [nch_in, *widths[:-2]]
        outs = [widths[0], *widths[:-2]]  # each decoder returns the channels of the level above
        self.encoders = nn.ModuleList(
            nn.Sequential(CNR2d(i, o, norm), CNR2d(o, o, norm)) for i, o in zip(ins, widths[:-1], strict=True)
        )
        self.bottom = nn.Sequential(CNR2d(widths[-2], widths[-1], norm), CNR2d(widths[-1], widths[-2], norm))
        self.decoders = nn.ModuleList(
            Decoder(nch, out, norm) for nch, out in zip(widths[-2::-1], outs[::-1], strict=True)
        )
        self.fc = nn.Conv2d(nch_ker, nch_out, kernel_size=1)
        self.pool = POOLS[pool](2)
        self.dropout = nn.Dropout(dropout)

    @property
    def stride(self) -> int:
        """Height and width inside the network are multiples of this [px]."""
        return 2**self.num_level

    def forward(self, x: Tensor) -> Tensor:
        """(N, nch_in, H, W) to logits (N, nch_out, H, W), any height and width."""
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.stride)
        skips = []
        for encoder in self.encoders:
            skips.append(encoder(x))
            x = self.pool(skips[-1])
        x = self.dropout(self.bottom(x))
        for decoder in self.decoders:
            x = decoder(x, skips.pop())
        return self.fc(x)[..., :height, :width]


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Image (N, C, H, W) padded at the bottom and right to sides that are multiples of a number [px].

    Padded by reflection, or by repeating the last row or column where the padding is as wide as the image. A side is at
    least twice that number, since instance normalisation needs two pixels at the bottom of the network.

    >>> pad_to_multiple(torch.zeros(1, 1, 33, 64), 16).shape
    torch.Size([1, 1, 48, 64])
    """
    for axis in (-2, -1):
        size = x.shape[axis]
        missing = max(-(-size // multiple), 2) * multiple - size
        if missing:
            pad = (0, missing, 0, 0) if axis == -1 else (0, 0, 0, missing)
            x = F.pad(x, pad, mode="reflect" if missing < size else "replicate")
    return x


def init_weights(net: nn.Module, init: str, seed: int) -> None:
    """Initialise the weights of a network at random; biases are 0, normalisations the identity.

    `normal` is pytorch-UNET's, with standard deviation 0.02; `kaiming` is the paper's, He et al. 2015. The same seed
    gives the same weights, whatever was drawn before.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            INITS[init](module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def class_probability(logits: Tensor) -> Tensor:
    """Probability (N, K, H, W) of each class, given logits (N, K, H, W), or (N, 1, H, W) of class 1 of two."""
    if logits.shape[1] > 1:
        return logits.softmax(dim=1)
    return torch.cat([-logits, logits], dim=1).sigmoid()  # 1 - sigmoid would round small probabilities to 0
