"""Export a checkpoint for other programs: ONNX, TorchScript, or a package of the BioImage Model Zoo."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
from config import Config
from dataset import DataInfo
from model import STRIDE, class_probability
from predictor import Predictor, load, predict_array
from utils import UserError, check_module, partial_of, say

OPSET = 18  # of ONNX
TOLERANCE = 1e-4  # largest difference of a probability between the export and the checkpoint
ENDINGS = {"onnx": (".onnx",), "torchscript": (".pt", ".torchscript"), "bioimageio": (".zip",)}
PACKAGES = {"onnx": ["onnx", "onnxscript", "onnxruntime"], "torchscript": [], "bioimageio": ["bioimageio.core"]}
MIN_SIZE = 4 * STRIDE  # [px] of an image of the package, whose sides are multiples of STRIDE


class Segmenter(nn.Module):
    """Normalisation, network and probability in one graph.

    `forward` takes raw grey values (N, C, H, W) as float32, of any height and width, and returns the probability
    (N, 1, H, W) of class 1, or (N, K, H, W) of K classes.
    """

    def __init__(self, net: nn.Module, info: DataInfo) -> None:
        super().__init__()
        self.net, self.by_image, self.two = net, info.normalize == "image", info.num_class == 2
        self.register_buffer("mean", torch.tensor(info.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(info.std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) grey values to (N, K, H, W) probabilities."""
        height, width = x.shape[2], x.shape[3]
        if self.by_image:
            x = x - x.mean((2, 3), keepdim=True)
            std = (x * x).mean((2, 3), keepdim=True).sqrt()
            x = x / torch.where(std > 0, std, torch.ones_like(std))
        else:
            x = (x - self.mean) / self.std
        x = _padded(_padded(x, 2), 3)
        probability = class_probability(self.net.on_grid(x))[:, :, :height, :width]
        return probability[:, 1:] if self.two else probability


def _padded(x: Tensor, axis: int) -> Tensor:
    """`pad_to_multiple` along one axis as a gather, which graphs of free size can hold."""
    size = x.shape[axis]
    goal = (size + STRIDE - 1) // STRIDE * STRIDE + (STRIDE if size <= STRIDE else 0)
    index = torch.arange(goal, device=x.device)
    index = torch.where(index < size, index, 2 * (size - 1) - index)
    return x.index_select(axis, index.clamp(0, size - 1))


def export(config: Config) -> int:
    """Export the checkpoint that the flags name: `main.py --mode export`.

    Raises
    ------
    UserError
        There is no checkpoint, a package is missing, the goal can't be written, or the export computes something else.
    """
    output, kind = Path(config.output), config.format
    if not config.output or output.suffix.lower() not in ENDINGS[kind]:
        raise UserError(
            f"--output {config.output}: --format {kind} writes {' or '.join(ENDINGS[kind])}: name such a file"
        )
    for package in PACKAGES[kind]:
        check_module(package, f"--format {kind}")
    path = checkpoint.find(Path(config.dir_checkpoint) / config.scope / config.name_data, config.epoch)
    predictor = load(path)
    partial = partial_of(output).with_suffix(output.suffix)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(action="ignore"):  # of exporters about themselves
            difference = WRITERS[kind](predictor, partial, path)
        if difference > TOLERANCE:
            raise UserError(f"{output}: differs from {path} by {difference:.1e}: nothing was written; please report it")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    say(f"{path} exported to {output}; it differs from the checkpoint by at most {difference:.1e}")
    return 0


def _difference(predictor: Predictor, run: Callable[[np.ndarray], np.ndarray]) -> float:
    """Largest difference of a probability between an export and the checkpoint, over images of odd sizes."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for height, width in ((64, 64), (97, 130), (33, 250)):
        image = rng.integers(0, 255, (1, predictor.info.nch_in, height, width)).astype(np.float32)
        expected = predict_array(predictor, _as_array(image[0]), tta=False).reshape(1, -1, height, width)
        worst = max(worst, float(np.abs(run(image) - expected).max()))
    return worst


def _as_array(image: np.ndarray) -> np.ndarray:
    """Image (C, H, W) as `predict_array` takes it."""
    return image[0] if len(image) == 1 else image.transpose(1, 2, 0)


def _example(predictor: Predictor, num: int = 1) -> Tensor:
    """Image that a graph is recorded with."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(num, predictor.info.nch_in, 5 * STRIDE, 6 * STRIDE, generator=generator) * 255


def to_onnx(predictor: Predictor, path: Path, _source: Path) -> float:
    """Write ONNX of free batch, height and width, run it, and return how much it differs."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    sizes = {0: "batch", 2: "height", 3: "width"}
    shapes = ({axis: torch.export.Dim(name, min=2 if axis else 1) for axis, name in sizes.items()},)
    torch.onnx.export(
        Segmenter(predictor.net, predictor.info).eval(),
        (_example(predictor, num=2),),
        path,
        dynamo=True,
        external_data=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["probability"],
        dynamic_shapes=shapes,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return _difference(predictor, lambda image: session.run(None, {"image": image})[0])


def to_torchscript(predictor: Predictor, path: Path, _source: Path) -> float:
    """Write TorchScript, run it, and return how much it differs."""
    traced = torch.jit.trace(Segmenter(predictor.net, predictor.info).eval(), _example(predictor), check_trace=False)
    torch.jit.save(traced, path)
    graph = torch.jit.load(path)

    def run(image: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return graph(torch.from_numpy(image)).numpy()

    return _difference(predictor, run)


def to_bioimageio(predictor: Predictor, path: Path, source: Path) -> float:
    """Write a package of the BioImage Model Zoo with TorchScript inside, test it, and return how much it differs."""
    from bioimageio.core import test_model
    from bioimageio.spec import save_bioimageio_package

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        difference = to_torchscript(predictor, weights, source)
        try:
            model = _describe(predictor, Path(folder), weights, source)
            save_bioimageio_package(model, output_path=path)
        except ValueError as error:  # pydantic's, also where it does not go with bioimageio.spec
            raise UserError(f"{path.name}: bioimageio.spec: {error}: pip install -r requirements-extra.txt") from error
        summary = test_model(path)
        if summary.status == "failed":
            raise UserError(f"{path.name}: bioimageio.core's test failed: {summary.format()[:300]}")
    return difference


def _describe(predictor: Predictor, folder: Path, weights: Path, source: Path) -> Any:
    """Description of the package, and the files it names."""
    from bioimageio.spec.model import v0_5 as spec

    info = predictor.info
    image = _example(predictor).numpy()
    probability = predict_array(predictor, _as_array(image[0]), tta=False).reshape(1, -1, *image.shape[2:])
    _draw_cover(folder / "cover.png", image[0, 0], probability[0, -1])
    (folder / "README.md").write_text(_readme(info, source), "utf-8")
    names = info.class_names[1:] if info.num_class == 2 else info.class_names
    torchscript = spec.TorchscriptWeightsDescr(
        source=weights, pytorch_version=spec.Version(torch.__version__.split("+")[0])
    )
    return spec.ModelDescr(
        name=f"U-Net for {' and '.join(map(_identifier, names))}"[:127],
        description="U-Net that segments microscope images, trained with pytorch-UNET's command line",
        authors=[spec.Author(name="unknown")],
        cite=[spec.CiteEntry(text="Ronneberger et al., U-Net, MICCAI 2015", doi="10.1007/978-3-319-24574-4_28")],
        license="MIT",
        documentation=spec.FileDescr(source=folder / "README.md"),
        covers=[spec.FileDescr(source=folder / "cover.png")],
        tags=["unet", "segmentation", "2d", "pytorch"],
        timestamp=datetime.now(UTC),
        inputs=[_input(folder, image)],
        outputs=[_output(folder, probability, names)],
        weights=spec.WeightsDescr(torchscript=torchscript),
    )


def _input(folder: Path, image: np.ndarray) -> Any:
    """Description of the input, with a test image."""
    from bioimageio.spec.model import v0_5 as spec

    np.save(folder / "input.npy", image)
    channels = spec.ChannelAxis(channel_names=[f"channel{number}" for number in range(image.shape[1])])
    size = spec.ParameterizedSize(min=MIN_SIZE, step=STRIDE)
    return spec.InputTensorDescr(
        id="image",
        axes=[spec.BatchAxis(), channels, *(spec.SpaceInputAxis(id=axis, size=size) for axis in "yx")],
        test_tensor=spec.FileDescr(source=folder / "input.npy"),
        preprocessing=[spec.EnsureDtypeDescr(kwargs=spec.EnsureDtypeKwargs(dtype="float32"))],
    )


def _output(folder: Path, probability: np.ndarray, names: list[str]) -> Any:
    """Description of the output, with what comes out of the test image."""
    from bioimageio.spec.model import v0_5 as spec

    np.save(folder / "output.npy", probability.astype(np.float32))
    channels = spec.ChannelAxis(channel_names=[_identifier(name) for name in names])
    sizes = {axis: spec.SizeReference(tensor_id="image", axis_id=axis) for axis in "yx"}
    space = [spec.SpaceOutputAxis(id=axis, size=size) for axis, size in sizes.items()]
    return spec.OutputTensorDescr(
        id="probability",
        axes=[spec.BatchAxis(), channels, *space],
        test_tensor=spec.FileDescr(source=folder / "output.npy"),
    )


def _identifier(name: str) -> str:
    """Class name as the specification allows it."""
    return "".join(letter if letter.isalnum() else "_" for letter in name) or "class"


def _draw_cover(path: Path, image: np.ndarray, probability: np.ndarray) -> None:
    """Picture of an input beside its output, twice as wide as high."""
    from PIL import Image

    both = np.concatenate([image, probability * 255], axis=1).clip(0, 255).astype(np.uint8)
    Image.fromarray(both).resize((512, 256)).save(path)


def _readme(info: DataInfo, source: Path) -> str:
    """What a user of the package must know."""
    classes = ", ".join(f"{name} ({value})" for name, value in zip(info.class_names, info.class_values, strict=True))
    lines = [
        "# U-Net",
        f"Exported from `{source.name}`. Classes: {classes}.",
        "Input: raw grey values; the graph normalises each image itself. Output: probability of the class.",
        "## Validation",
        "The package holds a test image and its output; see the training's own scores for its quality.",
    ]
    return "\n\n".join(lines) + "\n"


WRITERS: dict[str, Callable[[Predictor, Path, Path], float]] = {
    "onnx": to_onnx,
    "torchscript": to_torchscript,
    "bioimageio": to_bioimageio,
}
