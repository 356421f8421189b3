"""The networks that come along, and the recipe that makes them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import ROOT, SMALL, write_stacks

import main
import run_make_database
from checkpoint import Checkpoint
from config import PRETRAINED, find_network
from predict import load, predict_array
from sources import phantom

LARGEST = 3.5e6  # [byte] of a file, two of which are under 7 MB


@pytest.mark.parametrize("name", PRETRAINED)
def test_file_has_no_more_than_a_prediction_or_a_start_needs(name):
    path = find_network(name)
    saved = Checkpoint.load(path)
    assert path.stat().st_size < LARGEST and not saved.optim and saved.average is None
    assert {value.dtype for value in saved.net.values() if value.dim() > 1} == {torch.float16}
    assert saved.arch["nch_ker"] == 16 and saved.info.num_class == 2 and saved.info.nch_in == 1


def test_nuclei_finds_drawn_nuclei():
    images, labels = phantom.nuclei_images(2, 256, 0)
    predictor = load("nuclei")
    for image, label in zip(images, labels, strict=True):
        cells = predict_array(predictor, image, what="cells")
        found, true = cells > 0, label > 0
        assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.85  # Dice
        assert cells.max() > 20


def test_em_finds_drawn_cells():
    images, labels = phantom.em_stack(1, 256, 0)
    probability = predict_array(load("em"), images[0])
    assert np.mean((probability > 0.5) == (labels[0] > 0)) > 0.8


def test_predict_takes_a_network_by_name(work, capfd, fails):
    images, _ = phantom.nuclei_images(1, 96, 0)
    tifffile.imwrite("x.tif", images[0])
    command = ["--mode", "predict", "--input", "x.tif", "--gpu_ids", "-1", "--what", "cells", "--output", "cells.tif"]
    assert main.main([*command, "--pretrained", "nuclei"]) == 0
    assert "nuclei.pth" in capfd.readouterr().out
    assert np.array_equal(tifffile.imread("cells.tif"), predict_array(load("nuclei"), images[0], what="cells"))
    line = fails(main.main, [*command, "--pretrained", "nuclei", "--scope", "a"], 2)
    assert "--pretrained nuclei --scope a: each names a network" in line
    assert "applies to --mode predict or export" in fails(main.main, ["--mode", "test", "--pretrained", "em"], 2)
    with pytest.raises(SystemExit):
        main.main([*command, "--pretrained", "cells"])
    assert "invalid choice: 'cells'" in capfd.readouterr().err


def test_a_file_of_that_name_comes_first(work):
    assert find_network("nuclei").is_absolute()
    Path("nuclei").mkdir()
    assert find_network("nuclei") == Path("nuclei") and find_network("unet") == Path("unet")


def test_training_begins_from_a_network_of_other_channels_and_classes(work, capfd):
    folder = write_stacks(work / "in", 5, (48, 48), values=(0, 100, 255), channels=3)
    source = ["--input", str(folder / "train-volume.tif"), "--label", str(folder / "train-labels.tif")]
    run_make_database.main(source)
    shape = [*SMALL[:2], "--nch_ker", "16", "--ny_load", "32", "--nx_load", "32", "--num_crop", "4"]
    assert main.main(["--mode", "train", *shape, "--num_epoch", "1", "--init_from", "nuclei"]) == 0
    out = capfd.readouterr().out
    assert "weights taken from" in out and "drawn at random: encoders.0.0.conv, fc" in out


@pytest.mark.parametrize("name", PRETRAINED)
def test_recipe_makes_a_file(work, name):
    images, labels = phantom.PHANTOMS[name](2, 64, 0)
    for folder, stack, planes in (("images", "train-volume", images), ("labels", "train-labels", labels)):
        (work / folder).mkdir()
        tifffile.imwrite(f"{stack}.tif", np.stack(planes) if name == "em" else planes[0], photometric="minisblack")
        for number, plane in enumerate(planes):
            tifffile.imwrite(f"{folder}/{number}.tif", plane, photometric="minisblack")
    small = ["--num_epoch", "1", "--nch_ker", "2", "--flags", "--ny_load 32 --nx_load 32 --num_crop 4"]
    command = [
        sys.executable,
        ROOT / "benchmarks" / "pretrain.py",
        name,
        "--data",
        work,
        "--output",
        "made.pth",
        *small,
    ]
    subprocess.run(command, check=True, timeout=120)
    assert Checkpoint.load(Path("made.pth")).net["fc.weight"].dtype == torch.float16
    assert predict_array(load("made.pth"), images[0]).shape == images[0].shape
