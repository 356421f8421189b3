"""Train a network of MONAI on the ISBI 2012 stack in the way of its 2D tutorial, and write its validation sections.

    python benchmarks/monai_recipe.py --variant tutorial --minutes 1 --output probability.npy

The tutorial is `2d_segmentation/torch/unet_training_dict.py` of github.com/Project-MONAI/tutorials; the variants change
what they name. The minutes are those of the processor, imports included, prediction not. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

if TYPE_CHECKING:
    import torch

NUM_TRAIN, NUM_VAL = 21, 3  # the protocol of quality.py
WIDTHS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Variant:
    """What differs between the recipes; the defaults are the tutorial's."""

    net: str = "UNet"
    loss: str = "DiceLoss"
    crop: int = 96  # [px], also of the windows of the prediction
    num_image: int = 2  # in a batch, four crops of each
    precision: str = "float32"
    rate: float = 1e-3  # of Adam
    anneal: bool = False  # cosine to 0 at the end of the budget, instead of a constant rate
    overlap: float = 0.25  # of windows; from 0.5 on, weighted by a Gaussian
    num_view: int = 1  # 8: mean over flips and turns


TUTORIAL = Variant()
DICE_CE = replace(TUTORIAL, loss="DiceCELoss")
CROPS_256 = replace(DICE_CE, crop=256, num_image=1)
VIEWS = {"overlap": 0.5, "num_view": 8}
BF16 = VIEWS | {"precision": "bfloat16"}
COSINE = BF16 | {"anneal": True, "rate": 4e-3}
VARIANTS = {
    "tutorial": TUTORIAL,
    "dice+ce": DICE_CE,
    "basic": replace(DICE_CE, net="BasicUNet"),
    "256": CROPS_256,
    "basic 256": replace(CROPS_256, net="BasicUNet"),
    "256 cosine": replace(CROPS_256, anneal=True),
    "256 cosine views": replace(CROPS_256, **VIEWS, anneal=True),
    "256 cosine views bf16": replace(CROPS_256, **BF16, anneal=True),
    "256 views bf16": replace(CROPS_256, **BF16),
    "256 cosine views bf16 4e-3": replace(CROPS_256, **COSINE),
    "dice+ce views bf16": replace(DICE_CE, **BF16),
    "dice+ce cosine views bf16 4e-3": replace(DICE_CE, **COSINE),
}


def main() -> None:
    """Train, predict, and print what was done."""
    import monai
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, default="tutorial")
    parser.add_argument("--minutes", type=float, default=1, help="processor time of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("../shared/isbi2012"), help="folder of the stacks")
    parser.add_argument("--output", type=Path, required=True, help=".npy of P(cell) of the validation sections")
    args = parser.parse_args()
    variant = VARIANTS[args.variant]
    monai.utils.set_determinism(args.seed)
    images, labels = (
        tifffile.imread(args.data / f"train-{name}.tif")[: NUM_TRAIN + NUM_VAL, None].astype(np.float32)
        for name in ("volume", "labels")
    )
    samples = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    net = make_net(variant.net)
    facts = {"steps": train(net, variant, samples[:NUM_TRAIN], args.minutes), "cpu_seconds": time.process_time()}
    scale = monai.transforms.ScaleIntensity()
    sections = torch.stack([torch.as_tensor(scale(sample["image"])) for sample in samples[NUM_TRAIN:]])
    np.save(args.output, predict(net, variant, sections))
    facts |= {"monai": monai.__version__, "parameters": sum(weight.numel() for weight in net.parameters())}
    print(json.dumps(facts))


def make_net(name: str) -> torch.nn.Module:
    """Network of the width of `--nch_ker 16`."""
    from monai.networks.nets import BasicUNet, UNet

    if name == "BasicUNet":
        return BasicUNet(spatial_dims=2, in_channels=1, out_channels=1, features=(*WIDTHS, WIDTHS[0]))
    shape = {"channels": WIDTHS, "strides": (2, 2, 2, 2), "num_res_units": 2}
    return UNet(spatial_dims=2, in_channels=1, out_channels=1, **shape)


def make_loader(samples: list[dict[str, np.ndarray]], variant: Variant) -> Any:
    """Loader of random crops, half of them centred on a cell, turned; what is not random is kept in memory."""
    from monai.data import CacheDataset, DataLoader
    from monai.transforms import Compose, RandCropByPosNegLabeld, RandRotate90d, ScaleIntensityd

    keys = ["image", "label"]
    window = {"spatial_size": [variant.crop] * 2, "pos": 1, "neg": 1, "num_samples": 4}
    crop = RandCropByPosNegLabeld(keys, label_key="label", **window)
    steps = Compose([ScaleIntensityd(keys), crop, RandRotate90d(keys, prob=0.5, spatial_axes=(0, 1))])
    dataset = CacheDataset(samples, steps, num_workers=0, progress=False)
    return DataLoader(dataset, batch_size=variant.num_image, shuffle=True)


def train(net: torch.nn.Module, variant: Variant, samples: list[dict[str, np.ndarray]], minutes: float) -> int:
    """Train until the process has used its minutes, and return the number of steps."""
    import monai
    import torch

    loss = getattr(monai.losses, variant.loss)(sigmoid=True)
    optimizer = torch.optim.Adam(net.parameters(), variant.rate)
    loader, num_step = make_loader(samples, variant), 0
    while True:
        for batch in loader:
            done = time.process_time() / 60 / minutes
            if done >= 1:
                return num_step
            if variant.anneal:
                optimizer.param_groups[0]["lr"] = variant.rate * (1 + math.cos(math.pi * done)) / 2
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=variant.precision == "bfloat16"):
                logits = net(batch["image"].as_tensor())
            loss(logits.float(), batch["label"].as_tensor()).backward()
            optimizer.step()
            num_step += 1


def predict(net: torch.nn.Module, variant: Variant, images: torch.Tensor) -> np.ndarray:
    """P(cell) (N, H, W) of images (N, 1, H, W)."""
    import torch
    from monai.inferers import sliding_window_inference

    net.eval()
    views, mode = [], "gaussian" if variant.overlap >= 0.5 else "constant"
    with torch.no_grad():
        for view in range(variant.num_view):  # the first is the image itself
            turned = torch.rot90(images.flip(-1) if view >= 4 else images, view % 4, (-2, -1))
            logits = sliding_window_inference(turned, [variant.crop] * 2, 4, net, overlap=variant.overlap, mode=mode)
            back = torch.rot90(logits.sigmoid(), -(view % 4), (-2, -1))
            views.append(back.flip(-1) if view >= 4 else back)
    return torch.stack(views).mean(0)[:, 0].numpy()


if __name__ == "__main__":
    main()
