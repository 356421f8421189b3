"""Every type of numbers that NumPy has, from the file to the segmented image."""

import numpy as np
import pytest
import tifffile
from conftest import SMALL

import main
import run_make_database
from predict import load, predict_array

CODES = ["b", "B", "h", "H", "i", "I", "l", "L", "q", "Q", "e", "f", "d", "g"]
TYPES = [order + code for code in CODES for order in ("<>" if np.dtype(code).itemsize > 1 else "|")]
CPU = SMALL[:2]


def images(num=6):
    """Images (N, 32, 32) with bright squares, and their labels, 0 and 1."""
    rng = np.random.default_rng(0)
    labels = np.zeros((num, 32, 32), np.uint8)
    for label in labels:
        y, x = rng.integers(4, 16, 2)
        label[y : y + 12, x : x + 12] = 1
    return labels * 64 + rng.integers(0, 30, labels.shape, np.uint8), labels


@pytest.mark.parametrize("dtype", ["?", ">i2", ">u4", "q", "Q", ">u8", "f2"])
def test_types_of_images_and_labels_are_trained_tested_and_predicted(work, dtype):
    pixels, labels = images()
    np.save("images.npy", (labels if dtype == "?" else pixels).astype(dtype))
    tifffile.imwrite("labels.tif", labels.astype(dtype), photometric="minisblack")
    assert run_make_database.main(["--input", "images.npy", "--label", "labels.tif"]) == 0
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    assert main.main(["--mode", "test", *CPU]) == 0
    assert main.main(["--mode", "predict", *CPU, "--input", "images.npy", "--output", "out.npy"]) == 0
    assert np.load("out.npy").shape == (6, 32, 32)


@pytest.mark.parametrize("ending", ["npy", "tif", "zlib.tif"])
def test_predict_reads_every_type_as_the_same_numbers(trained, ending):
    pixels, types = images(1)[0], [dtype for dtype in TYPES if ending == "npy" or dtype[1] != "g"]
    for number, dtype in enumerate(types):
        if ending == "npy":
            np.save(f"{number}.npy", pixels.astype(dtype))
        else:
            options = {"byteorder": dtype[0].replace("|", "<"), "compression": "zlib" if "z" in ending else None}
            tifffile.imwrite(f"{number}.{ending}", pixels.astype(dtype), **options)
    command = ["--mode", "predict", *CPU, "--tta", "off", "--amp", "off", "--input", f"*.{ending}"]
    assert main.main([*command, "--output", "out.npy", "--dtype", "float32"]) == 0
    outputs = np.load("out.npy")
    assert len(outputs) == len(types) and np.allclose(outputs, outputs[0], atol=1e-5)


def test_predict_array_takes_every_type(trained):
    predictor = load(next((trained.parents[1] / "checkpoints").rglob("*.pth")))
    image = images(1)[0][0]
    expected = predict_array(predictor, image, tta=False)
    for dtype in TYPES:
        assert np.allclose(predict_array(predictor, image.astype(dtype), tta=False), expected, atol=1e-5), dtype
    assert predict_array(predictor, image > 50, tta=False).shape == image.shape
