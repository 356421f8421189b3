"""`--threshold`, the checkpoint's threshold, and what is said of them."""

import csv
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from conftest import SMALL, checkpoint_of
from test_ensemble import DATA, write_network

import main
from predict import load, predict_array
from prediction.threshold import origin_of
from utils import FlagError

PREDICT = ["--mode", "predict", "--gpu_ids", "-1", "--tta", "off", "--amp", "off", "--input", "in.tif", "--output"]
TEST = ["--mode", "test", "--gpu_ids", "-1", "--tta", "off"]
THREE = replace(DATA, class_values=[0, 1, 2], class_names=["a", "b", "c"], class_share=[0.4, 0.3, 0.3])


@pytest.fixture
def net(work):
    """A network with threshold 0.3, of whose two classes the first is the background, and an image."""
    tifffile.imwrite("in.tif", np.random.default_rng(0).integers(0, 255, (60, 50)).astype(np.uint8))
    return write_network("unet", {"nch_ker": 2}, threshold=0.3)


@pytest.mark.parametrize("background", ["membrane", "cell"])
def test_threshold_is_that_of_the_foreground_in_all_outputs(net, work, capsys, background):
    predictor, pixels = load(net, background=background), tifffile.imread("in.tif")
    cell = predict_array(predictor, pixels, tta=False)
    flags = ["--what", "mask,cells", "--background", background, "--min_size", "0", "--fill_holes", "off"]
    for threshold, of_cell in ((None, 0.3), (0.6, 0.6 if background == "membrane" else 0.4)):
        given = [] if threshold is None else ["--threshold", str(threshold)]
        assert main.main([*PREDICT, "out.npy", *flags, *given]) == 0
        assert np.array_equal(np.load("out-mask.npy").squeeze() > 0, cell > of_cell)
        cells = np.load("out-cells.npy").squeeze()
        assert np.array_equal(cells > 0, cell > of_cell if background == "membrane" else cell <= of_cell)
        found = predict_array(predictor, pixels, tta=False, what="cells", threshold=threshold, min_size=0)
        assert np.array_equal(found, cells)
        of_foreground = of_cell if background == "membrane" else 1 - of_cell
        origin = "--threshold" if given else "that of the checkpoint"
        assert f"threshold {of_foreground:g}, {origin}\n" in capsys.readouterr().out


def test_threshold_out_of_place_is_refused(net, work, fails):
    write_network("three", {"nch_ker": 2}, THREE)
    for argv, words in (
        (
            [*PREDICT, "o.npy", "--threshold", "0.5"],
            "--threshold 0.5: applies to mask, labels, cells, table, overlay, rois: add mask",
        ),
        ([*PREDICT, "o.npy", "--what", "mask", "--threshold", "1.5"], "--threshold 1.5: must lie in [0, 1]"),
        (
            [*PREDICT, "o.npy", "--what", "mask", "--threshold", "0.5", "--scope", "three"],
            "of 3 classes the most probable",
        ),
        ([*SMALL, "--threshold", "0.5"], "--threshold 0.5: applies to --mode test or predict or export"),
    ):
        assert words in fails(main.main, argv, 2)
    with pytest.raises(FlagError, match=r"threshold 2: must lie in \[0, 1\]"):
        predict_array(load(net), np.zeros((20, 20), np.uint8), what="cells", threshold=2)


def test_threshold_of_a_test_is_in_its_results(trained, work, capsys):
    assert main.main([*TEST, "--threshold", "0.85"]) == 0
    assert "segments at 0.85, --threshold;" in capsys.readouterr().out
    results = work / "results" / "unet" / "em"
    scores = json.loads((results / "metrics.json").read_text())
    assert (scores["segment_threshold"], scores["threshold_origin"]) == (0.85, "--threshold")
    with (results / "metrics.csv").open() as file:
        assert [row["threshold"] for row in csv.DictReader(file)] == ["0.85", ""]
    assert "segments at 0.85, --threshold" in (results / "index.html").read_text()


def test_threshold_chosen_on_little_is_said(database, work, capsys):
    """One validation image is too few; the checkpoints of the last and the best epoch remember it."""
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    saved = checkpoint_of(work, 1)
    num_image, num_object = saved.chosen_on
    assert num_image == 1 and 0 < num_object < 100 and checkpoint_of(work, "best").chosen_on == saved.chosen_on
    words = f"{saved.threshold:g}, chosen on little (1 validation image(s), {num_object} objects): try others with"
    assert f"threshold {words}" in capsys.readouterr().out
    assert main.main(TEST) == 0
    assert f"segments at {words}" in capsys.readouterr().out
    tifffile.imwrite("in.tif", np.zeros((32, 32), np.uint8))
    assert main.main([*PREDICT, "out.npy", "--what", "mask"]) == 0
    assert f"threshold {words}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("chosen_on", "is_little"), [([3, 100], False), ([2, 100], True), ([3, 99], True), ([0, 0], False), (None, False)]
)
def test_threshold_is_chosen_on_little_below_three_images_or_a_hundred_objects(chosen_on, is_little):
    assert ("little" in origin_of(chosen_on)) == is_little


@pytest.mark.filterwarnings("ignore")  # exporters warn of themselves
def test_threshold_of_an_export_is_in_the_file(net, work, capsys):
    argv = ["--mode", "export", "--gpu_ids", "-1", "--format", "torchscript", "--output", "net.pt"]
    for given, threshold in (([], "0.3"), (["--threshold", "0.45"], "0.45")):
        assert main.main([*argv, *given]) == 0
        assert f"threshold {threshold}, " in capsys.readouterr().out
        extra = {"threshold": ""}
        torch.jit.load("net.pt", _extra_files=extra)
        assert extra == {"threshold": threshold.encode()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_threshold_of_a_package_is_in_its_description(net, work):
    yaml, _ = pytest.importorskip("yaml"), pytest.importorskip("bioimageio.core")
    argv = ["--mode", "export", "--gpu_ids", "-1", "--format", "bioimageio", "--output", "net.zip"]
    assert main.main([*argv, "--threshold", "0.45"]) == 0
    with zipfile.ZipFile("net.zip") as package:
        assert yaml.safe_load(package.read("rdf.yaml"))["config"]["threshold"] == 0.45
        assert "A pixel is cell where it is above 0.45" in package.read("README.md").decode()
