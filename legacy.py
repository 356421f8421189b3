"""Checkpoints of pytorch-UNET in the layout of this program."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor


def rename_legacy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of pytorch-UNET's network under this network's names; `DataParallel` and `torch.compile` add a prefix.

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


def convert_legacy(saved: dict[str, dict]) -> dict[str, Any]:
    """Checkpoint of pytorch-UNET in the layout of this program; its norms are `bnorm` and `inorm`."""
    net = rename_legacy(saved["netG"])
    first = net["encoders.0.0.conv.weight"]
    norm = "bnorm" if "encoders.0.0.norm.running_mean" in net else "inorm"
    nch_in, nch_out, nch_ker = first.shape[1], net["fc.weight"].shape[0], first.shape[0]
    arch = {"nch_in": nch_in, "nch_out": nch_out, "nch_ker": nch_ker, "norm": norm, "pool": "avg", "num_level": 4}
    return {"net": net, "optim": saved["optimG"], "arch": arch, "config": {"optim": "adam"}, "whole": True}
