"""Layers of the network with PyTorch's values and parameters, whose gradients take less time on a CPU."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Decoder

CAPABILITY = torch.backends.cpu.get_cpu_capability()  # the vector instructions that PyTorch uses
LARGE = 2**18  # values of a feature map


def _uses_fast_gradient(value: Tensor) -> bool:
    """Whether this file computes the gradient: in eager training on a CPU, so that exports see PyTorch's layers."""
    trains = torch.is_grad_enabled() and value.requires_grad
    return trains and value.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_slow(x: Tensor, weight: Tensor) -> bool:
    """Whether products of matrices are a faster gradient of a weight than oneDNN's: large layers without AVX-512."""
    is_float32 = x.dtype == weight.dtype == torch.float32
    is_large = min(weight.shape[:2]) >= 32 and x.numel() >= LARGE
    return CAPABILITY == "AVX2" and is_float32 and is_large and x.is_contiguous(memory_format=torch.channels_last)


def speed_up(net: nn.Module) -> None:
    """Turn the layers of a network into those of this file: subclasses, so that parameters and copies are the same."""
    for module in net.modules():
        module.__class__ = FASTER.get((type(module), getattr(module, "kernel_size", None)), type(module))


class FastConv2d(nn.Conv2d):
    """3x3 convolution that keeps height and width."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, nch_in, H, W) to (N, nch_out, H, W)."""
        if _uses_fast_gradient(self.weight) and _is_slow(x, self.weight) and not torch.is_autocast_enabled("cpu"):
            return _Conv2d.apply(x, self.weight, self.bias)
        return super().forward(x)


class _Conv2d(torch.autograd.Function):
    """The weight's gradient is nine products of matrices, for which oneDNN takes up to four times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), grad, wants = ctx.saved_tensors, grads[0], ctx.needs_input_grad
        of_x, _, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [wants[0], False, False]
        )
        return of_x, _weight_gradient(x, grad), grad.sum((0, 2, 3)) if wants[2] else None


def _weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Gradient (nch_out, nch_in, 3, 3) of the weight from the image and the gradient of the output.

    Both get a border of zeros and become matrices with a row for each pixel: the neighbours of all pixels in one
    direction are then the same matrix from another row on.
    """
    width = x.shape[3] + 2
    image = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).flatten(0, 2)  # (N * (H + 2) * (W + 2), nch_in)
    of_pixel = F.pad(grad.permute(0, 2, 3, 1), (0, 0, 0, 2, 0, 2)).flatten(0, 2)[: -2 * width - 2].t()
    firsts = [row * width + column for row in range(3) for column in range(3)]
    products = [of_pixel @ image[first : first + of_pixel.shape[1]] for first in firsts]
    return torch.stack(products, dim=1).unflatten(1, (3, 3)).permute(0, 3, 1, 2)


class FastConvTranspose2d(nn.ConvTranspose2d):
    """2x2 transposed convolution of stride 2, which doubles height and width."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, nch_in, H, W) to (N, nch_out, 2 H, 2 W)."""
        if not _uses_fast_gradient(self.weight):
            return super().forward(x, output_size)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        return _UpConv2d.apply(*(value.to(dtype) for value in (x, self.weight, cast(Tensor, self.bias))))


class _UpConv2d(torch.autograd.Function):
    """The bias' gradient is a sum, for which oneDNN takes four times as long as for the other gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv_transpose2d(x, weight, bias, stride=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), grad = ctx.saved_tensors, grads[0]
        slow = _is_slow(x, weight)
        wanted = [ctx.needs_input_grad[0], not slow, False]
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1, wanted
        )
        if slow:
            # a row for each pixel of the image: (N * H * W, nch_in) and (N * H * W, 2 * 2 * nch_out)
            pixels, cells = (value.permute(0, 2, 3, 1) for value in (x, grad))
            cells = cells.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3).flatten(0, 2)
            of_weight = (pixels.flatten(0, 2).t() @ cells).unflatten(1, (2, 2, -1)).permute(0, 3, 1, 2)
        return of_x, of_weight, grad.sum((0, 2, 3))


class FastDecoder(Decoder):
    """Decoder whose concatenation has dense gradients."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(N, nch, H, W) and the skip (N, nch, 2 H, 2 W) to (N, nch_out, 2 H, 2 W)."""
        x = self.up(x)
        return self.convs(_Concat.apply(skip, x) if _uses_fast_gradient(x) else torch.cat([skip, x], dim=1))


class _Concat(torch.autograd.Function):
    """The gradients are dense; those of `torch.cat` are views, with which an addition takes eight times as long."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.sizes = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Gradient of each part, in the memory format of that of the whole."""
        channels_last = grads[0].is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if channels_last else torch.contiguous_format
        return tuple(part.contiguous(memory_format=order) for part in grads[0].split(ctx.sizes, dim=1))


FASTER: dict[tuple[type[nn.Module], tuple[int, int] | None], type[nn.Module]] = {  # by class and size of the kernel
    (nn.Conv2d, (3, 3)): FastConv2d,
    (nn.ConvTranspose2d, (2, 2)): FastConvTranspose2d,
    (Decoder, None): FastDecoder,
}
