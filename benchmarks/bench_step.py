"""Time the network alone: forward in evaluation, and a training step, compared with others in the same arithmetic.

    python benchmarks/bench_step.py            # 16, 32 and 64 channels, 256 and 512 px, both norms: about 30 minutes
    python benchmarks/bench_step.py --quick    # 16 channels, 256 px: about a minute

Each network is timed in float32 and, if the device has instructions for it, under the same bfloat16 autocast. Ours is
what the program runs: the memory format of `to_device`; in evaluation the normalisation folded; in training fused
AdamW. The original is the same network with PyTorch's own layers in NCHW, eager, with Adam. With `bnorm` the networks
of others are timed too, in NCHW with Adam: MONAI's BasicUNet, nnU-Net's PlainConvUNet (dynamic-network-architectures),
the Unet of segmentation-models-pytorch, as far as they are installed, and milesial's Pytorch-UNet, written here from
its description. Their sizes are the nearest to ours: see `gflop` and `parameters`. The networks are timed in turn. One
JSON line: medians over `--repeats`, and the ratio of each network's time to ours: median, minimum and maximum over the
turns. Below 1 ours is slower. `--clock cpu` takes the processor time of the process, for a machine with other load.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from device import pick_device, pick_precision, to_device
from model import UNet
from prediction.predictor import fold_norm
from training.cpu_layers import speed_up
from training.optim import OPTIMS

Timed = Callable[[], None]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gpu_ids", default="-1")
    parser.add_argument("--nch_ker", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512], help="[px]")
    parser.add_argument("--norms", nargs="*", default=["bnorm", "inorm"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    device = pick_device(args.gpu_ids)
    widths, sizes, norms = ((16,), (256,), ("bnorm",)) if args.quick else (args.nch_ker, args.sizes, args.norms)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    timer = Timer(args.repeats, CLOCKS[args.clock], device)
    precisions = {"float32": None} | ({"bf16": torch.bfloat16} if pick_precision("auto", device) else {})
    facts |= {"device": device_name, "clock": args.clock}
    facts["ceiling_gflop_per_s"] = {name: ceiling(timer, precision) for name, precision in precisions.items()}
    print(json.dumps(facts), flush=True)
    for nch_ker, size, norm in itertools.product(widths, sizes, norms):
        print(json.dumps(measure(nch_ker, size, norm, timer, precisions)), flush=True)


@dataclass(frozen=True)
class Timer:
    """Times functions in turn, after one run to warm up."""

    repeats: int
    clock: Callable[[], float]
    device: torch.device

    def in_turn(self, sides: dict[str, Timed]) -> dict[str, list[float]]:
        """Seconds of each function's runs."""
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(self.repeats + 1):
            for name, run in sides.items():
                start = self.clock()
                run()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if number >= 1:
                    seconds[name].append(self.clock() - start)
        return seconds


def measure(nch_ker: int, size: int, norm: str, timer: Timer, precisions: dict[str, torch.dtype | None]) -> dict:
    """Times of each network and ratios to ours, in each phase and arithmetic."""
    device = timer.device
    batch_size = 4 if nch_ker * size <= 16 * 256 or device.type == "cuda" else 1
    image = torch.randn(batch_size, 1, size, size, device=device)
    label = (torch.rand(batch_size, 1, size, size, device=device) > 0.5).float()
    nets: dict[str, nn.Module] = {"original": UNet(1, 1, nch_ker, norm)}
    if norm == "bnorm":
        nets |= others(nch_ker)
    nets = {name: net.to(device) for name, net in nets.items()}
    row = {"nch_ker": nch_ker, "size": size, "norm": norm, "batch": batch_size}
    row["gflop"] = {name: gflop(net, image[:1]) for name, net in nets.items()}
    row["parameters"] = {name: sum(weight.numel() for weight in net.parameters()) for name, net in nets.items()}
    for name, precision in precisions.items():
        ours = to_device(UNet(1, 1, nch_ker, norm), norm, device, precision)
        folded = to_device(fold_norm(ours), norm, device, precision)
        if device.type == "cpu":
            speed_up(ours)
        row[f"forward {name}"] = compare(
            timer, {k: forward(v, image, precision) for k, v in {"ours": folded, **nets}.items()}
        )
        optimizers = {k: torch.optim.Adam(v.parameters(), 1e-4) for k, v in nets.items()}
        optimizers["ours"] = OPTIMS["adamw"](ours.parameters(), 1e-4, 0.9)
        nets_now = {"ours": ours, **nets}
        steps = {k: step(v, optimizers[k], image, label, precision) for k, v in nets_now.items()}
        row[f"step {name}"] = compare(timer, steps)
    return row


def compare(timer: Timer, sides: dict[str, Timed]) -> dict[str, list[float]]:
    """Milliseconds of each function, and its ratio to ours: median, minimum and maximum."""
    seconds = timer.in_turn(sides)
    found = {}
    for name, values in seconds.items():
        ratios = sorted(theirs / own for theirs, own in zip(values, seconds["ours"], strict=True))
        found[name] = [round(number, 2) for number in (1e3 * median(values), median(ratios), ratios[0], ratios[-1])]
    return found


def others(nch_ker: int) -> dict[str, nn.Module]:
    """Networks of others with the same widths, or the nearest; on stderr those that are not installed."""
    nets: dict[str, nn.Module] = {"milesial": Milesial(nch_ker)}
    for name, make in {"monai": basic_unet, "nnunet": plain_conv_unet, "smp": smp_unet}.items():
        try:
            nets[name] = make([nch_ker * 2**level for level in range(5)])
        except ImportError as error:
            print(f"{name}: absent ({error})", file=sys.stderr)
    return nets


def basic_unet(widths: list[int]) -> nn.Module:
    """MONAI's network: instance normalisation, leaky ReLU."""
    from monai.networks.nets import BasicUNet

    return BasicUNet(spatial_dims=2, in_channels=1, out_channels=1, features=(*widths, widths[0]))


def plain_conv_unet(widths: list[int]) -> nn.Module:
    """nnU-Net's network: strided convolutions, instance normalisation, leaky ReLU."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    shape = {"n_stages": 5, "features_per_stage": widths, "conv_op": nn.Conv2d, "kernel_sizes": 3}
    blocks = {"strides": [1, 2, 2, 2, 2], "n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2, "conv_bias": True}
    norm = {"norm_op": nn.InstanceNorm2d, "norm_op_kwargs": {"eps": 1e-5, "affine": True}}
    relu = {"nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}}
    return PlainConvUNet(input_channels=1, num_classes=1, **shape, **blocks, **norm, **relu)


def smp_unet(widths: list[int]) -> nn.Module:
    """The Unet of segmentation-models-pytorch: ResNet as encoder, whose first convolution halves the image."""
    import segmentation_models_pytorch as smp

    encoder = "resnet34" if widths[0] >= 64 else "resnet18"
    return smp.Unet(encoder, encoder_weights=None, in_channels=1, classes=1)


class Milesial(nn.Module):
    """Pytorch-UNet of milesial, after its README: twice convolution, batch normalisation and ReLU; max pooling."""

    def __init__(self, nch_ker: int) -> None:
        super().__init__()
        widths = [nch_ker * 2**level for level in range(5)]
        self.encoders = nn.ModuleList(double_conv(i, o) for i, o in pairwise([1, *widths]))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in pairwise(widths[::-1]))
        self.decoders = nn.ModuleList(double_conv(i, o) for i, o in pairwise(widths[::-1]))
        self.last = nn.Conv2d(nch_ker, 1, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) to logits (N, 1, H, W)."""
        features = [self.encoders[0](x)]
        for encoder in self.encoders[1:]:
            features.append(encoder(F.max_pool2d(features[-1], 2)))
        x = features.pop()
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = decoder(torch.cat([features.pop(), up(x)], dim=1))
        return self.last(x)


def double_conv(nch_in: int, nch_out: int) -> nn.Module:
    """Twice 3x3 convolution, batch normalisation, ReLU."""
    layers: list[nn.Module] = []
    for nch in (nch_in, nch_out):
        conv = nn.Conv2d(nch, nch_out, kernel_size=3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(nch_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


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


def gflop(net: nn.Module, image: Tensor) -> float:
    """Arithmetic of one image's forward pass [GFLOP]."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image)
    return round(counter.get_total_flops() / 1e9, 2)


def ceiling(timer: Timer, precision: torch.dtype | None) -> float:
    """GFLOP/s of a single large 3x3 convolution."""
    conv = nn.Conv2d(256, 256, 3, padding=1).to(timer.device, memory_format=torch.channels_last)
    image = torch.randn(1, 256, 128, 128, device=timer.device).to(memory_format=torch.channels_last)
    seconds = median(timer.in_turn({"conv": forward(conv, image, precision)})["conv"])
    return round(2 * 9 * 256 * 256 * 128 * 128 / 1e9 / seconds, 1)


if __name__ == "__main__":
    main()
