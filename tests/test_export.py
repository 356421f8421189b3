import importlib.util
import zipfile

import numpy as np
import pytest
import torch
from conftest import SMALL

import export
import main
from predict import load, predict_array

EXPORT = ["--mode", "export", "--gpu_ids", "-1"]
pytestmark = pytest.mark.filterwarnings("ignore")  # exporters warn of themselves


def needs(*packages):
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def newest(work):
    return load(work / "checkpoints" / "unet" / "em" / "model_epoch0001.pth")


@needs("onnx", "onnxscript", "onnxruntime")
def test_onnx_gives_the_checkpoints_probability_at_any_size(trained, work):
    import onnxruntime

    assert main.main([*EXPORT, "--output", "net.onnx"]) == 0
    session = onnxruntime.InferenceSession("net.onnx")
    image = np.random.default_rng(1).integers(0, 255, (2, 45, 71)).astype(np.float32)
    probability = session.run(None, {"image": image[:, None]})[0]
    np.testing.assert_allclose(probability[:, 0], predict_array(newest(work), image, tta=False), atol=1e-4)


@pytest.mark.parametrize("flags", [[], ["--norm", "inorm", "--normalize", "data", "--nch_out", "2"]])
def test_torchscript_gives_the_checkpoints_probability_at_any_size(database, work, flags):
    assert main.main([*SMALL, "--num_epoch", "1", *flags]) == 0
    assert main.main([*EXPORT, "--format", "torchscript", "--output", "net.pt"]) == 0
    image = torch.randint(0, 255, (3, 1, 20, 71)).float()
    probability = torch.jit.load("net.pt")(image)
    expected = predict_array(newest(work), image[:, 0].numpy(), tta=False)
    np.testing.assert_allclose(probability[:, 0].detach().numpy(), expected, atol=1e-4)


@needs("bioimageio")
def test_a_package_of_the_model_zoo_passes_its_own_test(trained, work):
    import yaml

    assert main.main([*EXPORT, "--format", "bioimageio", "--output", "net.zip"]) == 0  # runs test_model
    with zipfile.ZipFile("net.zip") as package:
        model = yaml.safe_load(package.read("rdf.yaml"))
    assert model["outputs"][0]["axes"][1]["channel_names"] == ["cell"]
    assert model["cite"][0]["doi"] and model["covers"] and "torchscript" in model["weights"]


def test_an_export_that_computes_something_else_is_not_written(trained, work, fails, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    flags = [*EXPORT, "--format", "torchscript", "--output", "net.pt"]
    assert "net.pt: differs from" in fails(main.main, flags)
    assert not list(work.glob("net*"))


def test_a_wrong_ending_and_a_missing_package_are_refused(trained, work, fails, monkeypatch):
    assert "--format onnx writes .onnx" in fails(main.main, [*EXPORT, "--output", "net.pt"])
    monkeypatch.setattr(export, "PACKAGES", {"torchscript": ["no_such_package"]})
    flags = [*EXPORT, "--format", "torchscript", "--output", "net.pt"]
    assert "needs the package no_such_package" in fails(main.main, flags)
