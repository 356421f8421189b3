"""Learning from pixels that are not annotated: the network agrees with the moving average of its weights there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from config import Config
from dataset import Batch
from model import UNet, class_probability
from utils import FlagError

RAMP = 0.3  # fraction of the training in which the weight rises


def has_teacher(config: Config, *, is_partial: bool) -> bool:
    """Whether a teacher helps, where pixels may not be annotated; refuses one that there is not."""
    if not config.consistency:
        return False
    if not (is_partial and config.average):
        why = "the average of --average teaches" if is_partial else "all pixels are annotated"
        raise FlagError(f"{config.given('consistency')}: {why}: leave {'one' if is_partial else 'it'} out")
    return True


def ramped(weight: float, fraction: float) -> float:
    """Weight of the consistency after a fraction of the training: a teacher that knows nothing yet has none.

    Source: Laine and Aila 2017, arXiv 1610.02242.

    >>> [round(ramped(10, fraction), 2) for fraction in (0, 0.15, 0.3, 1)]
    [0.07, 2.87, 10.0, 10.0]
    """
    return weight * math.exp(-5 * max(1 - fraction / RAMP, 0) ** 2)


def consistency(logits: Tensor, batch: Batch, *, teacher: UNet, weight: float) -> Tensor:
    """Mean squared difference of the probabilities from those of a teacher, the moving average, times a weight.

    The teacher sees the batch before its intensities are changed, and normalises by its statistics, as the network
    does. Source: Tarvainen and Valpola 2017, arXiv 1703.01780.
    """
    with torch.no_grad(), _batch_statistics(teacher):
        taught = class_probability(teacher(batch["unchanged"]).float())
    return weight * (class_probability(logits) - taught).square().mean()


@contextmanager
def _batch_statistics(net: UNet) -> Iterator[None]:
    """Batch normalisation by the statistics of each batch, which leaves the running ones as they are."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = False, True
