"""Export a checkpoint for other programs: as ONNX or TorchScript, or in a package of the model zoo (bioimageio.py)."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
from config import Config
from description import DataInfo
from files import atomic_write, check_writable
from model import UNet, class_probability
from prediction.bioimageio import authors_of, check_credits, common_normalisation, make_package
from prediction.halo import forward_padded
from prediction.predictor import Member, Predictor, predict_array, predictor_of
from utils import FlagError, UserError, check_module, echo

OPSET = 18  # version of the ONNX operators
TOLERANCE = 1e-4  # largest allowed difference between the probabilities of export and checkpoint
TRIALS = [(1, 1), (2, 3), (15, 16), (16, 16), (17, 40), (97, 130), (384, 400)]  # [px] sizes of the images compared
Run = Callable[[np.ndarray], np.ndarray]  # grey values (1, C, H, W) -> probability (1, K, H, W) of an export


class Normalisation(nn.Module):
    """Normalise grey values (N, C, H, W) as in training: by image, or by the statistics of the training images.

    Accurate for all grey values of float32, also for 16-bit images far from 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, info: DataInfo) -> None:
        super().__init__()
        self.by_image = info.normalize == "image"
        self.register_buffer("mean", torch.tensor(info.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(info.std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if not self.by_image:
            return (x - self.mean) / self.std
        x = x - x[:, :, :1, :1]  # else the rounding of a mean far from 0 would exceed the details of the image
        x = x - _mean(x)
        x = x - _mean(x)  # removes the rounding error of the first mean
        std = _mean(x * x).sqrt()
        return x / torch.where(std > 0, std, torch.ones_like(std))


def _mean(x: Tensor) -> Tensor:
    """Mean of each channel; first along rows, since one sum of millions of float32 loses digits."""
    return x.mean(3, keepdim=True).mean(2, keepdim=True)


class Segmenter(nn.Module):
    """All of a predictor in one graph: grey values (N, C, H, W) of any size to probabilities (N, 1 or K, H, W)."""

    def __init__(self, predictor: Predictor, normalises: bool = True) -> None:
        super().__init__()
        self.nets = nn.ModuleList(member.net for member in predictor.members)
        infos = [member.info for member in predictor.members]
        self.steps = nn.ModuleList(Normalisation(info) if normalises else nn.Identity() for info in infos)
        self.num_channel = predictor.num_channel

    def forward(self, x: Tensor) -> Tensor:
        """Mean of the probabilities of class 1, or of each of K classes."""
        parts = []
        for net, normalise in zip(self.nets, self.steps, strict=True):
            assert isinstance(net, UNet)
            padded = _padded(_padded(normalise(x), 2, net.stride), 3, net.stride)
            probability = class_probability(forward_padded(net, padded))[:, :, : x.shape[2], : x.shape[3]]
            parts.append(probability[:, 1:] if self.num_channel == 1 else probability)
        return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)


def _padded(x: Tensor, axis: int, stride: int) -> Tensor:
    """`pad_to_multiple` along one axis without branches, so that a traced graph works for any size."""
    size = x.shape[axis]
    cells = (size + stride - 1) // stride
    small = 1 // cells  # 1 if the image has only one cell, which is repeated to make two; else 0
    index = torch.arange((cells + small) * stride, device=x.device)
    reflected = size - 1 - (1 - small) * (index - size + 1)
    return x.index_select(axis, torch.where(index < size, index, reflected))


def export(config: Config) -> int:
    """Export the checkpoint that the flags name: `main.py --mode export`.

    Raises
    ------
    UserError
        There is no checkpoint, a package is missing, or the output can't be written or differs from the checkpoint.
    """
    output, is_package = Path(config.output), config.format == "bioimageio"
    _check_flags(config)
    trained = checkpoint.load_trained(config.checkpoint_folders, config.epoch)
    _check_output(output, trained)
    predictor = predictor_of(trained, torch.device("cpu"), None, "", config.threshold)
    predictor = replace(predictor, members=tuple(map(_without_legacy, predictor.members)))
    names = ", ".join(map(str, trained))
    with warnings.catch_warnings(action="ignore"):  # the exporters' own
        content, run = FORMATS[config.format].make(predictor)
        difference = _difference(predictor, run)
        if difference > TOLERANCE:
            what = f"{output}: differs from {names} by {difference:.1e}"
            raise UserError(f"{what}: nothing was written; please report it")
        if is_package:
            content = make_package(predictor, content, list(trained), config)
    with atomic_write(output) as file:
        file.write(content)
    echo(f"{names} exported to {output}; it differs from the checkpoint by at most {difference:.1e}")
    if predictor.num_channel == 1:
        echo(f"threshold {predictor.threshold_text}")
    if is_package and not (authors_of(config) and config.license):
        echo("note: the model zoo takes a package only with author and licence: see --author and --license")
    return 0


def _without_legacy(member: Member) -> Member:
    """Member that scales images by no type, which a graph can't see, but as those of 8 bits."""
    legacy = member.info.normalize == "legacy"
    return replace(member, info=replace(member.info, normalize="data")) if legacy else member


def _check_flags(config: Config) -> None:
    """Refuse flags that don't go together, and a format whose packages are missing."""
    name, (endings, packages, _) = config.format, FORMATS[config.format]
    if Path(config.output).suffix.lower() not in endings:
        what = f"--output {config.output}" if config.output else "--mode export needs --output FILE"
        raise UserError(f"{what}: --format {name} writes {' or '.join(endings)}: name such a file, or another --format")
    for flag in ("author", "license"):
        if getattr(config, flag) and name != "bioimageio":
            raise FlagError(f"--{flag} {getattr(config, flag)}: --format {name} has no place for it: leave it out")
    for package in packages:
        check_module(package, f"--format {name}")
    if name == "bioimageio":
        check_credits(config)


def _check_output(output: Path, checkpoints: Iterable[Path]) -> None:
    """Refuse an output that is a checkpoint or can't be written, before minutes of work."""
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name a file")
    if output.exists() and any(output.samefile(path) for path in checkpoints):
        raise UserError(f"--output {output} is the checkpoint itself: choose another name")
    check_writable(output.parent)


def _difference(predictor: Predictor, run: Run) -> float:
    """Largest difference between the probabilities of an export and of the checkpoint."""
    worst = 0.0
    infos = [member.info for member in predictor.members]
    for image in _trials(next((info for info in infos if info.normalize == "data"), infos[0])):
        # Instance normalisation divides each feature map by its standard deviation. Of an image of one grey value that
        # is 0 but for rounding errors, which grow from layer to layer until the probability depends on the order of
        # additions alone: it differs between a checkpoint and itself on another processor, too.
        if predictor.is_tile_dependent and not np.ptp(image, axis=(2, 3)).any():
            continue
        expected = predict_array(predictor, np.moveaxis(image, 1, -1), tta=False)
        probability = run(image)
        worst = max(worst, float(np.abs(probability - expected.reshape(probability.shape)).max()))
    return worst


def _trials(info: DataInfo) -> Iterator[np.ndarray]:
    """Images (1, C, H, W) that test the normalisation and the padding of an export."""
    rng = np.random.default_rng(0)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (info.mean, info.std))
    for height, width in TRIALS:
        noise = rng.integers(0, 255, (1, info.nch_in, height, width)).astype(np.float32)
        if info.normalize == "image":
            yield noise
            yield noise * 5 + 60000  # 16 bits, far from 0
        else:  # images unlike the training images could overflow in both
            yield mean + (noise - 127) / 73 * std
    # grey values as in a real image: areas that differ, each with a little noise
    cells = rng.normal(size=(1, info.nch_in, 12, 13)).repeat(16, 2).repeat(16, 3)
    yield (mean + (cells + rng.normal(0, 0.2, cells.shape)) * std).astype(np.float32)
    yield np.zeros((1, info.nch_in, 40, 50), np.float32) + mean


def _example(predictor: Predictor, num: int = 1) -> Tensor:
    """Images to trace a graph with."""
    generator, stride = torch.Generator().manual_seed(0), predictor.stride
    return torch.rand(num, predictor.info.nch_in, 5 * stride, 6 * stride, generator=generator) * 255


def _metadata(predictor: Predictor) -> dict[str, str]:
    """What a file says beside its graph: the threshold of its output, with two classes."""
    return {"threshold": f"{predictor.threshold:g}"} if predictor.num_channel == 1 else {}


def to_onnx(predictor: Predictor) -> tuple[bytes, Run]:
    """ONNX for any batch, height and width, and what runs it."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    sizes = {0: "batch", 2: "height", 3: "width"}
    shapes = ({axis: torch.export.Dim(name, min=2 if axis else 1) for axis, name in sizes.items()},)
    program = torch.onnx.export(
        Segmenter(predictor).eval(),
        (_example(predictor, num=2),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["probability"],
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None  # with dynamo
    model = program.model_proto
    for key, value in _metadata(predictor).items():
        model.metadata_props.add(key=key, value=value)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda image: session.run(None, {"image": image})[0]


def to_torchscript(predictor: Predictor, normalises: bool = True) -> tuple[bytes, Run]:
    """TorchScript for any size, and what runs it; saved to memory, since torch would end the process on a full disk."""
    buffer = io.BytesIO()
    segmenter = Segmenter(predictor, normalises).eval()
    traced = torch.jit.trace(segmenter, _example(predictor), check_trace=False)
    torch.jit.save(traced, buffer, _extra_files=_metadata(predictor))
    graph = torch.jit.load(io.BytesIO(buffer.getvalue()))

    def run(image: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return graph(torch.from_numpy(image)).numpy()

    return buffer.getvalue(), run


def to_packaged_torchscript(predictor: Predictor) -> tuple[bytes, Run]:
    """TorchScript for a package, without the normalisation if that is one for all members."""
    info = common_normalisation(predictor)
    if info is None:
        return to_torchscript(predictor)
    (content, run), normalise = to_torchscript(predictor, normalises=False), Normalisation(info)
    return content, lambda image: run(normalise(torch.from_numpy(image)).numpy())


class Format(NamedTuple):
    """A format of exports."""

    endings: tuple[str, ...]
    packages: list[str]  # that must be installed
    make: Callable[[Predictor], tuple[bytes, Run]]


FORMATS = {
    "onnx": Format((".onnx",), ["onnx", "onnxscript", "onnxruntime"], to_onnx),
    "torchscript": Format((".pt", ".torchscript"), [], to_torchscript),
    "bioimageio": Format((".zip",), ["bioimageio.core"], to_packaged_torchscript),
}
