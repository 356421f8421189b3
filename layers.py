"""Layers with PyTorch's values and parameters, whose gradients take less time on a CPU."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _has_own_gradient(value: Tensor) -> bool:
    """Whether this file computes the gradient: in eager training on a CPU, so that exports see PyTorch's layers."""
    trains = torch.is_grad_enabled() and value.requires_grad
    return trains and value.device.type == "cpu" and not torch.compiler.is_compiling()


class UpConv2d(nn.ConvTranspose2d):
    """2x2 transposed convolution of stride 2, which doubles height and width."""

    def __init__(self, nch_in: int, nch_out: int) -> None:
        super().__init__(nch_in, nch_out, kernel_size=2, stride=2)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, nch_in, H, W) to (N, nch_out, 2 H, 2 W)."""
        if not _has_own_gradient(self.weight):
            return super().forward(x, output_size)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        return _UpConv2d.apply(*(value.to(dtype) for value in (x, self.weight, cast(Tensor, self.bias))))


class _UpConv2d(torch.autograd.Function):
    """The bias' gradient is a sum, for which oneDNN takes four times as long as for the other gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(N, nch_in, H, W) to (N, nch_out, 2 H, 2 W)."""
        ctx.save_for_backward(x, weight)
        return F.conv_transpose2d(x, weight, bias, stride=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the image, the weight and the bias; None for an image that needs none."""
        x, weight = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:2], False]
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            grads[0], x, weight, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1, wanted
        )
        return of_x, of_weight, grads[0].sum((0, 2, 3))


def concat(skip: Tensor, x: Tensor) -> Tensor:
    """Two tensors (N, C, H, W), one behind the other along C."""
    if not _has_own_gradient(x):
        return torch.cat([skip, x], dim=1)
    return _Concat.apply(skip, x)


class _Concat(torch.autograd.Function):
    """The gradients are dense; those of `torch.cat` are views, with which an addition takes eight times as long."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        """Tensors (N, C, H, W), one behind the other along C."""
        ctx.sizes = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Gradient of each part, in the memory format of that of the whole."""
        channels_last = grads[0].is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if channels_last else torch.contiguous_format
        return tuple(part.contiguous(memory_format=order) for part in grads[0].split(ctx.sizes, dim=1))
