"""Export a checkpoint for other programs: ONNX, TorchScript, or a package of the BioImage Model Zoo."""

from __future__ import annotations

import gc
import io
import keyword
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
import torch
from torch import Tensor, nn

import checkpoint
from config import Config
from description import DataInfo
from files import atomic_write, check_writable
from model import class_probability
from prediction.halo import forward_padded
from prediction.predictor import Member, Predictor, predict_array, predictor_of
from utils import FlagError, UserError, check_module, echo

if TYPE_CHECKING:
    from bioimageio.spec.model import v0_5 as spec

OPSET = 18  # version of the ONNX operators
TOLERANCE = 1e-4  # largest allowed difference between the probabilities of export and checkpoint
ENDINGS = {"onnx": (".onnx",), "torchscript": (".pt", ".torchscript"), "bioimageio": (".zip",)}
PACKAGES = {"onnx": ["onnx", "onnxscript", "onnxruntime"], "torchscript": [], "bioimageio": ["bioimageio.core"]}
TRIALS = [(1, 1), (2, 3), (15, 16), (16, 16), (17, 40), (97, 130), (384, 400)]  # [px] sizes of the images compared


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
    """Network and probability in one graph.

    `forward` takes normalised images (N, C, H, W) of any height and width, and returns the probability (N, 1, H, W) of
    class 1, or (N, K, H, W) of K classes.
    """

    def __init__(self, member: Member) -> None:
        super().__init__()
        self.net, self.two = member.net, member.info.num_class == 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) normalised values to (N, K, H, W) probabilities."""
        height, width = x.shape[2], x.shape[3]
        x = _padded(_padded(x, 2, self.net.stride), 3, self.net.stride)
        probability = class_probability(forward_padded(self.net, x))[:, :, :height, :width]
        return probability[:, 1:] if self.two else probability


class Ensemble(nn.Module):
    """Mean of the probabilities (N, K, H, W) of several graphs."""

    def __init__(self, graphs: list[nn.Module]) -> None:
        super().__init__()
        self.graphs = nn.ModuleList(graphs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, K, H, W) probabilities."""
        return torch.stack([graph(x) for graph in self.graphs]).mean(0)


def _padded(x: Tensor, axis: int, stride: int) -> Tensor:
    """`pad_to_multiple` along one axis without branches, so that a traced graph works for any size."""
    size = x.shape[axis]
    cells = (size + stride - 1) // stride
    small = 1 // cells  # 1 if the image has only one cell, which is repeated to make two; else 0
    index = torch.arange((cells + small) * stride, device=x.device)
    reflected = size - 1 - (1 - small) * (index - size + 1)
    return x.index_select(axis, torch.where(index < size, index, reflected))


@dataclass(frozen=True)
class Provenance:
    """Origin of an export, as given by the user.

    Attributes
    ----------
    checkpoints : list of Path
        Exported files.
    authors : list of str
        Names; may be empty.
    license : str
        SPDX identifier, or empty.
    """

    checkpoints: list[Path]
    authors: list[str]
    license: str


def export(config: Config) -> int:
    """Export the checkpoint chosen by the flags: `main.py --mode export`.

    Raises
    ------
    UserError
        There is no checkpoint, a package is missing, or the output can't be written or differs from the checkpoint.
    """
    output, kind = Path(config.output), config.format
    _check_flags(config)
    trained = checkpoint.load_trained(config.checkpoint_folders, config.epoch)
    paths = list(trained)
    _check_output(output, paths)
    predictor = predictor_of(trained, torch.device("cpu"), None, "")
    predictor = replace(predictor, members=tuple(map(_without_legacy, predictor.members)))
    origin, named = Provenance(paths, _authors(config), config.license), ", ".join(map(str, paths))
    with warnings.catch_warnings(action="ignore"):  # the exporters' own
        content, difference = WRITERS[kind](predictor, origin)
    if difference > TOLERANCE:
        raise UserError(f"{output}: differs from {named} by {difference:.1e}: nothing was written; please report it")
    with atomic_write(output) as file:
        file.write(content)
    echo(f"{named} exported to {output}; it differs from the checkpoint by at most {difference:.1e}")
    if kind == "bioimageio" and not (origin.authors and origin.license):
        echo("note: the model zoo takes a package only with author and licence: see --author and --license")
    return 0


def _without_legacy(member: Member) -> Member:
    """Member that scales images by no type, which a graph can't see, but as those of 8 bits."""
    legacy = member.info.normalize == "legacy"
    return replace(member, info=replace(member.info, normalize="data")) if legacy else member


def _check_flags(config: Config) -> None:
    """Refuse flags that don't go together, and a format whose packages are missing."""
    kind = config.format
    if Path(config.output).suffix.lower() not in ENDINGS[kind]:
        what = f"--output {config.output}" if config.output else "--mode export needs --output FILE"
        raise UserError(
            f"{what}: --format {kind} writes {' or '.join(ENDINGS[kind])}: name such a file, or another --format"
        )
    for name in ("author", "license"):
        if getattr(config, name) and kind != "bioimageio":
            raise FlagError(f"--{name} {getattr(config, name)}: --format {kind} has no place for it: leave it out")
    for package in PACKAGES[kind]:
        check_module(package, f"--format {kind}")
    if kind == "bioimageio":
        _check_credits(_authors(config), config.license)


def _check_credits(authors: list[str], license: str) -> None:
    """Refuse names that the specification of the model zoo does not allow."""
    from bioimageio.spec.generic.v0_3 import Author, LicenseId

    try:
        for name in authors:
            Author(name=name)
    except ValueError as error:
        raise FlagError(f"--author {name}: no name in the model zoo: write it without '/'") from error
    try:
        license and LicenseId(license)
    except ValueError as error:
        raise FlagError(f"--license {license}: no SPDX identifier: take one from https://spdx.org/licenses") from error


def _authors(config: Config) -> list[str]:
    """Names in `--author`."""
    return [name.strip() for name in config.author.split(",") if name.strip()]


def _check_output(output: Path, paths: list[Path]) -> None:
    """Refuse an output that is a checkpoint or can't be written, before minutes of work."""
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name a file")
    if output.exists() and any(output.samefile(path) for path in paths):
        raise UserError(f"--output {output} is the checkpoint itself: choose another name")
    check_writable(output.parent)


def _difference(predictor: Predictor, run: Callable[[np.ndarray], np.ndarray]) -> float:
    """Largest difference between the probabilities of an export and of the checkpoint."""
    worst = 0.0
    infos = [member.info for member in predictor.members]
    for image in _trials(next((info for info in infos if info.normalize == "data"), infos[0])):
        # Instance normalisation divides each feature map by its standard deviation. Of an image of one grey value that
        # is 0 but for rounding errors, which grow from layer to layer until the probability depends on the order of
        # additions alone: it differs between a checkpoint and itself on another processor, too.
        if predictor.is_tile_dependent and not np.ptp(image, axis=(2, 3)).any():
            continue
        expected = predict_array(predictor, _as_array(image[0]), tta=False).reshape(1, -1, *image.shape[2:])
        worst = max(worst, float(np.abs(run(image) - expected).max()))
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


def _as_array(image: np.ndarray) -> np.ndarray:
    """Image (C, H, W) in the layout of `predict_array`."""
    return image[0] if len(image) == 1 else image.transpose(1, 2, 0)


def _example(predictor: Predictor, num: int = 1) -> Tensor:
    """Image to trace a graph with."""
    generator, stride = torch.Generator().manual_seed(0), predictor.stride
    return torch.rand(num, predictor.info.nch_in, 5 * stride, 6 * stride, generator=generator) * 255


def _graph(predictor: Predictor, *, normalised: bool = False) -> nn.Module:
    """Graph from raw grey values, or from normalised ones, to probabilities."""
    graphs: list[nn.Module] = [Segmenter(member) for member in predictor.members]
    if not normalised:
        infos = (member.info for member in predictor.members)
        graphs = [nn.Sequential(Normalisation(info), graph) for info, graph in zip(infos, graphs, strict=True)]
    return (graphs[0] if len(graphs) == 1 else Ensemble(graphs)).eval()


def to_onnx(predictor: Predictor, _: Provenance) -> tuple[bytes, float]:
    """ONNX for any batch, height and width, and how much its output differs."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    sizes = {0: "batch", 2: "height", 3: "width"}
    shapes = ({axis: torch.export.Dim(name, min=2 if axis else 1) for axis, name in sizes.items()},)
    program = torch.onnx.export(
        _graph(predictor),
        (_example(predictor, num=2),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["probability"],
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None  # with dynamo
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, _difference(predictor, lambda image: session.run(None, {"image": image})[0])


def to_torchscript(predictor: Predictor, _: Provenance) -> tuple[bytes, float]:
    """TorchScript for any size, and how much its output differs."""
    content = _traced(_graph(predictor), _example(predictor))
    return content, _difference(predictor, _runner(content))


def _traced(graph: nn.Module, example: Tensor) -> bytes:
    """TorchScript of a graph; saved to memory, since torch would end the process if the disk is full."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(graph, example, check_trace=False), buffer)
    return buffer.getvalue()


def _runner(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """Function that runs TorchScript."""
    graph = torch.jit.load(io.BytesIO(content))

    def run(image: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return graph(torch.from_numpy(image)).numpy()

    return run


def to_bioimageio(predictor: Predictor, provenance: Provenance) -> tuple[bytes, float]:
    """Tested package of the BioImage Model Zoo with TorchScript, and how much its output differs.

    The package declares the normalisation as preprocessing, and the halo of a tile, so that programs that work in tiles
    give the same result as for the whole image. If the members of an ensemble are normalised by different mean and
    standard deviation of training images, those are in the graph.
    """
    from bioimageio.spec import save_bioimageio_package

    info = _common_normalisation(predictor)
    content = _traced(_graph(predictor, normalised=info is not None), _example(predictor))
    graph, normalise = _runner(content), Normalisation(info) if info else nn.Identity()
    difference = _difference(predictor, lambda image: graph(normalise(torch.from_numpy(image)).numpy()))
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package.zip"
        (Path(folder) / "weights.pt").write_bytes(content)
        try:
            save_bioimageio_package(_describe(predictor, Path(folder), provenance), output_path=package)
        except ValueError as error:  # from pydantic, also if its version does not fit bioimageio.spec
            raise UserError(f"bioimageio.spec refuses the package: {_reason(error)}") from error
        _test_package(package)
        gc.collect()  # bioimageio.core leaves files open in reference cycles, and Windows can't remove open files
        return package.read_bytes(), difference


def _common_normalisation(predictor: Predictor) -> DataInfo | None:
    """Description that says how every member normalises; None where each has its own mean and standard deviation.

    Raises
    ------
    UserError
        Some normalise by the image and some by the training set: the statistics of a tile are not those of its image,
        and after the step that normalises it the others can't have its grey values.
    """
    infos = [member.info for member in predictor.members]
    kinds = {info.normalize for info in infos}
    if len(kinds) > 1:
        what = "--format bioimageio: some of these networks were trained with --normalize image, others with data"
        raise UserError(f"{what}: export them as onnx or torchscript")
    same = kinds == {"image"} or all((info.mean, info.std) == (infos[0].mean, infos[0].std) for info in infos)
    return infos[0] if same else None


def _test_package(package: Path) -> None:
    """Test a package with bioimageio.core on its own image."""
    from bioimageio.core import test_model

    summary = test_model(package)
    if summary.status != "passed":  # `valid-format` is that of a package that does not reproduce its own output
        parts = [part for part in summary.details if part.status != "passed"]
        reasons = [f"{part.name}: {part.errors[0].msg.splitlines()[0]}" for part in parts if part.errors]
        what = f"bioimageio.core's test of the package ends with {summary.status}, not passed"
        raise UserError(f"{what} ({'; '.join(reasons[:2])}): nothing was written; please report it")


def _reason(error: ValueError) -> str:
    """Message of the specification on one line."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return f"{error}: pip install -r requirements-extra.txt"
    return "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors()[:3])


def _describe(predictor: Predictor, folder: Path, provenance: Provenance) -> spec.ModelDescr:
    """Description of the package, and its files."""
    from bioimageio.spec.model import v0_5 as spec

    info = predictor.info
    names = [_identifier(name) for name in (info.class_names[1:] if info.num_class == 2 else info.class_names)]
    image, probability = _test_images(predictor)
    _draw_cover(folder / "cover.png", image[0, 0], probability[0, -1])
    (folder / "README.md").write_text(_readme(predictor, provenance.checkpoints), "utf-8")
    torchscript = spec.TorchscriptWeightsDescr(
        source=folder / "weights.pt", pytorch_version=spec.Version(torch.__version__.split("+")[0])
    )
    return spec.ModelDescr(
        name=f"U-Net for {' and '.join(names)}"[:127],
        description="U-Net that segments microscope images, trained with pytorch-UNET's command line",
        authors=[spec.Author(name=name) for name in provenance.authors],
        cite=[
            spec.CiteEntry(text="Ronneberger et al., U-Net, MICCAI 2015", doi=spec.Doi("10.1007/978-3-319-24574-4_28"))
        ],
        license=spec.LicenseId(provenance.license) if provenance.license else None,
        documentation=spec.FileDescr(source=folder / "README.md"),
        covers=[spec.FileDescr(source=folder / "cover.png")],
        tags=["unet", "segmentation", "2d", "pytorch"],
        timestamp=spec.Datetime.now(),
        inputs=[_input(_save(folder, "input", image), predictor)],
        outputs=[_output(_save(folder, "output", probability), names, predictor.halo)],
        weights=spec.WeightsDescr(torchscript=torchscript),
    )


def _test_images(predictor: Predictor) -> tuple[np.ndarray, np.ndarray]:
    """Test image (1, C, H, W) of the package and its probability (1, K, H, W).

    The output is that of the network alone, without a mirrored border, as bioimageio.core tests it. Of several images
    the one whose output has the widest range is chosen, since the specification refuses an output of zeros only.
    """
    rng, side = np.random.default_rng(0), _least_side(predictor)

    def predicted(cell: int) -> tuple[np.ndarray, np.ndarray]:
        """Checkerboard of random grey values with cells of this size [px], and its probability."""
        num = -(-side // cell)
        cells = rng.integers(0, 256, (predictor.info.nch_in, num, num)).astype(np.float32)
        image = cells.repeat(cell, 1).repeat(cell, 2)[:, :side, :side]
        probability = predict_array(predictor, _as_array(image), tta=False).reshape(1, -1, side, side)
        return image[None], probability

    return max(map(predicted, (1, 4, 12, 32)), key=lambda pair: np.ptp(pair[1]))


def _least_side(predictor: Predictor) -> int:
    """Smallest height and width [px] of an image or a tile with its halo, of which a multiple of the stride remains."""
    return 2 * predictor.halo + predictor.stride


def _save(folder: Path, name: str, array: np.ndarray) -> dict[str, Any]:
    """Files of an array (1, C, H, W) for the description: one for the test, one as a picture."""
    from bioimageio.spec.model import v0_5 as spec

    np.save(folder / f"{name}.npy", array)
    tifffile.imwrite(folder / f"{name}.tif", array.squeeze(), photometric="minisblack")
    return {
        "test_tensor": spec.FileDescr(source=folder / f"{name}.npy"),
        "sample_tensor": spec.FileDescr(source=folder / f"{name}.tif"),
    }


def _input(files: dict[str, Any], predictor: Predictor) -> spec.InputTensorDescr:
    """Description of the input: raw grey values, and their normalisation."""
    from bioimageio.spec.model import v0_5 as spec

    channels = spec.ChannelAxis(channel_names=[f"channel{number}" for number in range(predictor.info.nch_in)])
    size = spec.ParameterizedSize(min=_least_side(predictor), step=predictor.stride)
    space = [spec.SpaceInputAxis(id=spec.AxisId(axis), size=size) for axis in "yx"]
    info = _common_normalisation(predictor)
    dtype = spec.EnsureDtypeDescr(kwargs=spec.EnsureDtypeKwargs(dtype="float32"))
    return spec.InputTensorDescr(
        id=spec.TensorId("image"),
        axes=[spec.BatchAxis(), channels, *space],
        preprocessing=[dtype, _normalisation_step(info), dtype] if info else [dtype],
        **files,
    )


def _normalisation_step(info: DataInfo) -> spec.ZeroMeanUnitVarianceDescr | spec.FixedZeroMeanUnitVarianceDescr:
    """How images are normalised, as a step before the network."""
    from bioimageio.spec.model import v0_5 as spec

    if info.normalize == "image":
        axes = [spec.AxisId("y"), spec.AxisId("x")]
        return spec.ZeroMeanUnitVarianceDescr(kwargs=spec.ZeroMeanUnitVarianceKwargs(axes=axes))
    kwargs = spec.FixedZeroMeanUnitVarianceAlongAxisKwargs(mean=info.mean, std=info.std, axis=spec.AxisId("channel"))
    return spec.FixedZeroMeanUnitVarianceDescr(kwargs=kwargs)


def _output(files: dict[str, Any], names: list[str], around: int) -> spec.OutputTensorDescr:
    """Description of the output."""
    from bioimageio.spec.model import v0_5 as spec

    axes = [spec.AxisId("y"), spec.AxisId("x")]
    sizes = {axis: spec.SizeReference(tensor_id=spec.TensorId("image"), axis_id=axis) for axis in axes}
    space = [spec.SpaceOutputAxisWithHalo(id=axis, size=size, halo=around) for axis, size in sizes.items()]
    return spec.OutputTensorDescr(
        id=spec.TensorId("probability"), axes=[spec.BatchAxis(), spec.ChannelAxis(channel_names=names), *space], **files
    )


def _identifier(name: str) -> str:
    """Class name as an identifier: letters, digits and underscores, not starting with a digit."""
    letters = "".join(letter if letter.isalnum() else "_" for letter in name)
    return letters if letters.isidentifier() and not keyword.iskeyword(letters) else f"class_{letters}"


def _draw_cover(path: Path, image: np.ndarray, probability: np.ndarray) -> None:
    """Picture of an input next to its output, twice as wide as high."""
    from PIL import Image

    both = np.concatenate([image, probability * 255], axis=1).clip(0, 255).astype(np.uint8)
    Image.fromarray(both).resize((512, 256)).save(path)


def _readme(predictor: Predictor, sources: list[Path]) -> str:
    """Text of the package's README for its users."""
    info, num, normalisation = predictor.info, len(sources), _common_normalisation(predictor)
    classes = ", ".join(f"{name} ({value})" for name, value in zip(info.class_names, info.class_values, strict=True))
    by = "each whole image" if info.normalize == "image" else "all training images"
    names = [f"`{source.name if num == 1 else Path(*source.parts[-3:]).as_posix()}`" for source in sources]
    mean = f"The output is the mean of the probabilities of {num} networks. " * (num > 1)
    step = f"Mean and standard deviation of {by} are a step before the network, to be done before an image is cut into "
    lines = [
        "# U-Net",
        f"Exported from {', '.join(names)}. {mean}Classes: {classes}. Output: probability of the class.",
        f"Input: raw grey values, height and width multiples of {predictor.stride} px (mirror others at the bottom "
        "and right).",
        f"{step}tiles; bioimageio.core does so when it predicts in blocks." * (normalisation is not None),
        f"The output depends on {predictor.halo} px around it (`halo`), by which tiles must overlap. "
        "At the border of an image "
        "bioimageio.core mirrors it, where the command line pads each feature map with zeros, so the two differ there. "
        "When it predicts a whole image at once, it normalises by the mirrored image.",
        "The network normalises each feature map by the tile: the larger the tiles, the better."
        * predictor.is_tile_dependent,
        f"The command line filters objects by the training labels: {predictor.object_filter}."
        * predictor.object_filter.is_active,
        "## Validation",
        "The package holds a test image and its output; for the quality of the network see the scores of its training.",
    ]
    return "\n\n".join(filter(None, lines)) + "\n"


WRITERS: dict[str, Callable[[Predictor, Provenance], tuple[bytes, float]]] = {
    "onnx": to_onnx,
    "torchscript": to_torchscript,
    "bioimageio": to_bioimageio,
}
