"""Augmentation: random changes of a batch to which a network should be invariant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import Batch
from samples import IGNORE


@dataclass(frozen=True)
class Augmentation:
    """Random flips, turns, zoom, elastic displacement, blur, noise and intensity changes of a whole batch.

    Each is off by default; `config.py` has the defaults for training.

    All spatial changes are one sampling grid, so each pixel is interpolated once: the image by cubic convolution
    (bilinear interpolation blurs it), the label linearly. Source: Ronneberger et al. 2015, section 3.1.
    """

    crop: tuple[int, int]  # height and width of the result [px]
    num_class: int
    is_partial: bool = False  # the label may hold `IGNORE`; a crop is not displaced if no annotated pixel would be left
    keeps_unchanged: bool = False  # also return the image before its intensities are changed
    flip: bool = False  # of both axes
    turn: bool = False  # by quarters, or by halves if the crop is not square
    rotate: float = 0.0  # largest angle of a further rotation [degrees]
    zoom: float = 1.0  # largest factor that a crop is enlarged or shrunk by
    elastic: float = 0.0  # standard deviation of the displacement at the nodes [px], clipped at three times that
    elastic_share: float = 1.0  # of the crops; the others stay as sharp as test images: interpolation blurs
    elastic_grid: int = 3  # nodes per side; bicubic interpolation in between
    brightness: float = 0.0  # largest shift, in standard deviations
    contrast: float = 0.0  # largest relative change
    gamma: float = 0.0  # largest logarithm of the exponent of grey values that are scaled to [0, 1] per image
    blur: float = 0.0  # largest standard deviation of a Gaussian blur [px]
    noise: float = 0.0  # largest standard deviation of Gaussian noise, in standard deviations of the image

    @property
    def margin(self) -> int:
        """Pixels that a batch has around the crop: the largest displacement, and what a shrunk crop shows in addition.

        What a rotation turns in from farther away is reflected.
        """
        return self._largest_shift + math.ceil((self.zoom - 1) / 2 * max(self.crop))

    @property
    def _largest_shift(self) -> int:
        """Largest elastic displacement [px]."""
        return math.ceil(3 * self.elastic)

    def __call__(self, batch: Batch, rngs: Sequence[np.random.Generator]) -> Batch:
        """Augment a batch of crops with the margin around them; returns crops, the label as int64.

        Each sample has other random numbers, so that it does not depend on the others of its batch. They are drawn on
        the CPU, so that all devices get the same numbers; only the noise is drawn on the device.
        """
        image = batch["input"]
        classes = self._class_planes(batch["label"]).to(image.dtype)
        planes = [classes, *([batch["distance"][:, None]] if "distance" in batch else [])]
        straight, displacement = self._positions(image, rngs)
        if self.is_partial:
            is_annotated = self._label_of(_sample(classes, straight + displacement)) != IGNORE
            is_lost = (batch["label"] != IGNORE).any(dim=(1, 2)) & ~is_annotated.any(dim=(1, 2))
            displacement = displacement * ~is_lost[:, None, None, None]
        positions = displacement + straight
        stack = _sample(torch.cat(planes, dim=1), positions)
        classes, *distance = stack.split([plane.shape[1] for plane in planes], dim=1)
        result = batch.copy()
        moved = _sample(image, positions, mode="bicubic")
        result["input"] = self._change_intensity(moved, rngs)
        if self.keeps_unchanged:
            result["unchanged"] = moved
        result["label"] = self._label_of(classes)
        if distance:
            result["distance"] = distance[0][:, 0]
        return result

    def _class_planes(self, label: Tensor) -> Tensor:
        """Planes (N, K, H, W) of a label that say where each class is, but for the one that has what they leave."""
        return torch.stack([label == k for k in range(0 if self.is_partial else 1, self.num_class)], dim=1)

    def _label_of(self, planes: Tensor) -> Tensor:
        """Label (N, H, W) int64 of interpolated `_class_planes`: the most probable class, or `IGNORE`."""
        best, classes = 1 - planes.sum(1), torch.zeros_like(planes[:, 0], dtype=torch.int64)
        for k, plane in enumerate(planes.unbind(1), 1):  # argmax over a short axis is much slower on a CPU
            classes = torch.where(plane > best, k, classes)
            best = torch.maximum(plane, best)
        return torch.where(classes == 0, IGNORE, classes - 1) if self.is_partial else classes

    def _change_intensity(self, image: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        """Image (N, C, H, W) with random blur, noise, gamma, contrast and brightness."""

        def draw(limit: float) -> Tensor:
            values = torch.tensor([rng.uniform(-limit, limit) for rng in rngs]).view(-1, 1, 1, 1)
            return values.to(image, non_blocking=True)

        if self.blur:
            image = _blurred(image, draw(self.blur).abs(), math.ceil(3 * self.blur))
        if self.noise:
            seeds = [int(rng.integers(2**63)) for rng in rngs]
            generators = [torch.Generator(image.device).manual_seed(seed) for seed in seeds]
            normal = [torch.randn(image.shape[1:], generator=g, device=image.device) for g in generators]
            image = image + draw(self.noise) * torch.stack(normal)
        if self.gamma:
            low, high = image.amin((2, 3), keepdim=True), image.amax((2, 3), keepdim=True)
            span = (high - low).clamp_min(1e-6)
            image = ((image - low) / span) ** torch.exp(draw(self.gamma)) * span + low
        return image * (1 + draw(self.contrast)) + draw(self.brightness)

    def _positions(self, image: Tensor, rngs: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
        """Where each pixel is sampled, flipped and turned, and its displacement: (y, x), (N, 2, H, W) [px].

        The displacement is that of zoom and rotation, too.
        """
        device = image.device
        scales = [self.elastic * (rng.random() < self.elastic_share) for rng in rngs]
        size = (2, self.elastic_grid, self.elastic_grid)
        normal = np.stack([rng.normal(0, scale, size) for rng, scale in zip(rngs, scales, strict=True)])
        nodes = torch.from_numpy(normal.astype(np.float32)).to(device, non_blocking=True)  # (y, x) [px]
        turns = self._turns(rngs).to(device, non_blocking=True)
        rows, columns = (_bicubic(self.elastic_grid, side).to(device, non_blocking=True) for side in self.crop)
        nodes = torch.einsum("nij,njab->niab", turns, nodes)  # cheaper than turning the whole field
        displacement = (rows @ nodes @ columns.T).clamp_(-self._largest_shift, self._largest_shift)
        y, x = (torch.arange(side, device=device) - (side - 1) / 2 for side in self.crop)  # from the centre

        def turned(matrices: Tensor) -> Tensor:
            return matrices[:, :, 0, None, None] * y[:, None] + matrices[:, :, 1, None, None] * x

        straight = turned(turns)
        if self.zoom > 1 or self.rotate:
            more = self._zooms(rngs).to(device, non_blocking=True) @ turns
            displacement = displacement + (turned(more) - straight)
        return straight, displacement

    def _zooms(self, rngs: Sequence[np.random.Generator]) -> Tensor:
        """Random rotations and zooms as matrices (N, 2, 2)."""
        drawn = np.array([rng.uniform(-1, 1, 2) for rng in rngs])
        size, angle = self.zoom ** drawn[:, 0], np.radians(self.rotate) * drawn[:, 1]
        cos, sin = size * np.cos(angle), size * np.sin(angle)
        matrices = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], axis=1)
        return torch.from_numpy(matrices.astype(np.float32))

    def _turns(self, rngs: Sequence[np.random.Generator]) -> Tensor:
        """Random flips and quarter turns as matrices (N, 2, 2) with entries 0, 1 and -1."""
        drawn = np.stack([rng.integers(0, (2, 2, 4)) for rng in rngs])
        signs, quarters = 1.0 - 2.0 * drawn[:, :2] * self.flip, drawn[:, 2] * self.turn
        if self.crop[0] != self.crop[1]:
            quarters = quarters * 2
        cos, sin = np.array([1, 0, -1, 0])[quarters % 4], np.array([0, 1, 0, -1])[quarters % 4]
        turns = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], axis=1)
        return torch.from_numpy((signs[:, :, None] * turns).astype(np.float32))


def _sample(planes: Tensor, positions: Tensor, mode: str = "bilinear") -> Tensor:
    """Planes (N, C, H, W) interpolated at positions (y, x) from their centre, (N, 2, H', W') [px]."""
    height, width = planes.shape[-2:]
    grid = torch.stack([positions[:, 1] * (2 / width), positions[:, 0] * (2 / height)], dim=-1)  # (x, y) in [-1, 1]
    return F.grid_sample(planes, grid, mode=mode, padding_mode="reflection", align_corners=False)


def _bicubic(num_node: int, size: int) -> Tensor:
    """Bicubic weights (size, num_node) of evenly spaced nodes, the outer ones at the edges, for each pixel."""
    one_hot = torch.eye(num_node)[None, None]
    return F.interpolate(one_hot, size=(size, num_node), mode="bicubic", align_corners=True)[0, 0]


def _blurred(image: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian filter of images (N, C, H, W), with a sigma (N, 1, 1, 1) [px] per image; reflected at the edges."""
    num, nch, height, width = image.shape
    radius = min(radius, height - 1, width - 1)
    x = torch.arange(-radius, radius + 1, device=image.device)
    kernel = torch.exp(-((x / sigma.clamp_min(1e-3)) ** 2) / 2)  # (N, 1, 1, 2 radius + 1)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(nch, dim=0)
    padded = F.pad(image, (radius,) * 4, mode="reflect").view(1, num * nch, height + 2 * radius, width + 2 * radius)
    rows = F.conv2d(padded, kernel, groups=num * nch)
    return F.conv2d(rows, kernel.transpose(2, 3), groups=num * nch).view(image.shape)
