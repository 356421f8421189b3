"""Loss functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model import class_probability
from samples import SampleFile
from utils import DivergenceError

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (logits, label, weight of each pixel) -> loss


def cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over the pixels of binary cross entropy (one channel) or cross entropy (more).

    Of logits (N, 1, H, W) of class 1, or (N, K, H, W), and class indices (N, H, W). The weight (N, H, W) is a factor of
    each pixel's loss, as in equation 1 of the paper; 0 where not annotated.
    """
    if logits.shape[1] == 1:
        losses = F.binary_cross_entropy_with_logits(logits[:, 0], label.to(logits.dtype), reduction="none")
    else:
        losses = F.cross_entropy(logits, label.long(), reduction="none")
    return (losses if weight is None else losses * weight).mean()


def dice_loss(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """One minus the soft Dice coefficient of the batch, mean over the classes; the background is one of them.

    Pixels of weight 0 don't count, all others count alike. Source: Milletari et al. 2016, arXiv 1606.04797.
    """
    probability = class_probability(logits)  # (N, K, H, W)
    truth = torch.stack([label == k for k in range(probability.shape[1])], dim=1).to(probability.dtype)
    if weight is not None:
        counted = (weight > 0)[:, None]
        probability, truth = probability * counted, truth * counted
    both, areas = (x.sum(dim=(0, 2, 3)) for x in (probability * truth, probability + truth))
    return 1 - ((2 * both + 1) / (areas + 1)).mean()  # + 1: no loss for a class absent from both


def _sum_of_both(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    return cross_entropy(logits, label, weight) + dice_loss(logits, label, weight)


LOSSES: dict[str, Loss] = {
    "bce": cross_entropy,
    "wbce": cross_entropy,  # with the weight map as weight
    "dice": dice_loss,
    "bce+dice": _sum_of_both,
}


def check_finite(loss: float, where: str, files: list[SampleFile]) -> None:
    """Raise `DivergenceError` if a loss is NaN or infinite."""
    if not math.isfinite(loss):
        names = ", ".join(dict.fromkeys(str(file.input) for file in files))
        raise DivergenceError(
            f"the loss is {loss} in {where}, with {names}: nothing was saved: lower --lr, or check these files"
        )
