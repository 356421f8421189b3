"""What run_make_database makes of images and labels of many kinds, and what later readers make of the database."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import ROOT, SMALL, write_stacks
from PIL import Image

import main
from description import Origin, sample_origins
from run_make_database import main as make

RNG = np.random.default_rng(0)
FOLDERS = ["--input", "raw", "--label", "masks"]
TEST = ["--mode", "test", "--gpu_ids", "-1"]


def info(work, name="em"):
    return json.loads((work / "datasets" / name / "dataset.json").read_text())


def labels(work):
    folder = work / "datasets" / "em"
    return [np.load(folder / split / "00000.npy")["label"] for split in ("train", "val", "test")]


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, **options)
    else:
        Image.fromarray(pixels).save(path, **options)


def write_pairs(work, images, masks, names=("1.png", "2.png", "3.png")):
    for folder, of in (("raw", images), ("masks", masks)):
        for name, pixels in zip(names, of, strict=True):
            write(work / folder / name, pixels)


def noise(*shape, high=200):
    return RNG.integers(0, high, shape or (32, 40), np.uint8)


def halves():
    """A label whose left half is 0, and whose right is 255."""
    return np.repeat(np.uint8([[0, 255]]), 20, axis=1).repeat(32, axis=0)


# --- one writer, or readers


def make_killed(point, argv):
    """Make a database, and end the process before a rename; the first ones move the old entries away."""
    rename, names = Path.rename, []

    def cut(path, target):
        names.append(path.name)
        if len(names) == point:
            os._exit(9)
        return rename(path, target)

    Path.rename = cut
    return make(argv)


@pytest.mark.parametrize("point", [1, 2, 5, 8, 11])
def test_exchange_that_was_cut_off_is_completed_by_the_next_reader(trained, work, start, point):
    flags = ["--overwrite", "--synthetic", "12", "--size", "48", "--num_test", "2"]
    process = start(partial(make_killed, point), *flags)
    process.communicate()
    assert process.returncode == 9
    assert main.main(TEST) == 0
    assert len(list((work / "results/unet/em/images").glob("*-output.png"))) == 2
    assert tifffile.imread(trained / "train-volume.tif").shape[0] == 12
    assert sorted(path.name for path in trained.glob(".*")) == [] and info(work)["class_names"] == ["membrane", "cell"]


def _lost(folder):
    (folder / "dataset.json").unlink()


def _a_folder(folder):
    _lost(folder)
    (folder / "dataset.json").mkdir()


def _a_pipe(folder):
    _lost(folder)
    os.mkfifo(folder / "dataset.json")


def _a_file(folder):
    for file in (folder / "val").iterdir():
        file.unlink()
    (folder / "val").rmdir()
    (folder / "val").write_text("")


def _a_sample_is_a_pipe(folder):
    (folder / "train" / "00000.npy").unlink()
    os.mkfifo(folder / "train" / "00000.npy")


@pytest.mark.skipif(os.name == "nt", reason="needs pipes")
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_lost, "without their dataset.json"),
        (_a_folder, "dataset.json: not a file"),
        (_a_pipe, "dataset.json: not a file"),
        (_a_file, "val: not a folder"),
        (_a_sample_is_a_pipe, "00000.npy"),
    ],
)
def test_entries_that_are_missing_or_of_another_type_are_one_line(database, fails, spoil, words):
    spoil(database)
    assert words in fails(main.main, [*SMALL, "--num_epoch", "1"])


@pytest.mark.skipif(os.name == "nt", reason="needs flock")
@pytest.mark.parametrize("shared", [True, False], ids=["read", "written"])
def test_overwrite_does_not_replace_a_database_in_use(database, fails, shared):
    code = "import sys, pathlib, locks\nwith locks.locked(pathlib.Path(sys.argv[1]), '', shared=bool(sys.argv[2])):"
    command = [sys.executable, "-c", f"{code} print(flush=True), input()", str(database), "yes" * shared]
    before = (database / "dataset.json").read_bytes()
    with subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) as other:
        other.stdout.readline()
        assert "em is in use" in fails(make, ["--synthetic", "9", "--overwrite"])
        other.communicate("\n")
    assert (database / "dataset.json").read_bytes() == before


# --- the description

WRONG = [
    ("nch_in", "x"),
    ("nch_in", 0),
    ("class_values", 5),
    ("class_names", ["a"]),
    ("class_names", ["a", "a\x1b[31m"]),
    ("class_share", [0.3]),
    ("class_share", [float("nan"), 0.5]),
    ("mean", 1),
    ("mean", [10**400]),
    ("std", [0.0]),
    ("value_range", [0]),
    ("normalize", "both"),
    ("context", -1),
]


@pytest.mark.parametrize(("entry", "value"), WRONG)
def test_description_with_a_wrong_type_or_range_names_the_entry(database, fails, entry, value):
    text = json.dumps(json.loads((database / "dataset.json").read_text()) | {entry: value})
    (database / "dataset.json").write_text(text)
    assert f"dataset.json: {entry} is" in fails(main.main, [*SMALL, "--normalize", "data"])


def test_description_that_is_nested_too_deep_is_one_line(database, fails):
    (database / "dataset.json").write_text("[" * 100_000)
    assert "too deep" in fails(main.main, SMALL)


# --- the start and the flags


def test_help_imports_no_torch():
    code = "import sys, run_make_database as r\ntry: r.main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False" and "--name_data" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs SIGINT")
def test_interrupt_while_the_program_starts_is_one_line(work):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_make_database.py"), "--synthetic"],
        cwd=work,
        stderr=-1,
        stdout=-1,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.6)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[1]


@pytest.mark.parametrize(
    "argv",
    [
        ["--seed", "99999999999999999999"],
        ["--size", "1000000000"],
        ["--synthetic", "1000000000"],
        ["--synthetic", "10000", "--size", "16384"],
        ["--threshold", "nan"],
        ["--context", "99999999999999999999"],
    ],
)
def test_flags_with_numbers_beyond_sense_are_refused(work, fails, argv):
    assert argv[0] in fails(make, argv, status=2)
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("argv", [["--synthetic", "2"], ["--synthetic", "4", "--class_names", "a,b,c"]])
def test_synthetic_stack_that_makes_no_database_is_not_written(work, fails, argv):
    fails(make, ["--name_data", "new", "--size", "32", *argv])
    assert list(work.rglob("*.tif")) == []
    assert make(["--name_data", "new", "--size", "32", "--synthetic", "4"]) == 0


def test_split_that_is_empty_is_named_with_its_flags(database, work, fails):
    assert make(["--overwrite", "--num_test", "0"]) == 0
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    line = fails(main.main, TEST)
    assert "--split" in line and "--num_test" in line


# --- which classes


@pytest.mark.parametrize("value", ["300", "-1"])
def test_threshold_that_leaves_a_class_empty_is_refused(work, fails, value):
    write_stacks(work / "datasets" / "em")
    assert "from 0 to 255" in fails(make, ["--threshold", value])


def test_foreground_of_inverted_labels_is_class_1(database, work):
    before, share = labels(work)[0], info(work)["class_share"]
    assert make(["--overwrite", "--foreground", "0", "--class_names", "membrane,cell"]) == 0
    assert np.array_equal(labels(work)[0], 1 - before)
    assert (info(work)["class_values"], info(work)["class_names"]) == ([255, 0], ["cell", "membrane"])
    assert info(work)["class_share"] == share[::-1]
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    assert main.main(TEST) == 0
    assert json.loads((work / "results/unet/em/metrics.json").read_text())["foreground"] == "membrane"


# --- which images


def test_folders_that_hold_the_same_files_are_refused(work, fails):
    write(work / "all" / "1.tif", noise())
    assert "give only the images to --input" in fails(make, ["--input", "all", "--label", "all"])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (noise(5, 64, 64, high=255), [0, 255]),
        (noise(5, 64, 64, high=60), [0, 59]),
        (noise(5, 64, 64).astype(np.uint16) + 400, [400, 599]),
    ],
)
def test_value_range_of_pictures_is_that_of_the_pixels(work, image, expected):
    folder = write_stacks(work / "datasets" / "em", shape=(64, 64))
    image = image.copy()
    image[:, :2, 0] = 255 if image.dtype == np.uint8 else 65535  # rare bright pixels
    tifffile.imwrite(folder / "train-volume.tif", image, photometric="minisblack")
    assert make([]) == 0
    assert info(work)["value_range"] == pytest.approx(expected, abs=1)


def test_images_of_one_value_are_named_and_have_no_spread(work, capsys):
    folder = write_stacks(work / "datasets" / "em")
    tifffile.imwrite(folder / "train-volume.tif", np.full((5, 32, 32), 7, np.uint8), photometric="minisblack")
    assert make([]) == 0
    out = capsys.readouterr().out
    assert "warning: 5 image(s) have one value everywhere" in out and "mean 7, standard deviation 0" in out


def test_sources_of_one_name_are_told_apart_by_their_folders(work):
    for number in (1, 2, 10):
        write(work / f"all/{number}/images/img.tif", noise())
        for mask, pixels in enumerate((halves(), halves()[:, ::-1])):
            write(work / f"all/{number}/masks/{mask}.tif", pixels)
    assert make(["--input", "all/*/images/*.tif", "--label", "all/*/masks/*.tif"]) == 0
    names = {split: [sample["source"] for sample in of] for split, of in info(work)["samples"].items()}
    assert names == {"train": ["1/images/img.tif"], "val": ["2/images/img.tif"], "test": ["10/images/img.tif"]}
    sources = [source["name"] for source in info(work)["sources"]]
    masks = [f"{number}/masks/{mask}.tif" for number in (1, 2, 10) for mask in (0, 1)]
    assert sources == [*(f"{number}/images/img.tif" for number in (1, 2, 10)), *masks]
    assert sample_origins(work / "datasets/em", "test") == {"00000.npy": Origin("10/images/img.tif")}


def test_samples_may_be_more_than_files_may_be_open(work, capsys):
    resource = pytest.importorskip("resource")
    partial = halves()
    partial[:8] = 7
    write_pairs(work, [noise() for _ in range(40)], [partial] * 40, [f"{number}.png" for number in range(40)])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len([*Path("/dev/fd").iterdir()])
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 12, limits[1]))
    try:
        assert make([*FOLDERS, "--ignore", "7"]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "annotated: 75.0% of train, 75.0% of val, 75.0% of test" in capsys.readouterr().out


def test_database_and_checkpoint_without_later_entries_are_used(trained, work):
    """Neither has sizes, holes and grey values of classes, pixel sizes and places in a series."""
    later, of_sample = {"min_size", "fill_holes", "class_mean"}, {"pixel_size", "series", "frame_of_series", "frame"}
    description, path = info(work), work / "checkpoints/unet/em/model_epoch0001.pth"
    assert later <= description.keys()
    older = {name: value for name, value in description.items() if name not in later}
    older["samples"] = {
        split: [{name: value for name, value in sample.items() if name not in of_sample} for sample in samples]
        for split, samples in description["samples"].items()
    }
    (trained / "dataset.json").write_text(json.dumps(older))
    state = torch.load(path, weights_only=True)
    assert later <= state["data"].keys()
    torch.save(state | {"data": {name: value for name, value in state["data"].items() if name not in later}}, path)
    assert main.main(TEST) == 0
    scores = json.loads((work / "results/unet/em/metrics.json").read_text())
    assert scores["images"][0]["source"] == "train-volume.tif"
    predict = ["--mode", "predict", "--gpu_ids", "-1", "--input", "datasets/em/train-volume.tif", "--output", "o.npy"]
    assert main.main([*predict, "--what", "cells"]) == 0
    assert main.main([*SMALL, "--num_epoch", "2", "--train_continue", "on"]) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"imagej": True, "resolution": (2, 4), "metadata": {"axes": "ZYX", "unit": "um"}}, [0.25, 0.5]),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),  # of a print
        ({"imagej": True, "resolution": (2, 2), "metadata": {"axes": "ZYX", "unit": "pixel"}}, None),
        ({}, None),
    ],
)
def test_pixel_size_is_stored_where_the_image_has_one(work, options, expected):
    folder = write_stacks(work / "datasets" / "em")
    tifffile.imwrite(folder / "train-volume.tif", noise(5, 32, 32), photometric="minisblack", **options)
    assert make([]) == 0
    assert info(work)["samples"]["test"][0].get("pixel_size") == expected


def test_grey_images_among_rgb_become_rgb_also_in_the_profile(work):
    images = [noise(), noise(32, 40, 3), noise(), noise()]  # two for the training
    write_pairs(work, images, [halves()] * 4, ["1.png", "2.png", "3.png", "4.png"])
    assert make(FOLDERS) == 0
    assert info(work)["nch_in"] == 3 and len(info(work)["profile"]["mean"]) == 3
