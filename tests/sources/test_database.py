"""What run_make_database makes of images and labels of many kinds, and what later readers make of the database."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import ROOT, SMALL, write_stacks
from PIL import Image

import main
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


class Killed(BaseException):
    """What no part of the program catches."""


@pytest.mark.parametrize("point", [2, 3, 5])  # the first rename makes the new database count
def test_a_database_whose_exchange_was_cut_off_is_completed_by_who_reads_it(trained, work, monkeypatch, point):
    rename, names = Path.rename, []

    def cut(path, goal):
        names.append(path.name)
        if len(names) == point:
            raise Killed
        return rename(path, goal)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", cut)
        make(["--overwrite", "--synthetic", "12", "--size", "48", "--num_test", "2"])
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
        (_a_folder, "dataset.json: no file"),
        (_a_pipe, "dataset.json: no file"),
        (_a_file, "val: no folder"),
        (_a_sample_is_a_pipe, "00000.npy"),
    ],
)
def test_entries_that_are_missing_or_of_another_kind_are_one_line(database, fails, spoil, words):
    spoil(database)
    assert words in fails(main.main, [*SMALL, "--num_epoch", "1"])


@pytest.mark.skipif(os.name == "nt", reason="needs flock")
@pytest.mark.parametrize("shared", [True, False], ids=["read", "written"])
def test_a_database_in_use_is_not_replaced(database, fails, shared):
    code = "import sys, pathlib, utils\nwith utils.locked(pathlib.Path(sys.argv[1]), '', shared=bool(sys.argv[2])):"
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
def test_an_entry_of_a_wrong_type_or_range_is_named(database, fails, entry, value):
    text = json.dumps(json.loads((database / "dataset.json").read_text()) | {entry: value})
    (database / "dataset.json").write_text(text)
    assert f"dataset.json: {entry} is" in fails(main.main, [*SMALL, "--normalize", "data"])


def test_a_description_that_is_nested_too_deep_is_one_line(database, fails):
    (database / "dataset.json").write_text("[" * 100_000)
    assert "too deep" in fails(main.main, SMALL)


# --- the start and the flags


def test_help_imports_no_torch():
    code = "import sys, run_make_database as r\ntry: r.main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False" and "--name_data" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs SIGINT")
def test_ctrl_c_while_the_program_starts_is_one_line(work):
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
def test_numbers_beyond_sense_are_bad_flags(work, fails, argv):
    assert argv[0] in fails(make, argv, status=2)
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("argv", [["--synthetic", "2"], ["--synthetic", "4", "--class_names", "a,b,c"]])
def test_a_synthetic_stack_that_makes_no_database_is_not_written(work, fails, argv):
    fails(make, ["--name_data", "new", "--size", "32", *argv])
    assert list(work.rglob("*.tif")) == []
    assert make(["--name_data", "new", "--size", "32", "--synthetic", "4"]) == 0


def test_an_empty_split_is_named_with_what_chooses_it(database, work, fails):
    assert make(["--overwrite", "--num_test", "0"]) == 0
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    line = fails(main.main, TEST)
    assert "--split" in line and "--num_test" in line


# --- which classes


@pytest.mark.parametrize("value", ["300", "-1"])
def test_a_threshold_that_leaves_a_class_empty_is_refused(work, fails, value):
    write_stacks(work / "datasets" / "em")
    assert "from 0 to 255" in fails(make, ["--threshold", value])


@pytest.mark.parametrize("suffix", [".png", ".gif", ".tif"])
def test_classes_of_a_palette_are_its_indices(work, suffix):
    indices = RNG.integers(0, 3, (3, 32, 40), np.uint8)
    colours = np.uint8([[200, 0, 0], [0, 90, 0], [0, 0, 0]])  # by colour the order were 2, 1, 0
    for number, of in enumerate(indices):
        write(work / "raw" / f"{number}.png", noise())
        path = work / "masks" / f"{number}{suffix}"
        if suffix == ".tif":
            colormap = np.zeros((3, 256), np.uint16)
            colormap[:, :3] = colours.T * np.uint16(257)
            write(path, of, photometric="palette", colormap=colormap)
            continue
        path.parent.mkdir(exist_ok=True)
        picture = Image.fromarray(of).convert("P")
        picture.putpalette(colours.ravel().tolist())
        picture.save(path, optimize=False)
    assert make(FOLDERS) == 0
    assert info(work)["class_values"] == [0, 1, 2]
    assert all(map(np.array_equal, labels(work), indices))


def test_classes_of_different_palettes_are_their_colours(work, capsys):
    right = RNG.integers(0, 2, (3, 32, 40), np.uint8)
    for number, of in enumerate(right):
        write(work / "raw" / f"{number}.png", noise())
        swapped = number == 1
        picture = Image.fromarray(1 - of if swapped else of).convert("P")
        picture.putpalette([255, 0, 0, 0, 0, 0] if swapped else [0, 0, 0, 255, 0, 0])
        (work / "masks").mkdir(exist_ok=True)
        picture.save(work / "masks" / f"{number}.png")
    assert make(FOLDERS) == 0
    assert info(work)["class_values"] == [[0, 0, 0], [255, 0, 0]]
    assert all(map(np.array_equal, labels(work), right))
    assert "another palette" in capsys.readouterr().out


@pytest.mark.parametrize(("squares", "hint"), [(4, True), (9, False)])
def test_labels_that_seem_to_number_objects_are_asked_about(work, capsys, squares, hint):
    label = np.zeros((32, 32), np.uint8)
    for number in range(squares):  # from the fifth on they have the number of another
        top, left = divmod(number, 3)
        label[10 * top + 1 : 10 * top + 8, 10 * left + 1 : 10 * left + 8] = number % 4 + 1
    folder = write_stacks(work / "datasets" / "em")
    tifffile.imwrite(folder / "train-labels.tif", np.stack([label] * 5), photometric="minisblack")
    assert make([]) == 0
    assert ("--objects on" in capsys.readouterr().out) == hint


def test_masks_of_0_and_1_beside_those_of_0_and_255_are_refused(work, fails):
    write_pairs(work, [noise()] * 3, [halves(), halves() // 255, halves()])
    line = fails(make, FOLDERS)
    assert "masks/2.png has the values 0 and 1" in line and "masks/1.png 0 and 255" in line


@pytest.mark.parametrize(
    ("argv", "values", "names"),
    [
        (["--background", "7"], [7, 0, 3], ["c", "a", "b"]),
        (["--background", "7", "--objects", "off"], [7, 0, 3], ["c", "a", "b"]),
        ([], [0, 3, 7], ["a", "b", "c"]),
    ],
)
def test_the_background_is_class_0_and_names_go_with_the_values(work, argv, values, names, capsys):
    folder = write_stacks(work / "datasets" / "em", values=(0, 3, 7))
    assert make([*argv, "--class_names", "a,b,c"]) == 0
    assert (info(work)["class_values"], info(work)["class_names"]) == (values, names)
    label = tifffile.imread(folder / "train-labels.tif")[0]
    assert np.array_equal(np.array(values)[labels(work)[0]], label)
    assert f"class 0 (background): {names[0]}, label value {values[0]}" in capsys.readouterr().out


def test_the_foreground_of_inverted_labels_is_class_1(database, work):
    before, share = labels(work)[0], info(work)["class_share"]
    assert make(["--overwrite", "--foreground", "0", "--class_names", "membrane,cell"]) == 0
    assert np.array_equal(labels(work)[0], 1 - before)
    assert (info(work)["class_values"], info(work)["class_names"]) == ([255, 0], ["cell", "membrane"])
    assert info(work)["class_share"] == share[::-1]
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    assert main.main(TEST) == 0
    assert json.loads((work / "results/unet/em/metrics.json").read_text())["foreground"] == "membrane"


def test_the_background_may_be_a_colour(work):
    colours = np.uint8([[0, 0, 0], [255, 255, 255], [255, 0, 0]])
    write_pairs(work, [noise()] * 3, [colours[RNG.integers(0, 3, (32, 40))] for _ in range(3)])
    assert make([*FOLDERS, "--background", "255,255,255"]) == 0
    assert info(work)["class_values"][0] == [255, 255, 255]


@pytest.mark.parametrize(
    "argv",
    [
        ["--background", "9"],
        ["--background", "x"],
        ["--foreground", "1,2,3"],
        ["--background", "0", "--foreground", "0"],
        ["--background", "0", "--foreground", "0.0"],
        ["--background", "0", "--foreground", "9"],
    ],
)
def test_a_class_that_is_not_there_or_twice_is_refused(work, fails, argv):
    write_stacks(work / "datasets" / "em")
    assert argv[-2] in fails(make, argv)


# --- which images


@pytest.mark.parametrize(("colourful", "channels"), [(True, 3), (False, 1)])
def test_grey_and_rgb_images_go_together(work, capsys, colourful, channels):
    grey = noise()
    second = noise(32, 40, 3) if colourful else np.dstack([grey] * 3)
    write_pairs(work, [grey, second, grey], [halves()] * 3)
    assert make(FOLDERS) == 0
    images = [np.load(work / "datasets/em" / split / "00000.npy")["input"] for split in ("train", "val")]
    assert [image.shape[2] for image in images] == [channels] * 2
    assert np.array_equal(images[0], np.dstack([grey] * channels))
    assert "image(s) are grey" in capsys.readouterr().out


def test_types_are_named_plainly_and_byte_orders_go_together(work, fails):
    names = ("1.tif", "2.tif", "3.tif")
    images = [noise().astype(kind) for kind in (">u2", "<u2", "u2")]
    write_pairs(work, images, [halves()] * 3, names)
    tifffile.imwrite(work / "raw" / "1.tif", images[0], byteorder=">")
    assert make(FOLDERS) == 0
    write(work / "raw" / "1.tif", noise())
    assert "raw/2.tif, page 1 is uint16, raw/1.tif, page 1 uint8" in fails(make, [*FOLDERS, "--overwrite"])


def test_labels_that_a_pattern_of_images_matches_too_are_no_images(work, capsys):
    for number in (1, 2, 3):
        write(work / "all" / f"c{number}.tif", noise())
        write(work / "all" / f"c{number}_mask.tif", halves())
    assert make(["--input", "all/*.tif", "--label", "all/*_mask.tif"]) == 0
    assert {sample["source"] for of in info(work)["samples"].values() for sample in of} == {
        "c1.tif",
        "c2.tif",
        "c3.tif",
    }
    assert "3 image(s) of all/*.tif are labels" in capsys.readouterr().out


def test_folders_that_hold_the_same_files_are_refused(work, fails):
    write(work / "all" / "1.tif", noise())
    assert "name the images alone" in fails(make, ["--input", "all", "--label", "all"])


def test_a_folder_an_image_with_a_mask_an_object_becomes_objects(work, capsys):
    for name in "abc":
        write(work / "root" / name / "images" / f"{name}.png", noise())
        for number, columns in enumerate((np.s_[2:12], np.s_[12:20], np.s_[30:36])):  # the first two touch
            mask = np.zeros((32, 40), np.uint8)
            mask[4:20, columns] = 255
            write(work / "root" / name / "masks" / f"{number}{name}.png", mask)
    assert make(["--input", "root/*/images/*.png", "--label", "root/*/masks/*.png"]) == 0
    row = np.zeros(40, int)
    row[2:11] = row[13:20] = row[30:36] = 1
    assert labels(work)[0][10].tolist() == row.tolist()
    assert info(work)["class_names"] == ["background", "object"] and len(info(work)["sources"]) == 12
    assert "9 masks of 3 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (noise(5, 64, 64, high=255), [0, 255]),
        (noise(5, 64, 64, high=60), [0, 59]),
        (noise(5, 64, 64).astype(np.uint16) + 400, [400, 599]),
    ],
)
def test_pictures_show_the_grey_values_that_are_there(work, image, expected):
    folder = write_stacks(work / "datasets" / "em", shape=(64, 64))
    image = image.copy()
    image[:, :2, 0] = 255 if image.dtype == np.uint8 else 65535  # rare bright pixels
    tifffile.imwrite(folder / "train-volume.tif", image, photometric="minisblack")
    assert make([]) == 0
    assert info(work)["value_range"] == pytest.approx(expected, abs=1)
