"""Packages of the BioImage Model Zoo with a network in TorchScript."""

from __future__ import annotations

import gc
import keyword
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
import torch

from config import Config
from description import DataInfo
from prediction.predictor import Predictor, predict_array
from utils import FlagError, UserError

if TYPE_CHECKING:
    from bioimageio.spec.model import v0_5 as spec


def authors_of(config: Config) -> list[str]:
    """Names in `--author`."""
    return [name.strip() for name in config.author.split(",") if name.strip()]


def check_credits(config: Config) -> None:
    """Refuse names that the specification of the model zoo does not allow."""
    from bioimageio.spec.generic.v0_3 import Author, LicenseId

    try:
        for name in authors_of(config):
            Author(name=name)
    except ValueError as error:
        raise FlagError(f"--author {name}: no name in the model zoo: write it without '/'") from error
    try:
        config.license and LicenseId(config.license)
    except ValueError as error:
        advice = "take one from https://spdx.org/licenses"
        raise FlagError(f"--license {config.license}: no SPDX identifier: {advice}") from error


def common_normalisation(predictor: Predictor) -> DataInfo | None:
    """Description that says how every member normalises; None where each has its own mean and standard deviation.

    Members that normalise by the image and by the training set are refused together: the statistics of a tile are not
    those of its image, and after the step that normalises it the others can't have its grey values.
    """
    infos = [member.info for member in predictor.members]
    if len({info.normalize for info in infos}) > 1:
        what = "--format bioimageio: some of these networks were trained with --normalize image, others with data"
        raise UserError(f"{what}: export them as onnx or torchscript")
    is_same = infos[0].normalize == "image" or len({(*info.mean, *info.std) for info in infos}) == 1
    return infos[0] if is_same else None


def make_package(predictor: Predictor, weights: bytes, checkpoints: list[Path], config: Config) -> bytes:
    """Tested package with the TorchScript of a predictor.

    The package declares the normalisation as preprocessing, and the halo of a tile, so that programs that work in tiles
    give the same result as for the whole image. If the members of an ensemble are normalised by different mean and
    standard deviation of training images, those are in the graph.
    """
    from bioimageio.spec import save_bioimageio_package
    from pydantic import ValidationError

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "weights.pt").write_bytes(weights)
        (folder / "README.md").write_text(_readme(predictor, checkpoints), "utf-8")
        try:
            save_bioimageio_package(_describe(predictor, folder, config), output_path=folder / "package.zip")
        except ValueError as error:  # from pydantic, also if its version does not fit bioimageio.spec
            reason = f"{error}: pip install -r requirements-extra.txt"
            if isinstance(error, ValidationError):
                parts = error.errors()[:3]
                reason = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in parts)
            raise UserError(f"bioimageio.spec refuses the package: {reason}") from error
        _test(folder / "package.zip")
        gc.collect()  # bioimageio.core leaves files open in reference cycles, and Windows can't remove open files
        return (folder / "package.zip").read_bytes()


def _test(package: Path) -> None:
    """Test a package with bioimageio.core on its own image."""
    from bioimageio.core import test_model

    summary = test_model(package)
    if summary.status != "passed":  # `valid-format` is that of a package that does not reproduce its own output
        parts = [part for part in summary.details if part.status != "passed"]
        reasons = [f"{part.name}: {part.errors[0].msg.splitlines()[0]}" for part in parts if part.errors]
        what = f"bioimageio.core's test of the package ends with {summary.status}, not passed"
        raise UserError(f"{what} ({'; '.join(reasons[:2])}): nothing was written; please report it")


def _describe(predictor: Predictor, folder: Path, config: Config) -> spec.ModelDescr:
    """Description of the package, and the images in it."""
    from bioimageio.spec.model import v0_5 as spec

    info = predictor.info
    names = [_identifier(name) for name in (info.class_names[1:] if info.num_class == 2 else info.class_names)]
    image, probability = _test_images(predictor)
    _draw_cover(folder / "cover.png", image[0, 0], probability[0, -1])
    version = spec.Version(torch.__version__.split("+")[0])
    paper = spec.Doi("10.1007/978-3-319-24574-4_28")
    return spec.ModelDescr(
        name=f"U-Net for {' and '.join(names)}"[:127],
        description="U-Net that segments microscope images, trained with pytorch-UNET's command line",
        authors=[spec.Author(name=name) for name in authors_of(config)],
        cite=[spec.CiteEntry(text="Ronneberger et al., U-Net, MICCAI 2015", doi=paper)],
        license=spec.LicenseId(config.license) if config.license else None,
        documentation=spec.FileDescr(source=folder / "README.md"),
        covers=[spec.FileDescr(source=folder / "cover.png")],
        tags=["unet", "segmentation", "2d", "pytorch"],
        timestamp=spec.Datetime.now(),
        inputs=[_input(_save(folder, "input", image), predictor)],
        outputs=[_output(_save(folder, "output", probability), names, predictor.halo)],
        config=spec.Config.model_validate({"threshold": predictor.threshold} if info.num_class == 2 else {}),
        weights=spec.WeightsDescr(
            torchscript=spec.TorchscriptWeightsDescr(source=folder / "weights.pt", pytorch_version=version)
        ),
    )


def _test_images(predictor: Predictor) -> tuple[np.ndarray, np.ndarray]:
    """Test image (1, C, H, W) of the package and its probability (1, K, H, W).

    The output is that of the network alone, without a mirrored border, as bioimageio.core tests it. Of several images
    the one whose output has the widest range is chosen, since the specification refuses an output of zeros only.
    """
    rng, side = np.random.default_rng(0), _min_side(predictor)
    pairs = []
    for cell in (1, 4, 12, 32):  # [px] of a checkerboard of random grey values
        num = -(-side // cell)
        cells = rng.integers(0, 256, (1, predictor.info.nch_in, num, num)).astype(np.float32)
        image = cells.repeat(cell, 2).repeat(cell, 3)[:, :, :side, :side]
        probability = predict_array(predictor, np.moveaxis(image, 1, -1), tta=False)
        pairs.append((image, probability.reshape(1, -1, side, side)))
    return max(pairs, key=lambda pair: np.ptp(pair[1]))


def _min_side(predictor: Predictor) -> int:
    """Smallest height and width [px] of an image or a tile with its halo, of which a multiple of the stride remains."""
    return 2 * predictor.halo + predictor.stride


def _save(folder: Path, name: str, array: np.ndarray) -> dict[str, Any]:
    """Files of an array (1, C, H, W) for the description: one for the test, one as a picture."""
    from bioimageio.spec.model import v0_5 as spec

    array_file, picture_file = folder / f"{name}.npy", folder / f"{name}.tif"
    np.save(array_file, array)
    tifffile.imwrite(picture_file, array.squeeze(), photometric="minisblack")
    return {"test_tensor": spec.FileDescr(source=array_file), "sample_tensor": spec.FileDescr(source=picture_file)}


def _input(files: dict[str, Any], predictor: Predictor) -> spec.InputTensorDescr:
    """Description of the input: raw grey values, and their normalisation as a step before the network."""
    from bioimageio.spec.model import v0_5 as spec

    channels = spec.ChannelAxis(channel_names=[f"channel{number}" for number in range(predictor.info.nch_in)])
    size = spec.ParameterizedSize(min=_min_side(predictor), step=predictor.stride)
    space = [spec.SpaceInputAxis(id=spec.AxisId(axis), size=size) for axis in "yx"]
    to_float = spec.EnsureDtypeDescr(kwargs=spec.EnsureDtypeKwargs(dtype="float32"))
    steps: list[Any] = [to_float]
    info = common_normalisation(predictor)
    if info and info.normalize == "image":
        by_image = spec.ZeroMeanUnitVarianceKwargs(axes=[spec.AxisId("y"), spec.AxisId("x")])
        steps += [spec.ZeroMeanUnitVarianceDescr(kwargs=by_image), to_float]
    elif info:
        channel = spec.AxisId("channel")
        by_data = spec.FixedZeroMeanUnitVarianceAlongAxisKwargs(mean=info.mean, std=info.std, axis=channel)
        steps += [spec.FixedZeroMeanUnitVarianceDescr(kwargs=by_data), to_float]
    axes: list[Any] = [spec.BatchAxis(), channels, *space]
    return spec.InputTensorDescr(id=spec.TensorId("image"), axes=axes, preprocessing=steps, **files)


def _output(files: dict[str, Any], names: list[str], halo: int) -> spec.OutputTensorDescr:
    """Description of the output."""
    from bioimageio.spec.model import v0_5 as spec

    axes: list[Any] = [spec.BatchAxis(), spec.ChannelAxis(channel_names=names)]
    for axis in (spec.AxisId("y"), spec.AxisId("x")):
        size = spec.SizeReference(tensor_id=spec.TensorId("image"), axis_id=axis)
        axes.append(spec.SpaceOutputAxisWithHalo(id=axis, size=size, halo=halo))
    return spec.OutputTensorDescr(id=spec.TensorId("probability"), axes=axes, **files)


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
    info, stride, halo, objects = predictor.info, predictor.stride, predictor.halo, predictor.object_filter
    classes = ", ".join(f"{name} ({value})" for name, value in zip(info.class_names, info.class_values, strict=True))
    files = [source.name if len(sources) == 1 else Path(*source.parts[-3:]).as_posix() for source in sources]
    names = ", ".join(f"`{file}`" for file in files)
    mean = f"The output is the mean of the probabilities of {len(sources)} networks. " if len(sources) > 1 else ""
    lines = [f"# U-Net\n\nExported from {names}. {mean}Classes: {classes}. Output: probability of the class."]
    if info.num_class == 2:
        lines += [f"A pixel is {info.class_names[1]} where it is above {predictor.threshold:g} (`threshold`)."]
    lines += [
        f"Input: raw grey values, height and width multiples of {stride} px (mirror others at the bottom and right)."
    ]
    if common_normalisation(predictor):
        by = "each whole image" if info.normalize == "image" else "all training images"
        step = f"Mean and standard deviation of {by} are a step before the network, to be done before an image is cut"
        lines += [f"{step} into tiles; bioimageio.core does so when it predicts in blocks."]
    lines += [
        f"The output depends on {halo} px around it (`halo`), by which tiles must overlap. At the border of an image "
        "bioimageio.core mirrors it, where the command line pads each feature map with zeros, so the two differ there. "
        "When it predicts a whole image at once, it normalises by the mirrored image."
    ]
    if predictor.is_tile_dependent:
        lines += ["The network normalises each feature map by the tile: the larger the tiles, the better."]
    if objects.is_active:
        lines += [f"The command line filters objects: {objects}."]
    quality = "for the quality of the network see the scores of its training."
    lines += [f"## Validation\n\nThe package holds a test image and its output; {quality}"]
    return "\n\n".join(lines) + "\n"
