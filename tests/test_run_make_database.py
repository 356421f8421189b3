import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from conftest import ROOT, SHARED, needs_isbi, write_stacks
from PIL import Image

from run_make_database import main
from sources import database


def load(folder, split="train", number=0):
    return np.load(folder / split / f"{number:05d}.npy")


def info(folder):
    return json.loads((folder / "dataset.json").read_text())


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_default_command_reads_the_stacks_in_the_database(work, capsys):
    folder = write_stacks(work / "datasets" / "em", num=12)
    assert main(["--dir_data", "./datasets", "--name_data", "em"]) == 0
    assert [len(list((folder / split).glob("[0-9]????.npy"))) for split in ("train", "val", "test")] == [10, 1, 1]
    volume, labels = tifffile.imread(folder / "train-volume.tif"), tifffile.imread(folder / "train-labels.tif")
    assert np.array_equal(load(folder, "test")["input"][..., 0], volume[11])
    assert np.array_equal(load(folder, "val")["label"] * 255, labels[10])
    facts = info(folder)
    assert facts["class_values"] == [0, 255]
    assert facts["mean"] == [pytest.approx(volume[:10].mean())]
    assert facts["std"] == [pytest.approx(volume[:10].std())]
    assert facts["class_share"][1] == pytest.approx((labels[:10] == 255).mean())
    assert facts["samples"]["test"] == [{"file": "00000.npy", "source": "train-volume.tif", "frame": 11}]
    assert [source["name"] for source in facts["sources"]] == ["train-volume.tif", "train-labels.tif"]
    out = capsys.readouterr().out
    assert "10 train, 1 val, 1 test" in out and "foreground" in out


def test_seed_gives_the_same_bytes_and_another_does_not(work):
    write_stacks(work / "s", num=10)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        argv = ["--name_data", name, "--input", "s/train-volume.tif", "--label", "s/train-labels.tif"]
        assert main([*argv, "--split", "random", "--seed", str(seed), "--num_val", "2"]) == 0
    a, b, c = (snapshot(work / "datasets" / name) for name in "abc")
    assert a == b != c
    frames = [s["frame"] for of in info(work / "datasets" / "a")["samples"].values() for s in of]
    assert sorted(frames) == list(range(10)) != frames


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [0, 3, 4])
def test_samples_have_the_type_and_channels_of_the_images(work, dtype, channels):
    folder = write_stacks(work / "datasets" / "em", dtype=dtype, channels=channels)
    assert main([]) == 0
    assert load(folder)["input"].dtype == dtype
    assert load(folder)["input"].shape == (32, 32, 3 if channels else 1)


@pytest.mark.parametrize("values", [(0, 255), (0, 1), (0, 1, 2), (3, 7, 20, 255)])
def test_label_values_are_mapped_to_classes_in_order(work, values, capsys):
    folder = write_stacks(work / "datasets" / "em", values=values)
    assert main([]) == 0
    labels = tifffile.imread(folder / "train-labels.tif")
    assert np.array_equal(np.array(values)[load(folder)["label"]], labels[0])
    assert info(folder)["class_values"] == list(values)
    out = capsys.readouterr().out
    assert all(f"label value {value}," in out for value in values)


def write_folders(work, names, label_names=None, sizes=None):
    rng = np.random.default_rng(0)
    for folder, of in (("raw", names), ("masks", label_names or names)):
        (work / folder).mkdir()
        for i, name in enumerate(of):
            size = (sizes or [(32, 40)] * len(of))[i]
            pixels = rng.integers(0, 2, size, np.uint8) * 255
            Image.fromarray(pixels).save(work / folder / name)
    return ["--input", "raw", "--label", "masks"]


def test_folders_are_paired_by_name_in_natural_order_with_any_size(work):
    argv = write_folders(work, [f"im{i}.png" for i in (9, 10, 11)], sizes=[(32, 33), (40, 50), (64, 32)])
    assert main(argv) == 0
    folder = work / "datasets" / "em"
    assert [load(folder, split).shape for split in ("train", "val", "test")] == [(32, 33), (40, 50), (64, 32)]
    assert [s["source"] for of in info(folder)["samples"].values() for s in of] == ["im9.png", "im10.png", "im11.png"]


def test_folders_whose_names_differ_are_paired_by_number(work):
    argv = write_folders(work, ["img_001.png", "img_002.png", "img_010.png"], ["mask1.tif", "mask2.tif", "mask10.tif"])
    assert main(argv) == 0
    label = np.asarray(Image.open(work / "masks" / "mask10.tif"))
    assert np.array_equal(load(work / "datasets" / "em", "test")["label"] * 255, label)


@pytest.mark.parametrize(
    ("names", "label_names"),
    [
        (
            ["21_training.tif", "30_training.tif", "31_training.tif"],
            ["21_manual1.gif", "30_manual1.gif", "31_manual1.gif"],
        ),
        (["0a_01.jpg", "0a_02.jpg", "b7_01.jpg"], ["0a_01_mask.gif", "0a_02_mask.gif", "b7_01_mask.gif"]),
        (["cell.png", "x3.png", "x20.png"], ["mask_cell.png", "mask_x3.png", "mask_x20.png"]),
    ],
)
def test_folders_whose_names_differ_by_what_all_have_are_paired(work, names, label_names):
    argv = write_folders(work, names, label_names)
    assert main(argv) == 0
    samples = [load(work / "datasets" / "em", split)["label"] * 255 for split in ("train", "val", "test")]
    for sample, name in zip(samples, label_names, strict=True):
        with Image.open(work / "masks" / name) as label:
            assert np.array_equal(sample, label.convert("L"))


def test_patterns_in_one_folder_are_paired_by_name(work, fails):
    write_folders(work, ["7_img.png", "8_img.png", "9_img.png", "7_mask.png", "8_mask.png", "9_mask.png"])
    assert main(["--input", "raw/*_img.png", "--label", "raw/*_mask.png"]) == 0
    with Image.open(work / "raw" / "8_mask.png") as label:
        assert np.array_equal(load(work / "datasets" / "em", "val")["label"] * 255, label)
    (work / "raw" / "8_mask.png").rename(work / "raw" / "6_mask.png")
    line = fails(main, ["--input", "raw/*_img.png", "--label", "raw/*_mask.png", "--overwrite"])
    assert "raw/8_img.png" in line and "raw/6_mask.png" in line


def test_partners_are_not_files_of_other_numbers(work, fails):
    line = fails(main, write_folders(work, ["s10.png", "s11.png", "s12.png"], ["s20.png", "s21.png", "s22.png"]))
    assert "raw/s10.png" in line and "masks/s22.png" in line


def test_gif_of_several_images_is_refused(work, fails):
    argv = write_folders(work, ["1.png", "2.png", "3.png"], ["1.gif", "2.gif", "3.gif"])
    pages = [Image.fromarray(np.full((32, 40), value, np.uint8)) for value in (0, 255)]
    pages[0].save(work / "masks" / "2.gif", save_all=True, append_images=pages[1:])
    assert "masks/2.gif: 2 images" in fails(main, argv)


def test_partners_that_are_missing_are_listed(work, fails):
    argv = write_folders(work, ["a.png", "b.png", "c.png"], ["a.png", "b.png", "d.png"])
    line = fails(main, argv)
    assert "raw/c.png" in line and "masks/d.png" in line
    assert not (work / "datasets" / "em" / "train").exists()


def test_colours_are_classes(work):
    argv = write_folders(work, ["1.png", "2.png", "3.png"])
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)
    for path in (work / "masks").iterdir():
        Image.fromarray(colours[np.arange(32 * 40).reshape(32, 40) % 3]).save(path)
    assert main([*argv, "--class_names", "none, blue, red"]) == 0
    folder = work / "datasets" / "em"
    assert info(folder)["class_values"] == [[0, 0, 0], [0, 0, 255], [255, 0, 0]]
    assert info(folder)["class_names"] == ["none", "blue", "red"]
    assert load(folder)["label"][0, :3].tolist() == [0, 2, 1]


@pytest.mark.parametrize(("dtype", "values"), [(bool, [0, 255]), (np.float32, [0, 1]), (np.uint16, [0, 1])])
def test_labels_of_any_type_are_read(work, dtype, values):
    folder = write_stacks(work / "datasets" / "em", values=(0, 1))
    labels = tifffile.imread(folder / "train-labels.tif")
    tifffile.imwrite(folder / "train-labels.tif", labels.astype(dtype), photometric="minisblack")
    assert main([]) == 0
    assert np.array_equal(load(folder)["label"], labels[0])
    assert info(folder)["class_values"] == values


@pytest.mark.parametrize(
    ("values", "flags", "named"),
    [
        ((0, 255), [], {"background": 0, "foreground": 255}),
        ((0, 255), ["--foreground", "0"], {"background": 255, "foreground": 0}),
        ((0, 255), ["--threshold", "9"], {"background": "<= 9", "foreground": "> 9"}),
        ((0, 1, 7), [], {"0": 0, "1": 1, "7": 7}),
    ],
)
def test_two_classes_without_names_are_background_and_foreground(work, values, flags, named):
    folder = write_stacks(work / "datasets" / "em", values=values)
    assert main(flags) == 0
    assert dict(zip(info(folder)["class_names"], info(folder)["class_values"], strict=True)) == named


def test_grey_saved_as_rgb_is_grey(work):
    argv = write_folders(work, ["1.png", "2.png", "3.png"])
    for path in (work / "masks").iterdir():
        Image.open(path).convert("RGB").save(path)
    assert main(argv) == 0
    assert info(work / "datasets" / "em")["class_values"] == [0, 255]


def test_interpolated_mask_is_refused_but_with_a_threshold(work, fails):
    folder = write_stacks(work / "datasets" / "em")
    labels = np.tile(np.arange(64, dtype=np.uint8) * 4, (5, 16, 1)).reshape(5, 32, 32)
    tifffile.imwrite(folder / "train-labels.tif", labels, photometric="minisblack")
    line = fails(main, [])
    assert "64 distinct" in line and "--threshold" in line and "--objects on" in line and "(1.6%)" in line
    assert main(["--threshold", "127"]) == 0
    assert np.array_equal(load(folder)["label"], labels[0] > 127)
    assert info(folder)["class_values"] == ["<= 127", "> 127"]


def test_objects_become_two_classes_with_a_gap_where_they_touch(work, fails):
    folder = write_stacks(work / "datasets" / "em")
    numbers = np.zeros((5, 32, 32), np.uint16)
    numbers[:, 4:12, 4:12], numbers[:, 4:12, 12:20], numbers[:, 20:30, 8:28] = 300, 2, 40
    tifffile.imwrite(folder / "train-labels.tif", numbers, photometric="minisblack")
    assert "leave one out" in fails(main, ["--objects", "on", "--threshold", "0"])
    assert main(["--objects", "on"]) == 0
    expected = numbers[0] > 0
    expected[4:12, 11:13] = False
    assert np.array_equal(load(folder)["label"], expected)
    assert info(folder)["class_values"] == ["background", "object"]


@pytest.mark.parametrize("argv", [["--objects", "on"], ["--threshold", "0"]])
def test_colours_can_not_become_two_classes(work, fails, argv):
    folder = write_stacks(work / "datasets" / "em", num=3)
    colours = np.random.default_rng(0).integers(0, 2, (3, 32, 32, 3), np.uint8) * 255
    tifffile.imwrite(folder / "train-labels.tif", colours, photometric="rgb")
    assert "colours" in fails(main, argv)


def test_images_without_labels_are_all_for_the_test(work):
    write_stacks(work / "datasets" / "em")
    assert main(["--label", "none"]) == 0
    assert load(work / "datasets" / "em", "test", 4).dtype.names == ("input",)


def test_overwrite_replaces_a_database_and_leaves_its_stacks(work, fails):
    folder = write_stacks(work / "datasets" / "em", num=6)
    assert main([]) == 0
    before = snapshot(folder)
    assert "--overwrite" in fails(main, ["--num_val", "3"])
    assert snapshot(folder) == before
    assert main(["--num_val", "3", "--overwrite"]) == 0
    assert len(list((folder / "val").iterdir())) == 3
    assert snapshot(folder)["train-volume.tif"] == before["train-volume.tif"]


def test_overwrite_that_fails_leaves_the_old_database(work, fails, monkeypatch):
    folder = write_stacks(work / "datasets" / "em")
    assert main([]) == 0
    before = snapshot(folder)
    assert "2 classes" in fails(main, ["--overwrite", "--class_names", "a,b,c"])
    monkeypatch.setattr(database, "sources_of", lambda *_: signal.raise_signal(signal.SIGINT))
    assert main(["--overwrite"]) == 130
    assert snapshot(folder) == before


KILLED = """
import os, signal, run_make_database
from sources import writing
writing.sha256 = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # the samples are written, dataset.json is not
run_make_database.main(["--overwrite", "--num_val", "2"])
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_overwrite_that_is_killed_leaves_the_old_database(work):
    folder = write_stacks(work / "datasets" / "em")
    assert main([]) == 0
    before = snapshot(folder)
    killed = subprocess.run([sys.executable, "-c", KILLED], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((folder / ".partial" / "val").iterdir())) == 2
    assert {path: content for path, content in snapshot(folder).items() if path[0] != "."} == before
    assert main(["--overwrite", "--num_val", "3"]) == 0
    assert [len(list((folder / split).glob("[0-9]????.npy"))) for split in ("train", "val", "test")] == [1, 3, 1]
    assert not (folder / ".partial").exists() and not (folder / ".lock").exists()


def test_synthetic_makes_stacks_and_database(work):
    assert main(["--synthetic", "5", "--size", "32", "--name_data", "demo"]) == 0
    folder = work / "datasets" / "demo"
    assert tifffile.imread(folder / "train-volume.tif").shape == (5, 32, 32)
    assert info(folder)["class_names"] == ["membrane", "cell"]


def test_synthetic_does_not_replace_a_stack(work, fails):
    folder = write_stacks(work / "datasets" / "em")
    before = snapshot(folder)
    assert "would be replaced" in fails(main, ["--synthetic", "5"])
    assert snapshot(folder) == before


def _labels(folder, labels, photometric="minisblack"):
    tifffile.imwrite(folder / "train-labels.tif", labels, photometric=photometric)


def _one_colour_image(folder):
    for name in ("train-volume.tif", "train-labels.tif"):  # as three sections are saved by default
        tifffile.imwrite(folder / name, np.zeros((3, 32, 32), np.uint8), photometric="rgb")


def _truncate(folder):
    path = folder / "train-volume.tif"
    path.write_bytes(path.read_bytes()[:3000])


def _nan(folder):
    tifffile.imwrite(folder / "train-volume.tif", np.full((5, 32, 32), np.nan, np.float32), photometric="minisblack")


@pytest.mark.parametrize(
    ("spoil", "argv", "words"),
    [
        (lambda f: (f / "train-volume.tif").unlink(), [], "no such file or folder: give --input"),
        (
            lambda f: (f / "train-labels.tif").unlink(),
            [],
            "no such file or folder: give --label LABELS, or --label none",
        ),
        (lambda f: _labels(f, np.zeros((4, 32, 32), np.uint8)), [], "5 pages"),
        (lambda f: _labels(f, np.zeros((5, 32, 30), np.uint8)), [], "(32, 30)"),
        (lambda f: _labels(f, np.zeros((5, 32, 32), np.uint8)), [], "the same value"),
        (_truncate, [], "truncated"),
        (lambda f: (f / "train-labels.tif").write_bytes(b""), [], "train-labels.tif"),
        (_nan, [], "NaN"),
        (lambda f: None, ["--num_test", "5"], "none is left for training"),
        (_one_colour_image, [], "train-volume.tif is one image of 3 channels: if these are sections"),
        (
            lambda f: _labels(f, np.zeros((3, 32, 32), np.uint8), "rgb"),
            [],
            "train-labels.tif is one image of 3 channels",
        ),
        (lambda f: None, ["--class_names", "a/b,c"], "--class_names"),
        (lambda f: None, ["--label", "nowhere"], "nowhere"),
    ],
)
def test_input_that_is_bad_is_one_line_and_nothing_is_written(work, fails, spoil, argv, words):
    folder = write_stacks(work / "datasets" / "em")
    spoil(folder)
    before = snapshot(work)
    assert words in fails(main, argv)
    assert snapshot(work) == before


def test_image_that_is_unreadable_or_odd_is_named(work, fails):
    argv = write_folders(work, ["1.png", "2.png", "3.png"])
    Image.fromarray(np.zeros((32, 40), np.uint16)).save(work / "raw" / "3.png")
    assert "raw/3.png is uint16" in fails(main, argv)
    (work / "raw" / "3.png").write_bytes(b"no image")
    assert "raw/3.png" in fails(main, argv)


@needs_isbi
def test_isbi_stack_becomes_a_database_of_its_pages(work, capsys):
    isbi = SHARED / "isbi2012"
    argv = ["--input", str(isbi / "train-volume.tif"), "--label", str(isbi / "train-labels.tif")]
    assert main([*argv, "--num_val", "3", "--num_test", "3", "--class_names", "membrane,cell"]) == 0
    folder = work / "datasets" / "em"
    labels = np.concatenate(
        [load(folder, split, i)["label"] for split, i in (("train", 0), ("train", 23), ("test", 2))]
    )
    assert labels.shape == (3 * 512, 512)
    assert np.array_equal(load(folder, "test", 2)["input"][..., 0], tifffile.imread(isbi / "train-volume.tif")[29])
    assert "24 train, 3 val, 3 test" in capsys.readouterr().out


def test_synthetic_nuclei_make_folders_of_images_of_different_sizes(work):
    flags = ["--synthetic", "6", "--size", "48", "--name_data", "n", "--phantom", "nuclei"]
    assert main(flags) == 0
    folder = work / "datasets" / "n"
    info = json.loads((folder / "dataset.json").read_text())
    assert info["class_names"] == ["background", "nucleus"]
    shapes = {np.load(path).shape for path in folder.rglob("*.npy")}
    assert len(shapes) == 6
    assert main([*flags, "--synthetic", "4", "--overwrite"]) == 0
    assert len(list((folder / "images").iterdir())) == len(list((folder / "labels").iterdir())) == 4


def test_input_of_several_files_equals_a_pattern(work):
    write_folders(work, [f"im{i}.png" for i in (9, 10, 11)])
    images, labels = (sorted(str(path) for path in (work / name).iterdir()) for name in ("raw", "masks"))
    assert images[0].endswith("im10.png")
    assert main(["--input", *images, "--label", *labels]) == 0
    assert main(["--input", "raw/*.png", "--label", "masks/*.png", "--name_data", "b"]) == 0
    several, pattern = (info(work / "datasets" / name) for name in ("em", "b"))
    assert several["samples"] == pattern["samples"] and several["sources"] == pattern["sources"]
    assert several["samples"]["train"][0]["source"] == "im9.png"


@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_arrays_make_a_database(work, kind):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 255, (3, 32, 40)).astype(np.uint8), rng.integers(0, 2, (3, 32, 40), np.uint8)
    for name, stack in (("raw", pixels), ("masks", labels)):
        (work / name).mkdir()
        for number, page in enumerate(stack):
            if kind == "npy":
                np.save(work / name / f"{number}.npy", page)
        if kind == "zarr":
            pytest.importorskip("zarr").create_array(work / f"{name}.zarr", data=stack)
    ending = ".zarr" if kind == "zarr" else ""
    assert main(["--input", f"raw{ending}", "--label", f"masks{ending}"]) == 0
    assert np.array_equal(load(work / "datasets" / "em")["input"][..., 0], pixels[0])
    assert len({*(source["sha256"] for source in info(work / "datasets" / "em")["sources"])}) == (
        6 if not ending else 2
    )


def test_report_calls_no_words_label_values(work, capsys):
    folder = write_stacks(work / "datasets" / "em", values=(0, 3, 4))
    assert main(["--input", str(folder / "train-volume.tif"), "--objects", "on"]) == 0
    out = capsys.readouterr().out
    assert "class 0 (background): background, 9" in out and "label value" not in out
