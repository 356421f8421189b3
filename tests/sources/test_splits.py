import json

import numpy as np
import pytest
import tifffile
from conftest import SMALL, write_stacks
from PIL import Image

from main import main as program
from run_make_database import main
from sources.splits import cut_regions

ALL = ("train", "val", "test")


def info(work, name="em"):
    return json.loads((work / "datasets" / name / "dataset.json").read_text())


def sample(work, split, number=0):
    return np.load(work / "datasets" / "em" / split / f"{number:05d}.npy")


def write_image(shape, folder="em", label=None):
    """One image whose grey value is the number of its row or column, along the longer side."""
    axis = int(shape[1] > shape[0])
    image = np.indices(shape)[axis].astype(np.uint16)
    label = np.random.default_rng(0).integers(0, 2, shape, np.uint8) if label is None else label
    for name, pixels in (("raw", image), ("mask", label)):
        tifffile.imwrite(f"{name}.tif", pixels, photometric="minisblack")
    return ["--input", "raw.tif", "--label", "mask.tif", "--name_data", folder]


# --- regions


@pytest.mark.parametrize(("shape", "margin"), [((40, 600), 32), ((600, 40), 32), ((511, 40), 8), ((130, 130), 8)])
def test_regions_of_one_image_are_disjoint_and_apart(work, capsys, shape, margin):
    assert main([*write_image(shape), "--split", "region"]) == 0
    wide, length = shape[1] > shape[0], max(shape)
    regions = {split: sample(work, split)["input"][..., 0] for split in ALL}
    lines = {split: np.unique(pixels).tolist() for split, pixels in regions.items()}  # grey value = position
    assert all(of == list(range(of[0], of[-1] + 1)) for of in lines.values())
    assert lines["train"][0] == 0 and lines["test"][-1] == length - 1
    assert lines["val"][0] - lines["train"][-1] == lines["test"][0] - lines["val"][-1] == margin + 1
    assert all(len(lines[split]) == max(32, -(-length // 10)) for split in ("val", "test"))
    assert all(pixels.shape[1 - wide] == min(shape) for pixels in regions.values())
    key = "columns" if wide else "rows"
    assert all(info(work)["samples"][s][0][key] == [lines[s][0], lines[s][-1]] for s in ALL)
    out = capsys.readouterr().out
    assert f"regions of 1 image(s), cut along the longer side; {margin} px between them are dropped" in out
    assert "1 train, 1 val, 1 test" in out


def test_regions_of_one_image_are_trained_and_tested(work):
    assert main([*write_image((40, 300)), "--split", "region"]) == 0
    assert program([*SMALL, "--num_epoch", "1"]) == 0
    assert program(["--mode", "test", "--gpu_ids", "-1", "--tta", "off"]) == 0
    with Image.open("results/unet/em/images/0000-output.png") as output:
        assert output.size == (32, 40)


def test_regions_cut_labels_and_neighbouring_sections_with_the_image(work):
    folder = write_stacks(work / "datasets" / "em", num=3, shape=(40, 200))
    assert main(["--split", "region", "--context", "1"]) == 0
    volume, labels = (tifffile.imread(folder / f"train-{name}.tif") for name in ("volume", "labels"))
    first, last = info(work)["samples"]["val"][1]["columns"]
    middle = sample(work, "val", 1)
    assert np.array_equal(middle["input"], np.moveaxis(volume[:, :, first : last + 1], 0, -1))
    assert np.array_equal(middle["label"] * 255, labels[1, :, first : last + 1])
    assert len(list((work / "datasets/em/train").glob("[0-9]????.npy"))) == 3


@pytest.mark.parametrize(("flag", "left"), [("--num_val", ("train", "test")), ("--num_test", ("train", "val"))])
def test_regions_leave_out_a_split_of_0(work, flag, left):
    assert main([*write_image((40, 300)), "--split", "region", flag, "0"]) == 0
    columns = {split: of[0]["columns"] for split, of in info(work)["samples"].items() if of}
    assert columns == dict(zip(left, ([0, 259], [268, 299]), strict=True))


def test_regions_share_the_annotation_and_not_the_length():
    weight = np.zeros(1000, int)
    weight[300:500] = 5
    regions = cut_regions(weight, ALL, "x")
    assert [weight[regions[split]].sum() // 5 for split in ("val", "test")] == [32, 20]
    assert weight[regions["train"]].sum() == 5 * (200 - 20 - 8 - 32 - 8)
    assert (regions["train"].stop + 8, regions["val"].stop + 8) == (regions["val"].start, regions["test"].start)


@pytest.mark.parametrize("seed", range(20))
def test_regions_of_any_strokes_are_apart_and_annotated(seed):
    rng = np.random.default_rng(seed)
    weight = (rng.random(rng.integers(200, 2000)) < 0.1) * rng.integers(1, 50)
    regions = cut_regions(weight, ALL, "x")
    assert all(weight[regions[split]].sum() * 10 >= weight.sum() for split in ALL)
    assert all(region.stop - region.start >= 32 for region in regions.values())
    margin = 32 if np.ptp(np.flatnonzero(weight)) + 1 >= 512 else 8
    ends = [regions[split].stop for split in ("train", "val")]
    assert [regions[split].start for split in ("val", "test")] == [end + margin for end in ends]


def test_regions_of_all_pages_are_the_same_and_blank_ones_are_left_out(work, capsys):
    write_image((40, 300))
    label = np.full((4, 40, 300), 9, np.uint8)
    label[0, :, :150] = label[1, :, 150:] = label[3, :, 140:200] = np.arange(40)[:, None] % 2
    tifffile.imwrite("mask.tif", label, photometric="minisblack")
    tifffile.imwrite("raw.tif", label, photometric="minisblack")
    argv = ["--input", "raw.tif", "--label", "mask.tif", "--split", "region", "--ignore", "9"]
    assert main(argv) == 0
    samples = info(work)["samples"]
    assert len({tuple(one["columns"]) for one in samples["train"]}) == len(samples["test"]) == 1
    assert [one["frame"] for one in samples["train"]] == [0, 1, 3] and samples["test"][0]["frame"] == 1
    for split, of in samples.items():
        for number, one in enumerate(of):
            part = label[one["frame"], :, one["columns"][0] : one["columns"][1] + 1]
            assert np.array_equal(sample(work, split, number)["label"], np.where(part == 9, 255, part))
            assert (part != 9).any()
    assert "left out: 1 image(s) without an annotated pixel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "flags", "words"),
    [
        ((111, 40), [], "the longer side, 111 px long, 111 px of it annotated, is too short for 3 regions of 32 px"),
        ((71, 71), ["--num_val", "0"], "too short for 2 regions"),
    ],
)
def test_regions_of_an_image_that_is_too_small_are_one_line(work, fails, shape, flags, words):
    line = fails(main, [*write_image(shape), "--split", "region", *flags])
    assert words in line and line.startswith("error: raw.tif, page 1: ")
    assert not (work / "datasets").exists()
    assert main([*write_image((shape[0] + 1, 40)), "--split", "region", *flags]) == 0


# --- folds


@pytest.mark.parametrize("split", ["contiguous", "random"])
@pytest.mark.parametrize(("num", "total"), [(7, 3), (5, 5), (10, 4)])
def test_folds_test_each_sample_once_and_have_it_in_one_split(work, split, num, total):
    folder = write_stacks(work / "s", num=num)
    stacks = ["--input", str(folder / "train-volume.tif"), "--label", str(folder / "train-labels.tif")]
    folds = []
    for number in range(1, total + 1):
        argv = [*stacks, "--split", split, "--seed", "3", "--fold", f"{number}/{total}", "--overwrite"]
        assert main(argv) == 0
        assert info(work)["split"] == {"kind": split, "seed": 3, "fold": f"{number}/{total}"}
        folds.append({name: [one["frame"] for one in of] for name, of in info(work)["samples"].items()})
        assert sorted(frame for of in folds[-1].values() for frame in of) == list(range(num))
    assert sorted(frame for fold in folds for frame in fold["test"]) == list(range(num))
    assert [fold["val"] for fold in folds] == [fold["test"] for fold in (folds[-1], *folds[:-1])]
    contiguous = all(fold["test"] == list(range(fold["test"][0], fold["test"][-1] + 1)) for fold in folds)
    assert contiguous == (split == "contiguous") or num == total


@pytest.mark.parametrize(
    ("flags", "words", "status"),
    [
        (["--fold", "3/6"], "--fold 3/6: 5 image(s): N must be at most that", 1),
        (["--fold", "6/5"], "--fold 6/5: must be K/N", 2),
        (["--fold", "0/5"], "must be K/N", 2),
        (["--fold", "1/2"], "must be K/N", 2),
        (["--fold", "2"], "must be K/N", 2),
        (["--fold", "1/5", "--num_test", "0"], "--fold 1/5 --num_test 0", 2),
        (["--fold", "1/5", "--split", "region"], "--fold 1/5 --split region", 2),
        (["--split", "region", "--num_val", "2"], "--split region --num_val 2", 2),
        (["--label", "none", "--fold", "1/5"], "--label none --fold 1/5", 2),
        (["--label", "none", "--split", "region"], "--label none --split region", 2),
        (["--label", "none", "--ignore", "0"], "--label none --ignore 0", 2),
        (["--label", "none", "--class_names", "a,b"], "--label none --class_names a,b: images without labels have", 2),
        (["--label", "none", "--objects", "on"], "--label none --objects on", 2),
        (["--label", "none", "--threshold", "0"], "--label none --threshold 0", 2),
        (["--label", "none", "--num_test", "2"], "--label none --num_test 2", 2),
        (["--size", "64"], "--size 64: applies to --synthetic only", 2),
        (["--download", "--phantom", "rare"], "--phantom rare: applies to --synthetic only", 2),
        (["--url", "x"], "--url x: applies to --download only", 2),
        (["--synthetic", "5", "--input", "a", "b"], "--input and --synthetic: each says which images to use", 2),
        (["--info", "a", "--input", "b"], "--info and --input: each says which images to use", 2),
        (["--synthetic", "5", "--label", "a"], "--label a: the images of --synthetic have labels: leave it out", 2),
        (["--name_data", "../em"], "--name_data '../em' is not a folder name", 2),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(work, fails, flags, words, status):
    write_stacks(work / "datasets" / "em")
    assert words in fails(main, flags, status)


def test_folds_are_of_what_is_annotated(work):
    for folder in ("raw", "masks"):
        (work / folder).mkdir()
        for number in range(6):
            pixels = np.indices((32, 32))[0].astype(np.uint8) % 2 if number % 2 else np.full((32, 32), 9, np.uint8)
            Image.fromarray(pixels).save(work / folder / f"{number}.png")
    assert main(["--input", "raw", "--label", "masks", "--ignore", "9", "--fold", "1/3"]) == 0
    assert [info(work)["samples"][split][0]["source"] for split in ALL] == ["3.png", "5.png", "1.png"]


@pytest.mark.parametrize(("num", "argv", "advised"), [(3, (), True), (4, (), False), (3, ("--num_test", "0"), False)])
def test_few_images_of_which_most_do_not_train_are_said(work, capfd, num, argv, advised):
    write_stacks(work / "datasets" / "em", num)
    assert main([*argv]) == 0
    line = "of 3 images 1 train: to train on all add --num_val 0 --num_test 0, or --split region"
    assert (line in capfd.readouterr().out) == advised
