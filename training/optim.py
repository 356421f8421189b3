"""Optimisers, the learning rate over a run, and the moving average of the weights."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model import UNet


def _eager(optimizer: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Optimiser without the wrappers that keep PyTorch's compiler off its methods, and import that for a second."""
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    methods["step"] = torch.no_grad()(inspect.unwrap(optimizer.step))
    return type(optimizer.__name__, (optimizer,), methods)


OPTIMS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda params, lr, beta1: _eager(torch.optim.Adam)(params, lr, betas=(beta1, 0.999), fused=True),
    "adamw": lambda params, lr, beta1: _eager(torch.optim.AdamW)(params, lr, betas=(beta1, 0.999), fused=True),
    "sgd": lambda params, lr, beta1: _eager(torch.optim.SGD)(params, lr, momentum=beta1, fused=True),
    "rmsprop": lambda params, lr, beta1: _eager(torch.optim.RMSprop)(params, lr, momentum=beta1),
}


SCHEDULES: dict[str, Callable[[float], float]] = {  # factor of the rate, given the progress in [0, 1]
    "constant": lambda _: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),  # Loshchilov and Hutter, arXiv 1608.03983
}


def learning_rate(progress: float, lr: float, schedule: str, warmup: float) -> float:
    """Learning rate of one step, given the fraction of the run that is done: resuming changes nothing.

    In the first part of the run, `warmup`, it rises linearly to `lr`.

    >>> [round(learning_rate(step / 10, 1.0, "cosine", warmup=0.2), 3) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return lr * progress / warmup
    return lr * SCHEDULES[schedule]((progress - warmup) / max(1 - warmup, 1e-9))


class MovingAverage:
    """Exponential moving average of the weights and statistics of a network, which it begins with.

    `decay` is the weight of the old average at each step. It is smaller in the first steps, as in TensorFlow's
    ExponentialMovingAverage, so that the initial weights are soon forgotten.
    Source: Polyak and Juditsky 1992, doi 10.1137/0330046.
    """

    def __init__(self, net: UNet, decay: float) -> None:
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay, self.num_step = decay, 0

    def update(self, net: nn.Module) -> None:
        """Update the average with the weights after a step."""
        self.num_step += 1
        new = 1 - min(self.decay, (1 + self.num_step) / (10 + self.num_step))
        pairs = list(zip(self.net.state_dict().values(), net.state_dict().values(), strict=True))
        moving = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([average for average, _ in moving], [value for _, value in moving], new)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)  # BatchNorm's count of batches

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"net": self.net.state_dict(), "num_step": self.num_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.net.load_state_dict(state["net"])
        self.num_step = state["num_step"]


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's moments and last learning rate; its other settings stay as the flags of this run."""
    flags = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    # before loading, since `fused` decides on which device the count of steps lies
    groups = [group | values for group, values in zip(state["param_groups"], flags, strict=True)]
    optimizer.load_state_dict(state | {"param_groups": groups})
    for weight, moments in optimizer.state.items():
        if any(value.shape not in ((), weight.shape) for value in moments.values() if isinstance(value, Tensor)):
            raise ValueError(f"moments of other weights than {tuple(weight.shape)}")
    layouts = {tuple((name, type(value)) for name, value in moments.items()) for moments in optimizer.state.values()}
    if len(layouts) > 1:
        raise ValueError("moments that some weights lack")
