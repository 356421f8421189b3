"""Time the network alone: forward in evaluation, and a training step, compared with the original.

    python benchmarks/bench_step.py            # 16, 32 and 64 channels, 256 and 512 px, both norms: about 15 minutes
    python benchmarks/bench_step.py --quick    # 16 channels, 256 px: under a minute

Ours is what the program runs: channels-last; in evaluation float32 with the normalisation folded (as test and predict
do), or in bfloat16 (as validation does); in training bfloat16 if supported, and fused AdamW. The original
is the same network in NCHW, float32, eager, with Adam. MONAI's BasicUNet of the nearest size is timed too if
monai is installed. The networks are timed in turn. One JSON line: medians over `--repeats`, and the ratio of the
original's time to that of each network: median, minimum and maximum over the turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import UNet
from prediction.predictor import fold_norm
from training.optim import OPTIMS
from utils import memory_format, pick_device, pick_precision

Timed = Callable[[], None]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gpu_ids", default="-1")
    parser.add_argument("--norms", nargs="*", default=["bnorm", "inorm"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = pick_device(args.gpu_ids)
    widths, sizes, norms = ((16,), (256,), ("bnorm",)) if args.quick else ((16, 32, 64), (256, 512), args.norms)
    rows = [
        measure(nch_ker, size, norm, args.repeats, device) for nch_ker in widths for size in sizes for norm in norms
    ]
    facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    print(json.dumps(facts | {"device": device_name, "rows": rows}))


def measure(nch_ker: int, size: int, norm: str, repeats: int, device: torch.device) -> dict:
    """Seconds per image of each network, timed in turn."""
    batch_size = 4 if nch_ker * size <= 16 * 256 or device.type == "cuda" else 1
    image = torch.randn(batch_size, 1, size, size, device=device)
    label = (torch.rand(batch_size, 1, size, size, device=device) > 0.5).float()
    precision = pick_precision("auto", device)
    nets = {"ours": UNet(1, 1, nch_ker, norm), "original": UNet(1, 1, nch_ker, norm)}
    if (monai := basic_unet(nch_ker)) is not None:
        nets["monai"] = monai
    nets = {name: net.to(device) for name, net in nets.items()}
    nets["ours"].to(memory_format=memory_format(norm, device, precision))
    row = {"nch_ker": nch_ker, "size": size, "norm": norm, "batch": batch_size}
    row["gflop_forward"] = gflop(nets["original"], image[:1])
    folded = fold_norm(nets["ours"]).to(memory_format=memory_format(norm, device, None))
    forwards = {name: forward(net, image, None) for name, net in (nets | {"ours": folded}).items()}
    forwards["ours_16bit"] = forward(fold_norm(nets["ours"]), image, precision)
    adam = {name: torch.optim.Adam(net.parameters(), 1e-4) for name, net in nets.items()}
    adam["ours"] = OPTIMS["adamw"](nets["ours"].parameters(), 1e-4, 0.9)
    types = {"ours": precision}
    steps = {name: step(net, adam[name], image, label, types.get(name)) for name, net in nets.items()}
    for phase, sides in (("forward", forwards), ("step", steps)):
        seconds = in_turn(sides, repeats, device)
        row |= {f"{phase}_{name}_s": round(median(values) / batch_size, 5) for name, values in seconds.items()}
        original = seconds.pop("original")
        for name, values in seconds.items():
            ratios = sorted(theirs / own for theirs, own in zip(original, values, strict=True))
            row[f"{phase}_ratio_{name}"] = [round(ratio, 2) for ratio in (median(ratios), ratios[0], ratios[-1])]
    row["gflop_per_s"] = round(row["gflop_forward"] / row["forward_ours_s"], 1)
    row["of_ceiling"] = round(row["gflop_per_s"] / ceiling(repeats, device), 2)
    return row


def basic_unet(nch_ker: int) -> nn.Module | None:
    """MONAI's network with the same widths, if it is installed."""
    try:
        from monai.networks.nets import BasicUNet
    except ImportError:
        return None
    widths = tuple(nch_ker * 2**level for level in range(5))
    return BasicUNet(spatial_dims=2, in_channels=1, out_channels=1, features=(*widths, nch_ker))


def forward(net: nn.Module, image: Tensor, precision: torch.dtype | None) -> Timed:
    """One forward pass in evaluation."""

    def run() -> None:
        net.eval()
        with torch.no_grad(), torch.autocast(image.device.type, precision, enabled=precision is not None):
            net(image)

    return run


def step(
    net: nn.Module, optimizer: torch.optim.Optimizer, image: Tensor, label: Tensor, precision: torch.dtype | None
) -> Timed:
    """One training step."""

    def run() -> None:
        net.train()
        with torch.autocast(image.device.type, precision, enabled=precision is not None):
            logits = net(image)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits.float(), label).backward()
        optimizer.step()

    return run


def in_turn(sides: dict[str, Timed], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each network's runs, after one run to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 1:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def gflop(net: nn.Module, image: Tensor) -> float:
    """Arithmetic of one image's forward pass [GFLOP]."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image)
    return round(counter.get_total_flops() / 1e9, 2)


def ceiling(repeats: int, device: torch.device) -> float:
    """GFLOP/s of a single large 3x3 convolution in float32."""
    conv = nn.Conv2d(256, 256, 3, padding=1).to(device, memory_format=torch.channels_last)
    image = torch.randn(1, 256, 128, 128, device=device).to(memory_format=torch.channels_last)
    seconds = median(in_turn({"conv": forward(conv, image, None)}, repeats, device)["conv"])
    return 2 * 9 * 256 * 256 * 128 * 128 / 1e9 / seconds


if __name__ == "__main__":
    main()
