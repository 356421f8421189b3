import importlib.util
import io
import resource
import zipfile

import numpy as np
import pytest
import torch
from conftest import SHARED, SMALL, needs_golden, write_stacks

import main
import run_make_database
from model import NORMS
from predict import load, predict_array
from prediction import bioimageio, export

EXPORT = ["--mode", "export", "--gpu_ids", "-1"]
SCRIPT = [*EXPORT, "--format", "torchscript", "--output", "net.pt"]
PACKAGE = [*EXPORT, "--format", "bioimageio", "--output", "net.zip"]
pytestmark = pytest.mark.filterwarnings("ignore")  # exporters warn of themselves


def needs(*packages):
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def newest(work):
    return load(work / "checkpoints" / "unet" / "em" / "model_epoch0001.pth")


def images(nch=1):
    """Images (nch, H, W) of all the sizes and grey values that an export must get right."""
    rng = np.random.default_rng(1)
    for size in [(1, 1), (1, 7), (2, 3), (15, 16), (16, 16), (16, 33), (17, 17), (45, 71)]:
        yield rng.integers(0, 255, (nch, *size)).astype(np.float32)
    yield np.full((nch, 20, 30), 101.3, np.float32)
    yield 60000 + 5 * rng.integers(0, 255, (nch, 512, 512)).astype(np.float32)  # 16 bits, far from 0


def compare(predictor, run, nch=1):
    """Largest difference between an export and the checkpoint over those images."""
    for image in images(nch):
        pixels = image[0] if nch == 1 else image.transpose(1, 2, 0)
        expected = predict_array(predictor, pixels, tta=False)
        np.testing.assert_allclose(
            run(image[None])[0].reshape(expected.shape), expected, atol=1e-4, err_msg=image.shape
        )


def run_script(path):
    graph = torch.jit.load(path)

    def run(image):
        with torch.no_grad():
            return graph(torch.from_numpy(image)).numpy()

    return run


def describe(path):
    """Description in a package, and the shapes of its test images."""
    import yaml

    with zipfile.ZipFile(path) as package:
        arrays = [np.load(io.BytesIO(package.read(f"{name}.npy"))) for name in ("input", "output")]
        return yaml.safe_load(package.read("rdf.yaml")), [array.shape for array in arrays]


@pytest.mark.slow
@needs("onnx", "onnxscript", "onnxruntime")
def test_onnx_gives_the_checkpoints_probability_of_any_image(database, work):
    import onnxruntime

    # an export takes seconds: TorchScript is tested with other numbers, an ensemble in ONNX with 3 levels
    assert main.main([*SMALL, "--num_epoch", "1", "--num_level", "5"]) == 0
    assert main.main([*EXPORT, "--output", "net.onnx"]) == 0
    session = onnxruntime.InferenceSession("net.onnx")
    compare(newest(work), lambda image: session.run(None, {"image": image})[0])
    batch = np.random.default_rng(1).integers(0, 255, (3, 1, 33, 40)).astype(np.float32)
    expected = predict_array(newest(work), batch[:, 0], tta=False)
    np.testing.assert_allclose(session.run(None, {"image": batch})[0][:, 0], expected, atol=1e-4)


@pytest.mark.slow
@needs("onnx", "onnxscript", "onnxruntime")
@pytest.mark.parametrize("norm", NORMS)
def test_onnx_of_a_network_trained_for_some_epochs_gives_its_probability(database, work, norm):
    import onnxruntime

    assert main.main([*SMALL, "--num_epoch", "20", "--lr", "0.01", "--norm", norm, "--normalize", "data"]) == 0
    assert main.main([*EXPORT, "--output", "net.onnx"]) == 0
    session, predictor = onnxruntime.InferenceSession("net.onnx"), load(next(work.rglob("*epoch0020.pth")))
    for file in (database / "test").glob("*.npy"):  # as for real images, the difference stays far below the tolerance
        image = np.load(file)["input"][..., 0].astype(np.float32)
        expected = predict_array(predictor, image, tta=False)
        assert expected.std() > 0.01
        np.testing.assert_allclose(session.run(None, {"image": image[None, None]})[0][0, 0], expected, atol=1e-5)


@needs_golden
@needs("onnx", "onnxscript", "onnxruntime")
@pytest.mark.parametrize("norm", ["bnorm", "inorm"])
@pytest.mark.slow
def test_onnx_of_the_originals_checkpoint_gives_its_probability(work, norm):
    import onnxruntime

    folder = work / "checkpoints" / "unet" / "em"
    folder.mkdir(parents=True)
    (folder / "model_epoch0003.pth").symlink_to(SHARED / "golden" / "upstream" / f"{norm}_model_epoch0003.pth")
    assert main.main([*EXPORT, "--output", "net.onnx"]) == 0
    image = np.random.default_rng(1).integers(0, 255, (90, 73), np.uint8)  # whose range is that of the training
    expected = predict_array(load(folder / "model_epoch0003.pth"), image, tta=False)
    found = onnxruntime.InferenceSession("net.onnx").run(None, {"image": image[None, None].astype(np.float32)})
    np.testing.assert_allclose(found[0][0, 0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [[], ["--num_level", "5", "--norm", "inorm"], ["--num_level", "3", "--normalize", "data", "--nch_out", "2"]],
)
def test_torchscript_gives_the_checkpoints_probability_of_any_image(database, work, flags):
    assert main.main([*SMALL, "--num_epoch", "1", *flags]) == 0
    assert main.main(SCRIPT) == 0
    compare(newest(work), run_script("net.pt"))


def test_torchscript_of_several_channels_and_classes_gives_the_probability_of_each(work):
    write_stacks(work / "datasets" / "em", values=(0, 100, 255), channels=3)
    assert run_make_database.main([]) == 0
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    assert main.main(SCRIPT) == 0
    compare(newest(work), run_script("net.pt"), nch=3)


@pytest.mark.slow
@needs("bioimageio")
@pytest.mark.parametrize(("num_level", "halo"), [("2", 24), ("5", 192)])
def test_package_gives_the_result_of_the_image_by_blocks(database, work, capsys, num_level, halo):
    from bioimageio.core import predict

    assert main.main([*SMALL, "--num_epoch", "1", "--num_level", num_level]) == 0
    assert main.main(PACKAGE) == 0
    model, sizes = describe("net.zip")
    assert [axis["halo"] for axis in model["outputs"][0]["axes"][2:]] == [halo, halo]
    assert sizes == [(1, 1, 2 * halo + 2 ** int(num_level), 2 * halo + 2 ** int(num_level))] * 2
    assert not model.get("authors") and not model.get("license")  # nobody named any
    assert "--author" in capsys.readouterr().out
    side = 2 * halo + 4 * 2 ** int(num_level)
    image = np.random.default_rng(1).integers(0, 255, (side, side)).astype(np.uint8)
    image[:, side // 2 :] //= 4  # each block has other grey values
    expected = predict_array(newest(work), image, tta=False)

    def run(**options):
        result = predict(model="net.zip", inputs={"image": image[None, None]}, **options)
        return result.as_arrays()["probability"][0, 0]

    inner = np.s_[halo:-halo, halo:-halo]  # at the border of the image bioimageio.core mirrors it
    np.testing.assert_allclose(run(blocksize_parameter=3)[inner], expected[inner], atol=1e-4)
    mirrored = predict_array(newest(work), np.pad(image, halo, "symmetric"), tta=False)
    np.testing.assert_allclose(run(), mirrored[inner], atol=1e-4)


VARIANTS = [  # channels, classes, context, and flags of the training
    (1, 2, 0, "--num_level 2 --norm inorm --normalize image"),
    (1, 2, 0, "--num_level 4 --norm bnorm --normalize image"),
    (1, 2, 0, "--num_level 4 --norm inorm --normalize data"),
    (1, 2, 1, "--num_level 2 --norm bnorm --normalize data"),
    (3, 2, 0, "--num_level 2 --norm bnorm --normalize data"),
    (3, 2, 0, "--num_level 4 --norm inorm --normalize image"),
    (1, 3, 2, "--num_level 2 --norm inorm --normalize data"),
    (3, 3, 0, "--num_level 2 --norm bnorm --normalize image"),
    (1, 2, 0, "--num_level 3 --norm gnorm --normalize image"),
]


@pytest.mark.slow
@needs("bioimageio")
@pytest.mark.parametrize(("channels", "classes", "context", "flags"), VARIANTS)
def test_package_passes_the_test_of_the_model_zoo(work, channels, classes, context, flags):
    from bioimageio.core import test_model

    values = (0, 100, 255) if classes == 3 else (0, 255)
    write_stacks(work / "datasets" / "em", values=values, channels=channels if channels > 1 else 0)
    assert run_make_database.main(["--context", str(context)]) == 0
    assert main.main([*SMALL, "--num_epoch", "1", *flags.split()]) == 0
    assert main.main(PACKAGE) == 0
    summary = test_model("net.zip")
    assert summary.status == "passed", [part.name for part in summary.details if part.status != "passed"]
    nch_in = newest(work).info.nch_in
    side = 2 * newest(work).halo + newest(work).stride
    assert describe("net.zip")[1] == [(1, nch_in, side, side), (1, 1 if classes == 2 else 3, side, side)]


@needs("bioimageio")
def test_package_that_does_not_reproduce_its_output_is_not_written(trained, work, fails, monkeypatch):
    image, probability = bioimageio._test_images(newest(work))
    monkeypatch.setattr(bioimageio, "_test_images", lambda _: (image, 1 - probability))
    assert "not passed" in fails(main.main, PACKAGE)
    assert not list(work.glob("net*"))


@pytest.mark.slow
@needs("bioimageio")
def test_package_holds_what_the_flags_and_the_checkpoint_say(database, work):
    assert main.main([*SMALL, "--num_epoch", "1", "--normalize", "data"]) == 0
    assert main.main([*PACKAGE, "--author", "A. Bee, C. Dee", "--license", "CC-BY-4.0"]) == 0
    model, _ = describe("net.zip")
    assert [author["name"] for author in model["authors"]] == ["A. Bee", "C. Dee"]
    assert model["license"] == "CC-BY-4.0"
    assert model["outputs"][0]["axes"][1]["channel_names"] == ["cell"]
    step = next(step for step in model["inputs"][0]["preprocessing"] if step["id"] == "fixed_zero_mean_unit_variance")
    assert step["kwargs"]["mean"] == newest(work).info.mean
    assert model["cite"][0]["doi"] and model["covers"] and "torchscript" in model["weights"]


@needs_golden
@needs("bioimageio")
def test_package_of_the_originals_checkpoint_whose_classes_are_numbers(work):
    folder = work / "checkpoints" / "unet" / "em"
    folder.mkdir(parents=True)
    (folder / "model_epoch0003.pth").symlink_to(SHARED / "golden" / "upstream" / "inorm_model_epoch0003.pth")
    assert main.main(PACKAGE) == 0


@needs("bioimageio")
def test_licence_that_is_none_and_flags_without_a_place_are_refused(trained, work, fails):
    assert "--license none" in fails(main.main, [*PACKAGE, "--license", "none"], status=2)
    assert "--author A" in fails(main.main, [*SCRIPT, "--author", "A"], status=2)
    assert "--author A/B" in fails(main.main, [*PACKAGE, "--author", "A/B"], status=2)
    assert not list(work.glob("net*"))


def test_export_says_nothing_of_a_gpu_that_it_does_not_use(trained, work, capsys):
    assert main.main(["--mode", "export", "--format", "torchscript", "--output", "net.pt", "--gpu_ids", "99"]) == 0
    assert capsys.readouterr().err == ""


def test_export_that_computes_something_else_is_not_written(trained, work, fails, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    assert "net.pt: differs from" in fails(main.main, SCRIPT)
    assert not list(work.glob("net*"))


def test_ending_of_another_format_and_a_missing_package_are_refused(trained, work, fails, monkeypatch):
    assert "--format onnx writes .onnx" in fails(main.main, [*EXPORT, "--output", "net.pt"])
    assert "needs --output FILE" in fails(main.main, EXPORT)
    needing = export.FORMATS["torchscript"]._replace(packages=["no_such_package"])
    monkeypatch.setitem(export.FORMATS, "torchscript", needing)
    assert "needs the package no_such_package" in fails(main.main, SCRIPT)


def test_target_that_cannot_be_written_is_refused_and_other_files_stay(trained, work, fails):
    (work / "net.pt.pt").write_text("mine")
    (work / "net.pt").mkdir()
    assert "net.pt is a folder" in fails(main.main, SCRIPT)
    (work / "net.pt").rmdir()
    (work / "net.pt").symlink_to(work / "checkpoints" / "unet" / "em" / "model_epoch0001.pth")
    assert "is the checkpoint itself" in fails(main.main, SCRIPT)
    assert "cannot write" in fails(main.main, [*SCRIPT, "--output", "/proc/none/net.pt"])
    (work / "net.pt").unlink()
    (work / "net.pt").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        assert "cannot write" in fails(main.main, SCRIPT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (work / "net.pt").read_text() == "old" and (work / "net.pt.pt").read_text() == "mine"
    assert len(list(work.glob("*net*"))) == len(list(work.glob(".*net*"))) + 2
