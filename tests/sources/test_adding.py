"""What `--add` makes of a database that is there, and which images stay in which set."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import tifffile
from conftest import SMALL
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_database import make_killed

import main
from images.writers import PREDICTED
from run_make_database import main as make

RNG = np.random.default_rng(0)
MADE = ["--input", "raw", "--label", "masks"]
ADD = ["--add", "new", "--label", "new_masks"]


def noise(*shape, high=200, dtype=np.uint8):
    return RNG.integers(0, high, shape or (32, 40)).astype(dtype)


def halves(low=0, high=255):
    """A label whose left half has one value, and whose right another."""
    return np.where(np.arange(40) < 20, low, high).astype(np.uint8)[None].repeat(32, axis=0)


def write(folder, images, first=0):
    folder.mkdir(exist_ok=True)
    for number, pixels in enumerate(images, first):
        tifffile.imwrite(folder / f"{number}.tif", pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack")


def write_pairs(work, label, *, num=4, num_new=2, new_label=None, shape=(32, 40)):
    """Images and labels in `raw` and `masks`, and others in `new` and `new_masks`."""
    write(work / "raw", [noise(*shape) for _ in range(num)])
    write(work / "masks", [label] * num)
    write(work / "new", [noise(*shape) for _ in range(num_new)], num)
    write(work / "new_masks", [label if new_label is None else new_label] * num_new, num)


def info(work):
    return json.loads((work / "datasets/em/dataset.json").read_text())


def sample(work, split, number=0):
    return np.load(work / f"datasets/em/{split}/{number:05d}.npy")


def numbers(work):
    return [len(list((work / "datasets/em" / split).glob("[0-9]????.npy"))) for split in ("train", "val", "test")]


def snapshot(work):
    folder = work / "datasets/em"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_added_images_are_trained_on_and_the_other_sets_stay(work, capsys):
    write_pairs(work, halves())
    assert make(MADE) == 0
    before = snapshot(work)
    assert make(ADD) == 0
    assert "4 train (2 more), 1 val, 1 test: validation and test are as they were" in capsys.readouterr().out
    after = snapshot(work)
    assert all(after[name] == content for name, content in before.items() if name.endswith(".npy"))
    for number, name in ((2, "4.tif"), (3, "5.tif")):
        added = sample(work, "train", number)
        assert np.array_equal(added["input"][..., 0], tifffile.imread(work / "new" / name))
        assert np.array_equal(added["label"] * 255, halves())
    everything = np.concatenate([sample(work, "train", number)["input"].ravel() for number in range(4)])
    facts = info(work)
    assert facts["mean"] == [pytest.approx(everything.mean())] and facts["std"] == [pytest.approx(everything.std())]
    assert facts["profile"]["mean"] == [pytest.approx(everything.mean(), rel=0.01)]  # of some of its rows
    assert [each["source"] for each in facts["samples"]["train"]] == ["0.tif", "1.tif", "4.tif", "5.tif"]
    assert len(facts["sources"]) == 10  # the new labels are copies of old ones
    assert (work / "datasets/em/train/00003.distance.npy").exists()
    assert make(["--add", "raw2", "--label", "new_masks"]) == 1  # no such folder
    assert snapshot(work) == after


def test_added_images_of_known_names_have_their_folder_in_the_description(work):
    write_pairs(work, halves())
    write(work / "new", [noise()], 0)
    write(work / "new_masks", [halves(0, 255)], 0)
    assert make(MADE) == make([*ADD, "--to", "test"]) == 0
    names = [each["source"] for each in info(work)["samples"]["test"]]
    assert names == ["3.tif", "new/0.tif", "new/4.tif", "new/5.tif"] and numbers(work) == [2, 1, 4]


def test_image_that_is_there_is_refused_with_its_place_or_gets_its_new_label(work, fails, capfd):
    write_pairs(work, halves())
    assert make(MADE) == 0
    shutil.copy(work / "raw/3.tif", work / "new/7.tif")
    write(work / "new_masks", [halves(255, 0)], 7)
    line = fails(make, ADD)
    assert "new/7.tif, page 1 (test 00000)" in line and "--replace" in line and "4.tif" not in line
    assert make([*ADD, "--replace"]) == 0
    out = capfd.readouterr().out
    assert "4 train (2 more), 1 val, 1 test (1 with a new label): validation is as it was" in out
    assert np.array_equal(sample(work, "test")["label"] * 255, halves(255, 0))
    assert np.array_equal(sample(work, "test")["input"][..., 0], tifffile.imread(work / "raw/3.tif"))
    after = snapshot(work)
    assert make([*ADD, "--replace"]) == 0
    assert snapshot(work) == after  # typed again, it changes nothing
    shutil.copy(work / "new/4.tif", work / "new/9.tif")
    shutil.copy(work / "new_masks/4.tif", work / "new_masks/9.tif")
    assert "9.tif, page 1 has the pixels of new/4.tif" in fails(make, [*ADD, "--replace"])


@pytest.mark.parametrize(
    ("flags", "label", "new", "expected"),
    [
        ([], halves(0, 1), halves(0, 255), [0, 1]),  # masks of one kind
        (["--foreground", "0"], halves(0, 255), halves(0, 1), [1, 0]),
        (["--threshold", "100"], halves(3, 250), halves(50, 101), [0, 1]),
        (["--objects", "on"], halves(0, 1), halves(0, 9), [0, 1]),
        (["--objects", "on", "--background", "1"], halves(1, 2), halves(1, 9), [0, 1]),
        (["--ignore", "7"], np.hstack([halves(), halves()[:, :10] * 0 + 7])[:, :40], halves(7, 0), [255, 0]),
        ([], np.stack([halves(), halves() * 0, halves()], -1), np.stack([halves(255, 0)] * 3, -1) * [1, 0, 1], [1, 0]),
    ],
    ids=["masks", "foreground", "threshold", "objects", "background", "ignore", "colours"],
)
def test_labels_are_read_as_those_of_the_database(work, flags, label, new, expected):
    label = np.ascontiguousarray(label, np.uint8)
    if "--ignore" in flags:
        label = halves()
        label[:4] = 7
    write_pairs(work, label, new_label=np.ascontiguousarray(new, np.uint8))
    assert make([*MADE, *flags]) == 0
    before = info(work)
    assert make(ADD) == 0
    added = sample(work, "train", 2)["label"]
    assert [added[0, 0], added[0, 39]] == expected
    assert all(before[name] == info(work)[name] for name in ("class_values", "class_names", "labels", "gap"))


def test_labels_with_a_palette_have_its_indices(work):
    write_pairs(work, halves())
    for folder in ("masks", "new_masks"):
        for path in (work / folder).glob("*.tif"):
            picture = Image.fromarray(halves(0, 1), "P")
            picture.putpalette([9, 9, 9, 200, 30, 30])
            picture.save(path.with_suffix(".png"))
            path.unlink()
    assert make(MADE) == make(ADD) == 0
    assert np.array_equal(sample(work, "train", 3)["label"], halves(0, 1)) and info(work)["class_values"] == [0, 1]


def test_masks_do_not_fit_indices_of_a_palette_whose_first_is_foreground(work, fails):
    write_pairs(work, halves(0, 1))
    for number in range(4):
        image = Image.fromarray(halves(0, 1))
        image.putpalette([255, 0, 0, 0, 0, 0])  # index 0 is a red cell
        image.save(work / f"masks/{number}.png")
        (work / f"masks/{number}.tif").unlink()
    assert make(MADE) == 0
    write(work / "new_masks", [halves(0, 255)] * 2, 4)
    assert "label value 255: the classes of the database are 0; 1" in fails(make, ADD)


def test_labels_as_predict_wrote_them_are_left_out(work, fails, capfd):
    write_pairs(work, halves(), num_new=3)
    assert make(MADE) == 0
    for number in (0, 1):
        shutil.copy(work / f"raw/{number}.tif", work / "new")
    text = PngInfo()
    text.add_text("Software", PREDICTED)
    (work / "seg").mkdir()
    for number in (0, 4, 5):
        Image.fromarray(np.full((32, 40), 255, np.uint8)).save(work / f"seg/{number}.png", pnginfo=text)
    flags = ["--add", "new", "--label", "seg", "--labelled_only", "--replace"]
    assert "and all others: labels as predict wrote them: save in an editor" in fails(make, flags)
    for number, label in ((1, np.full((32, 40), 255)), (6, halves())):
        Image.fromarray(label.astype(np.uint8)).save(work / f"seg/{number}.png")  # as an editor does
    for again in (False, True):
        assert make(flags) == 0
        out = capfd.readouterr().out
        assert "left out: 3 label(s) as predict wrote them" in out
        assert ("3 train (1 more, 1 with a new label)" in out, "3 train, 1 val, 1 test" in out) == (not again, again)
    assert np.array_equal(sample(work, "train")["label"] * 255, halves()) and sample(work, "train", 1)["label"].all()


def test_one_mask_per_object_is_added_to_a_database_of_such(work):
    for number in range(6):
        for kind, pixels in (("images", [noise()]), ("masks", [halves(0, 255), halves(255, 0)])):
            (work / f"all/{number}/{kind}").mkdir(parents=True)
            for mask, each in enumerate(pixels):
                tifffile.imwrite(work / f"all/{number}/{kind}/{mask}.tif", each)
    of = "all/[{}]/images/*.tif", "all/[{}]/masks/*.tif"
    assert make(["--input", of[0].format("0-3"), "--label", of[1].format("0-3")]) == 0
    assert make(["--add", of[0].format("45"), "--label", of[1].format("45")]) == 0
    assert sample(work, "train", 2)["label"][0].tolist() == [1] * 19 + [0, 0] + [1] * 19


def test_partial_labels_are_added_to_a_database_of_whole_ones(work, fails):
    write_pairs(work, halves(), new_label=halves(128, 255))
    assert make(MADE) == 0
    assert "new_masks/4.tif, page 1: label value 128: the classes of the database are 0; 255" in fails(make, ADD)
    assert "--ignore 255: a class" in fails(make, [*ADD, "--ignore", "255"])
    assert make([*ADD, "--ignore", "128"]) == 0
    assert info(work)["ignore"] == 128 and sample(work, "train", 2)["label"][0, 0] == 255
    assert "in the database it is 128" in fails(make, [*ADD, "--ignore", "7", "--replace"])


def test_older_database_tells_how_its_labels_were_read_or_asks(work, fails):
    write_pairs(work, halves(0, 1), new_label=halves(1, 2))
    assert make([*MADE, "--objects", "on"]) == 0
    older = {name: value for name, value in info(work).items() if name not in ("labels", "profile", "samples")}
    (work / "datasets/em/dataset.json").write_text(json.dumps(older))
    new = np.pad(np.full((20, 20), 9, np.uint8), ((6, 6), (10, 10)), constant_values=1)
    write(work / "new_masks", [new] * 2, 4)
    assert "with --background 1 or --background 0" in fails(make, ADD)
    assert make([*ADD, "--background", "1"]) == 0
    assert np.array_equal(sample(work, "train", 3)["label"], new == 9) and info(work)["labels"]["background"] == 1


def test_labels_of_predict_are_asked_for_their_background_if_the_database_has_another(work, fails):
    write_pairs(work, halves(1, 9))
    assert make([*MADE, "--objects", "on", "--background", "1"]) == 0
    predicted = np.pad(np.ones((20, 20), np.uint8), ((6, 6), (10, 10)))  # 0 is the background there, 1 an object
    write(work / "new_masks", [predicted] * 2, 4)
    assert "with --background 0 or --background 1" in fails(make, ADD)
    assert make([*ADD, "--background", "0"]) == 0
    assert np.array_equal(sample(work, "train", 3)["label"], predicted)


def test_images_of_another_type_or_channels_or_scale_are_refused(work, fails, capfd):
    write_pairs(work, halves())
    assert make(MADE) == 0
    before = snapshot(work)
    write(work / "new", [noise(dtype=np.uint16)] * 2, 4)
    assert "4.tif, page 1: uint16 pixels, the database has uint8: convert" in fails(make, ADD)
    write(work / "new", [noise(32, 40, 3)] * 2, 4)
    assert "4.tif, page 1: 3 channel(s), the database has 1" in fails(make, ADD)
    write(work / "new", [noise(high=30) + np.uint8(220) for _ in range(2)], 4)
    assert "scale them to these" in fails(make, ADD) and snapshot(work) == before
    write(work / "new", [np.repeat(noise()[..., None], 3, axis=2) for _ in range(2)], 4)
    assert make(ADD) == 0
    assert "converted to grey, as the database has them" in capfd.readouterr().out
    assert sample(work, "train", 3)["input"].shape == (32, 40, 1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--add", "new"], "--label LABELS"),
        (["--add", "new", "--label", "none"], "--label LABELS"),
        ([*ADD, "--input", "raw"], "give one of them"),
        ([*ADD, "--split", "contiguous"], "--split contiguous"),
        ([*ADD, "--overwrite"], "--overwrite on"),
        ([*ADD, "--objects", "on"], "--objects on"),
        ([*MADE, "--replace"], "--add only"),
        ([*MADE, "--to", "test"], "--add only"),
    ],
)
def test_flags_that_have_no_effect_on_added_images_are_refused(work, fails, flags, words):
    assert words in fails(make, flags, status=2)


def test_add_needs_a_database_with_classes(work, fails):
    write_pairs(work, halves())
    assert "no database there" in fails(make, ADD) and not (work / "datasets").exists()
    assert make(["--input", "raw", "--label", "none"]) == 0
    assert "it has no classes" in fails(make, ADD)


def test_sections_are_added_with_their_neighbours(work):
    for name, num in (("a", 6), ("b", 3)):
        tifffile.imwrite(work / f"{name}.tif", noise(num, 32, 40), photometric="minisblack")
        tifffile.imwrite(work / f"{name}_label.tif", np.stack([halves()] * num), photometric="minisblack")
    assert make(["--input", "a.tif", "--label", "a_label.tif", "--context", "1"]) == 0
    assert make(["--add", "b.tif", "--label", "b_label.tif"]) == 0
    volume = tifffile.imread(work / "b.tif")
    assert np.array_equal(sample(work, "train", 4)["input"], np.moveaxis(volume[[0, 0, 1]], 0, -1))
    before = sample(work, "test")["input"]
    tifffile.imwrite(work / "one.tif", tifffile.imread(work / "a.tif")[5])
    tifffile.imwrite(work / "one_label.tif", halves(255, 0))
    assert make(["--add", "one.tif", "--label", "one_label.tif", "--replace"]) == 0
    assert np.array_equal(sample(work, "test")["input"], before)  # the neighbours stay
    assert sample(work, "test")["label"][0, 0] == 1


def test_regions_stay_and_an_image_that_was_cut_is_found(work, fails):
    label = np.tile(halves(), (1, 4))
    write_pairs(work, label, num=1, num_new=1, shape=(32, 160))
    assert make([*MADE, "--split", "region"]) == 0
    assert make(ADD) == 0
    assert numbers(work) == [2, 1, 1] and sample(work, "train", 1).shape == (32, 160)
    line = fails(make, ["--add", "raw", "--label", "masks"])
    assert "(train 00000)" in line and "(test 00000)" in line
    write(work / "masks", [255 - label])
    first, stop = info(work)["samples"]["test"][0]["columns"]
    assert make(["--add", "raw", "--label", "masks", "--replace"]) == 0
    assert np.array_equal(sample(work, "test")["label"] * 255, 255 - label[:, first : stop + 1])


@pytest.mark.parametrize("point", [1, 4, 8])
def test_add_that_is_killed_leaves_the_old_database_or_the_new(work, start, point):
    write_pairs(work, halves())
    assert make(MADE) == 0
    process = start(partial(make_killed, point), *ADD)
    process.communicate()
    assert process.returncode == 9
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    assert numbers(work) in ([2, 1, 1], [4, 1, 1])
    assert make([*ADD, "--replace"]) == 0
    assert numbers(work) == [4, 1, 1] and sorted(path.name for path in (work / "datasets/em").glob(".*")) == []


def test_next_command_trains_on_from_the_network_that_is_there(work, capsys):
    write_pairs(work, halves())
    assert make(MADE) == 0
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    assert make(ADD) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("next: python main.py --mode train --") and "--nch_ker 2" in last
    assert last.endswith("--train_continue off --init_from checkpoints/unet/em")
    for _ in range(2):  # the second one begins with what the first one has moved there
        assert main.main(last.removeprefix("next: python main.py ").split()) == 0
        out = capsys.readouterr().out
        assert "weights taken from checkpoints/unet/em/model_epoch0001.pth" in out and "drawn at random" not in out


# --- a database that is made again


def test_overwrite_with_more_images_keeps_each_in_its_set(work, capsys):
    write_pairs(work, halves(), num=5)
    assert make([*MADE, "--split", "random", "--seed", "3", "--num_test", "2"]) == 0
    before = {s: [each["source"] for each in of] for s, of in info(work)["samples"].items()}
    write(work / "raw", [noise(), noise()], 8)
    write(work / "masks", [halves()] * 2, 8)
    assert make([*MADE, "--overwrite"]) == 0
    after = {s: [each["source"] for each in of] for s, of in info(work)["samples"].items()}
    assert (after["val"], after["test"]) == (before["val"], before["test"])
    assert after["train"] == [*before["train"], "8.tif", "9.tif"]
    assert "5 image(s) stay in the set where they were, 2 new in train; --split contiguous" in capsys.readouterr().out
    assert make([*MADE, "--overwrite", "--split", "contiguous"]) == 0
    assert [each["source"] for each in info(work)["samples"]["test"]] == ["9.tif"]
    shutil.rmtree(work / "raw")
    write(work / "raw", [noise() for _ in range(7)])
    shutil.rmtree(work / "masks")
    write(work / "masks", [halves() for _ in range(7)])
    assert make([*MADE, "--overwrite"]) == 0  # other images
    assert numbers(work) == [5, 1, 1]


def test_overwrite_with_images_of_validation_and_test_alone_is_refused(work, fails):
    write_pairs(work, halves())
    assert make([*MADE, "--split", "random", "--seed", "3"]) == 0
    kind = info(work)["split"]
    assert make([*MADE, "--overwrite"]) == 0 and info(work)["split"] == kind
    for number in range(4):
        if not np.array_equal(tifffile.imread(work / f"raw/{number}.tif"), sample(work, "test")["input"][..., 0]):
            (work / f"raw/{number}.tif").unlink()
            (work / f"masks/{number}.tif").unlink()
    assert "1 image(s) were in the validation or test of the database" in fails(make, [*MADE, "--overwrite"])


def test_overwrite_of_regions_cuts_at_the_same_position_or_says_so(work, capsys):
    label = np.tile(halves(), (1, 4))
    write_pairs(work, label, num=2, shape=(32, 160))
    assert make([*MADE, "--split", "region", "--num_val", "0"]) == 0
    write(work / "raw", [noise(32, 160)], 8)
    write(work / "masks", [label], 8)
    assert make([*MADE, "--overwrite"]) == 0
    assert numbers(work) == [3, 0, 3] and "cut elsewhere" not in capsys.readouterr().out
    part = label.copy()
    part[:, 100:] = 7
    write(work / "masks", [part], 0)
    assert make([*MADE, "--overwrite", "--ignore", "7"]) == 0
    assert "1 region(s) of the validation and the test are cut elsewhere" in capsys.readouterr().out


# --- images without a label


def test_labelled_only_takes_the_images_that_have_a_label(work, fails, capfd):
    write(work / "raw", [noise() for _ in range(9)])
    write(work / "masks", [halves()] * 3, 5)
    assert "and 1 more" not in (line := fails(make, MADE)) and "--labelled_only" in line
    assert make([*MADE, "--labelled_only"]) == 0
    assert "left out: 6 image(s) without a label, which predict can segment" in capfd.readouterr().out
    names = [each["source"] for of in info(work)["samples"].values() for each in of]
    assert names == ["5.tif", "6.tif", "7.tif"]
    write(work / "masks", [halves()], 11)
    assert "no partner for masks/11.tif" in fails(make, [*MADE, "--labelled_only", "--overwrite"])


def test_labelled_only_does_not_guess_between_images_of_one_number(work, fails):
    for name in ("a1", "b1", "c1", "d2"):
        write(work / "raw", [noise()])
        (work / "raw/0.tif").rename(work / f"raw/{name}.tif")
    for name in ("c1_mask", "d2_mask"):
        write(work / "masks", [halves()])
        (work / "masks/0.tif").rename(work / f"masks/{name}.tif")
    assert make([*MADE, "--labelled_only"]) in (0, 1)
    if (work / "datasets").exists():
        names = [each["source"] for of in info(work)["samples"].values() for each in of]
        assert names == ["c1.tif", "d2.tif"]


# --- images that a training learns from without a label


def write_unlabelled(work, num=3):
    """Four labelled images, and a folder of them and some others."""
    write_pairs(work, halves(), num_new=num)
    shutil.copytree(work / "raw", work / "all")
    shutil.copytree(work / "new", work / "all", dirs_exist_ok=True)


def unlabelled(work):
    return [each["source"] for each in info(work)["samples"].get("unlabelled", [])], numbers_of_unlabelled(work)


def numbers_of_unlabelled(work):
    return len(list((work / "datasets/em/unlabelled").glob("*.npy")))


def test_unlabelled_images_are_those_of_no_set(work, capfd):
    write_unlabelled(work)
    assert make([*MADE, "--unlabelled", "all"]) == 0
    out = capfd.readouterr().out
    assert "2 train, 1 val, 1 test, 3 unlabelled" in out and "not among the unlabelled: 4 image(s) of the sets" in out
    assert unlabelled(work) == (["all/4.tif", "all/5.tif", "all/6.tif"], 3)
    first = np.load(work / "datasets/em/unlabelled/00000.npy")
    assert first.dtype.names == ("input",) and (first["input"][..., 0] == tifffile.imread(work / "new/4.tif")).all()
    assert make([*MADE, "--overwrite"]) == 0
    assert unlabelled(work) == ([], 0)


def test_no_image_is_left_unlabelled(work, fails):
    write_unlabelled(work)
    assert "--unlabelled: all 4 image(s) are in the sets of the database" in fails(make, [*MADE, "--unlabelled", "raw"])
    assert not (work / "datasets/em/dataset.json").exists()


def test_unlabelled_images_must_fit_the_others(work, fails):
    write_unlabelled(work)
    write(work / "deep", [noise(dtype=np.uint16)])
    assert "deep/0.tif, page 1 is uint16" in fails(make, [*MADE, "--unlabelled", "deep"])


def test_unlabelled_images_of_another_pixel_size_are_said(work, capfd):
    for name, size in (("raw.tif", 0.5), ("others.tif", 0.1)):
        metadata = {"axes": "ZYX", "unit": "um"}
        tifffile.imwrite(name, noise(4, 32, 40), imagej=True, resolution=(1 / size, 1 / size), metadata=metadata)
    tifffile.imwrite("masks.tif", np.stack([halves()] * 4), photometric="minisblack")
    source = ["--input", "raw.tif", "--label", "masks.tif"]
    assert make([*source, "--unlabelled", "others.tif"]) == 0
    line = "warning: the unlabelled images: a pixel has 0.1 µm, in the training 0.5 µm"
    assert line in capfd.readouterr().out
    assert make([*source, "--overwrite"]) == 0
    assert "a pixel has" not in capfd.readouterr().out


def test_image_that_is_annotated_is_no_longer_unlabelled(work, capfd):
    write_unlabelled(work)
    assert make([*MADE, "--unlabelled", "all"]) == 0
    write(work / "one", [tifffile.imread(work / "new/5.tif")])
    write(work / "its", [halves()])
    assert make(["--add", "one", "--label", "its", "--to", "test"]) == 0
    assert "1 unlabelled image(s) have a label now" in capfd.readouterr().out
    assert unlabelled(work) == (["all/4.tif", "all/6.tif"], 2) and numbers(work) == [2, 1, 2]


@pytest.mark.parametrize("argv", [["--label", "none", "--input", "raw"], [*ADD]])
def test_unlabelled_needs_a_new_database_with_labels(work, fails, argv):
    write_unlabelled(work)
    assert make(MADE) == 0
    line = fails(make, [*argv, "--unlabelled", "new"], 2)
    assert "--unlabelled new" in line
