"""The U-Net, as a loop over levels."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

NUM_LEVEL = 4
STRIDE = 2**NUM_LEVEL  # [px] height and width inside the network are multiples of this

Sides = tuple[bool, bool, bool, bool]  # top, left, bottom, right
NONE: Sides = (False, False, False, False)

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


def _reach() -> tuple[list[int], int]:
    """How far beyond its own border a part of the image is seen.

    Two 3x3 convolutions a stage reach 2 px beyond what they compute, a 2x2 transposed convolution reads half of it
    (rounded up) one level down, and pooling reads twice of it one level up.

    Returns
    -------
    seen : list of int
        [px of that level] what the decoder of level 0, 1... (last: the bottom) must compute around the part.
    halo : int
        [px] what the logits of the part depend on around it, where it lies on multiples of `STRIDE`.

    Examples
    --------
    >>> _reach()
    ([0, 1, 2, 2, 2], 94)
    """
    seen = [0]
    for _ in range(NUM_LEVEL):
        seen.append(-(-(seen[-1] + 2) // 2))
    halo = seen[-1] + 2
    for level in reversed(range(NUM_LEVEL)):
        halo = max(2 * halo, seen[level] + 2) + 2
    return seen, halo


_SEEN, HALO = _reach()
MARGIN = -(-HALO // STRIDE) * STRIDE  # [px] the same, on the grid of the poolings


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


class UNet(nn.Module):
    """U-Net of pytorch-UNET: Ronneberger, Fischer and Brox 2015, with normalisation and average pooling.

    Parameters
    ----------
    nch_in, nch_out : int
        Channels of the input and of the logits.
    nch_ker : int
        Channels of the first level; each level down has twice as many.
    norm : {"bnorm", "inorm", "gnorm", "none"}
        Normalisation after each convolution.
    pool : {"avg", "max"}
        2x2 pooling between the levels; the paper has `max`.
    dropout : float
        Probability in training that a value at the bottom is dropped; the paper has dropout there. No part of
        `arguments`: the weights fit any.

    Notes
    -----
    `forward` takes (N, nch_in, H, W) floats of any height and width and returns (N, nch_out, H, W) logits.
    An image whose sides are no multiple of 16 px is padded at the bottom and right by reflection, and the logits are
    cut back. `HALO` px around a window decide over its logits. Parameters are registered in the order of the original
    network, so that its optimiser's state fits. Source: arXiv 1505.04597, figure 1.

    Examples
    --------
    >>> UNet(1, 1, nch_ker=2)(torch.zeros(2, 1, 33, 48)).shape
    torch.Size([2, 1, 33, 48])
    """

    def __init__(
        self,
        nch_in: int,
        nch_out: int,
        nch_ker: int = 64,
        norm: str = "bnorm",
        pool: str = "avg",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.arguments = {"nch_in": nch_in, "nch_out": nch_out, "nch_ker": nch_ker, "norm": norm, "pool": pool}
        widths = [nch_ker * 2**level for level in range(NUM_LEVEL + 1)]  # 64, 128, 256, 512, 1024
        ins = [nch_in, *widths[:-2]]
        outs = [widths[0], *widths[:-2]]  # a decoder hands the level above its own width; the topmost keeps it
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

    def forward(self, x: Tensor, inner: Sides = NONE) -> Tensor:
        """(N, nch_in, H, W) to logits (N, nch_out, H, W), any height and width.

        Where a side is `inner`, the image goes on beyond it: of its outermost `MARGIN` pixels, which are there to be
        seen alone, no logits come out, and the decoders compute no more of them than the logits need.
        """
        top, left, bottom, right = (MARGIN * side for side in inner)
        height, width = x.shape[-2] - top - bottom, x.shape[-1] - left - right
        return self.on_grid(pad_to_multiple(x, STRIDE), inner)[..., :height, :width]

    def on_grid(self, x: Tensor, inner: Sides = NONE) -> Tensor:
        """`forward` of an image whose sides are multiples of `STRIDE`."""
        skips = []
        for encoder in self.encoders:
            skips.append(encoder(x))
            x = self.pool(skips[-1])
        x = self.dropout(self.bottom(x))
        have = MARGIN // STRIDE  # [px] of this level
        for level, decoder in zip(reversed(range(NUM_LEVEL)), self.decoders, strict=True):
            x = _cut(x, inner, have - _SEEN[level + 1])
            have = 2 * _SEEN[level + 1]
            x = decoder(x, _cut(skips.pop(), inner, MARGIN // 2**level - have))
        return self.fc(_cut(x, inner, have))


def _cut(x: Tensor, inner: Sides, num: int) -> Tensor:
    """Feature map without the outermost rows and columns of its inner sides."""
    if not any(inner):
        return x
    top, left, bottom, right = (num * side for side in inner)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


class EightFold(nn.Module):
    """A network averaged over the eight flips and quarter turns of its input.

    `forward` returns logits whose probability is the mean of the eight probabilities.

    Parameters
    ----------
    net : nn.Module
        (N, C, H, W) to logits (N, 1, H, W) or (N, K, H, W).
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, inner: Sides = NONE) -> Tensor:
        """(N, C, H, W) to logits, as the network's."""
        top, left, bottom, right = (MARGIN * side for side in inner)
        height, width = x.shape[-2] - top - bottom, x.shape[-1] - left - right
        x = pad_to_multiple(
            x, STRIDE
        )  # before it is turned: each view has the same pixels, and the same grid of poolings
        total = 0
        for flip in (False, True):
            sides = (top, right, bottom, left) if flip else (top, left, bottom, right)
            for quarters in range(4):
                turned = torch.rot90(x.flip(-1) if flip else x, quarters, (-2, -1))
                # counter-clockwise the right side comes to the top, the top to the left
                seen = tuple(side > 0 for side in sides[4 - quarters :] + sides[: 4 - quarters])
                back = torch.rot90(class_probability(self.net(turned, seen)), -quarters, (-2, -1))
                total = total + (back.flip(-1) if flip else back)
        logits = torch.log((total / 8).clamp_min(torch.finfo(total.dtype).tiny))[..., :height, :width]
        return logits if self.net.fc.out_channels > 1 else logits[:, 1:] - logits[:, :1]


def memory_format(norm: str, precision: torch.dtype | None) -> torch.memory_format:
    """Order of the pixels in memory that a network is fastest with.

    Channels-last, but for instance and group normalisation in float32, which then take 0.8 of the speed
    (`benchmarks/bench_step.py`).
    """
    planes = norm in ("inorm", "gnorm") and precision is None
    return torch.contiguous_format if planes else torch.channels_last


def fold_norm(net: nn.Module) -> nn.Module:
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


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Image padded at the bottom and right to sides that are multiples of a number, and at least twice it.

    Parameters
    ----------
    x : Tensor
        (N, C, H, W).
    multiple : int
        [px]. Twice it is the least side, since instance normalisation needs two pixels at the bottom.

    Returns
    -------
    Tensor
        (N, C, H', W'), reflected; where the padding is as wide as the image, its last row or column repeated.

    Examples
    --------
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
    """Draw the weights of a network anew; biases are 0, normalisations the identity.

    Parameters
    ----------
    net : nn.Module
        Changed in place.
    init : {"normal", "xavier", "kaiming", "orthogonal"}
        `normal` is the original's, with standard deviation 0.02; `kaiming` is the paper's, He et al. 2015.
    seed : int
        The same seed gives the same weights, whatever was drawn before.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            INITS[init](module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def rename_legacy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of pytorch-UNET's network under this network's names.

    Parameters
    ----------
    state : dict of str to Tensor
        Its keys may carry the prefix `module.` of DataParallel or `_orig_mod.` of torch.compile.

    Returns
    -------
    dict of str to Tensor
        The same tensors, in the same order.

    Examples
    --------
    >>> list(rename_legacy({"module.dec4_2.cbr.0.conv.weight": None, "unpool1.unpooling.bias": None}))
    ['decoders.0.convs.0.conv.weight', 'decoders.3.up.bias']
    """
    rules: list[tuple[str, Callable[[re.Match], str]]] = [
        (r"^(module\.|_orig_mod\.)+", lambda _: ""),
        (r"\.cbr\.[01]\.(conv|norm)\.", lambda m: f".{m[1]}."),
        (r"^enc5_1\.", lambda _: "bottom.0."),
        (r"^dec5_1\.", lambda _: "bottom.1."),
        (r"^enc([1-4])_([12])\.", lambda m: f"encoders.{int(m[1]) - 1}.{int(m[2]) - 1}."),
        (r"^dec([1-4])_([12])\.", lambda m: f"decoders.{4 - int(m[1])}.convs.{2 - int(m[2])}."),
        (r"^unpool([1-4])\.unpooling\.", lambda m: f"decoders.{4 - int(m[1])}.up."),
        (r"^fc\.conv\.", lambda _: "fc."),
    ]
    renamed = {}
    for key, value in state.items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


def class_probability(logits: Tensor) -> Tensor:
    """Probability of each class.

    Parameters
    ----------
    logits : Tensor
        (N, 1, H, W) of class 1, or (N, K, H, W).

    Returns
    -------
    Tensor
        (N, K, H, W) in [0, 1]; K is 2 for logits of one channel.
    """
    if logits.shape[1] > 1:
        return logits.softmax(dim=1)
    return torch.cat([-logits, logits], dim=1).sigmoid()  # 1 - sigmoid would round small probabilities to 0


def class_map(logits: Tensor) -> Tensor:
    """Likeliest class of each pixel, (N, H, W) int64, from logits of one channel or K."""
    return logits.argmax(dim=1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()


def convert_legacy(saved: dict[str, dict]) -> dict[str, Any]:
    """Checkpoint of pytorch-UNET in the layout of ours.

    Parameters
    ----------
    saved : dict
        `netG` and `optimG`, with norm `bnorm` or `inorm`, the two that pytorch-UNET has.

    Returns
    -------
    dict
        `net`, `optim`, `arch` (arguments of the `UNet`), an empty `config`, and `whole`.
    """
    net = rename_legacy(saved["netG"])
    first = net["encoders.0.0.conv.weight"]
    norm = "bnorm" if "encoders.0.0.norm.running_mean" in net else "inorm"
    nch_in, nch_out, nch_ker = first.shape[1], net["fc.weight"].shape[0], first.shape[0]
    arch = {"nch_in": nch_in, "nch_out": nch_out, "nch_ker": nch_ker, "norm": norm, "pool": "avg"}
    return {"net": net, "optim": saved["optimG"], "arch": arch, "config": {"optim": "adam"}, "whole": True}
