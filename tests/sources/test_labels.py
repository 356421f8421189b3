import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import SMALL
from PIL import Image

import main
from run_make_database import main as make_database

COLOURS = np.array([[0, 0, 0], [9, 200, 9], [9, 9, 90], [250, 9, 9]], np.uint8)
MADE = ["--input", "raw", "--label", "masks"]


def write(masks, save=lambda path, mask: Image.fromarray(mask).save(path), ending="png"):
    """Grey images in raw, and a mask for each in masks."""
    for folder in ("raw", "masks"):
        Path(folder).mkdir()
    for number, mask in enumerate(masks):
        noise = np.random.default_rng(number).integers(0, 255, mask.shape[:2]).astype(np.uint8)
        Image.fromarray(noise).save(f"raw/{number}.png")
        save(f"masks/{number}.{ending}", mask)


def info(work):
    return json.loads((work / "datasets" / "em" / "dataset.json").read_text())


def label(work, split="train"):
    return np.load(work / "datasets" / "em" / split / "00000.npy")["label"]


def save_palette(path, mask, colours=COLOURS):
    if path.endswith("tif"):
        table = np.zeros((3, 256), np.uint16)
        table[:, : len(colours)] = colours.T.astype(np.uint16) * 257
        tifffile.imwrite(path, mask, photometric="palette", colormap=table)
        return
    image = Image.fromarray(mask, "L").convert("P")
    image.putpalette(colours.tobytes())
    image.save(path)


def stripes(num, period=8, size=32):
    """Masks of so many classes, each in several pieces."""
    return [((np.indices((size, size)).sum(0) // period + shift) % num).astype(np.uint8) for shift in range(3)]


@pytest.mark.parametrize("ending", ["png", "gif", "tif"])
def test_palette_gives_classes_in_the_order_of_its_indices(work, capsys, ending):
    masks = stripes(4)
    write(masks, save_palette, ending)
    assert make_database(MADE) == 0
    assert info(work)["class_values"] == [0, 1, 2, 3]  # by colour, 2 came before 1
    assert np.array_equal(label(work), masks[0])
    assert "the labels have a palette: its indices are the classes" in capsys.readouterr().out


def test_palettes_that_differ_are_colours(work, capsys):
    masks = stripes(4)
    write(masks, lambda path, mask: save_palette(path, mask, COLOURS if path < "masks/1" else COLOURS[[0, 2, 1, 3]]))
    assert make_database(MADE) == 0
    assert info(work)["class_values"] == [[0, 0, 0], [9, 9, 90], [9, 200, 9], [250, 9, 9]]
    assert np.array_equal(label(work, "train"), np.array([0, 2, 1, 3])[masks[0]])
    assert np.array_equal(label(work, "val"), masks[1])
    assert "masks/1.png: the palette differs from earlier files" in capsys.readouterr().out


def test_objects_hint_is_for_numbered_objects_and_not_for_class_maps(work, capsys):
    objects = np.zeros((32, 32), np.uint8)
    objects[2:8, 2:8], objects[2:8, 12:20], objects[20:30, 4:9] = 1, 2, 3
    write([objects, objects.T, objects % 3])
    assert make_database(MADE) == 0
    assert "4 classes, each one component per image: if the labels number objects, add --objects on" in (
        capsys.readouterr().out
    )
    for number, mask in enumerate(stripes(4)):
        Image.fromarray(mask).save(f"masks/{number}.png")
    assert make_database([*MADE, "--overwrite"]) == 0
    assert "--objects" not in capsys.readouterr().out


KINDS = {  # how masks of one kind are saved: the value of the foreground in each, and what becomes of it
    "1 and 8 bits": ([1, 255, 1], 255),
    "8 and 16 bits": ([np.uint8(255), np.uint16(65535), np.uint8(255)], 65535),
    "floats": ([np.float32(1), np.float32(1 - 6e-8), np.float32(1)], 1),
}


@pytest.mark.parametrize("name", KINDS)
def test_masks_saved_differently_are_one_foreground(work, capsys, name):
    values, foreground = KINDS[name]
    masks = [mask * value for mask, value in zip(stripes(2), values, strict=True)]
    write(masks, lambda path, mask: tifffile.imwrite(path, mask), "tif")
    assert make_database(MADE) == 0
    assert "note: masks of one kind, saved with " in capsys.readouterr().out
    assert info(work)["class_values"] == [0, foreground] and np.array_equal(label(work), stripes(2)[0])


def test_masks_of_a_colour_and_of_white_are_one_foreground(work):
    red = np.array([255, 0, 0], np.uint8)
    write([mask[..., None] * (red if k == 1 else np.uint8([255] * 3)) for k, mask in enumerate(stripes(2))])
    assert make_database(MADE) == 0
    assert info(work)["class_values"] == [[0, 0, 0], [255, 255, 255]]


def test_masks_in_the_alpha_channel_are_read(work, capsys):
    write([np.dstack([np.full((*mask.shape, 3), 255, np.uint8), mask * 255]) for mask in stripes(2)])
    assert make_database(MADE) == 0
    assert "note: the masks lie in the alpha channel" in capsys.readouterr().out
    assert np.array_equal(label(work), stripes(2)[0])


def test_masks_of_two_classes_in_different_images_stay_two_classes(work):
    write([mask * value for mask, value in zip(stripes(2), (1, 2, 1), strict=True)])
    assert make_database(MADE) == 0
    assert info(work)["class_values"] == [0, 1, 2]


def test_masks_beside_a_label_that_numbers_objects_are_refused_by_name(work, fails):
    write([stripes(2)[0] * 255, stripes(5)[1], stripes(2)[2] * 255])
    line = fails(make_database, MADE)
    assert "masks/1.png, page 1: it seems to number objects" in line.replace("1.png:", "1.png, page 1:")
    assert "masks/0.png has two values: number the objects in all labels, and add --objects on" in line
    assert not (work / "datasets").exists()


def test_threshold_beyond_the_labels_is_one_line(work, fails):
    write([mask * 255 for mask in stripes(2)])
    line = fails(make_database, [*MADE, "--threshold", "300"])
    assert "--threshold 300: the label values go from 0 to 255, which is one class: choose a threshold between" in line
    assert not (work / "datasets").exists()


@pytest.mark.parametrize(
    ("flags", "values", "names"),
    [
        (["--background", "7"], [7, 0, 9], ["b", "a", "c"]),
        (["--background", "9.0"], [9, 0, 7], ["c", "a", "b"]),
        (["--background", "0"], [0, 7, 9], ["a", "b", "c"]),
    ],
)
def test_background_is_class_0_and_the_names_go_along(work, capsys, flags, values, names):
    masks = [np.array([0, 7, 9], np.uint8)[mask] for mask in stripes(3)]
    write(masks)
    assert make_database([*MADE, "--class_names", "a,b,c", *flags]) == 0
    assert (info(work)["class_values"], info(work)["class_names"]) == (values, names)
    assert np.array_equal(np.array(values)[label(work)], masks[0])
    assert info(work)["class_share"] == [(masks[0] == value).mean() for value in values]
    out = capsys.readouterr().out
    assert f"class 0 (background): {names[0]}, label value {values[0]}, " in out and "foreground" not in out


def test_background_of_colours_is_typed_as_red_green_and_blue(work, fails):
    masks = stripes(3)
    write([COLOURS[mask] for mask in masks])
    assert make_database([*MADE, "--background", "9, 200, 9"]) == 0
    assert info(work)["class_values"] == [[9, 200, 9], [0, 0, 0], [9, 9, 90]]
    assert np.array_equal(label(work) == 0, masks[0] == 1)
    for wrong in ("1,2,3", "9", "green"):
        line = fails(make_database, [*MADE, "--background", wrong, "--overwrite"])
        assert f"--background {wrong}: no class has that value: choose from 0,0,0; 9,9,90; 9,200,9" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--foreground", "3"], "--foreground 3: no class has that value: choose from 0; 255"),
        (["--foreground", "0", "--background", "0"], "that is the background: leave one out"),
        (["--background", "x"], "--background x: no class has that value"),
    ],
)
def test_background_or_foreground_that_is_no_class_is_one_line(work, fails, flags, words):
    write([mask * 255 for mask in stripes(2)])
    assert words in fails(make_database, [*MADE, *flags])


def test_foreground_among_three_classes_is_one_line(work, fails):
    write(stripes(3))
    assert "there are 3 classes, not 2: use --background" in fails(make_database, [*MADE, "--foreground", "1"])


def test_foreground_is_what_weight_map_and_cells_are_of(work, capsys):
    dark = np.full((48, 48), 255, np.uint8)
    dark[6:22, 6:22], dark[6:22, 26:42], dark[28:42, 10:40] = 0, 0, 0  # objects are 0, between them is 255
    write([dark, dark.T, dark])
    assert make_database([*MADE, "--foreground", "0", "--class_names", "object,ground"]) == 0
    assert info(work)["class_values"] == [255, 0] and info(work)["class_names"] == ["ground", "object"]
    assert "class 1 (foreground): object, label value 0, " in capsys.readouterr().out
    distance = np.load(work / "datasets" / "em" / "train" / "00000.distance.npy")
    assert distance[14, 24] < distance[24, 24] < distance[0, 47]  # small between two dark squares
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    predict = ["--mode", "predict", "--gpu_ids", "-1", "--input", "raw/0.png", "--output", "out", "--tta", "off"]
    assert main.main([*predict, "--what", "cells"]) == 0
    assert " object in 1 image" in capsys.readouterr().out


# --- objects that touch, and a background that has a number


def discs(centres, radius=7, size=96):
    """Mask of discs (H, W)."""
    y, x = np.indices((size, size))
    inside = [(y - cy) ** 2 + (x - cx) ** 2 <= radius**2 for cy, cx in centres]
    return np.where(np.any(inside, 0), 255, 0).astype(np.uint8)


APART = [(16 + 20 * row, 16 + 20 * column) for row in range(4) for column in range(4)]
TOUCHING = [*APART, (16, 28), (56, 68), (76, 28)]  # each in an 8 or a row of three with others


@pytest.mark.parametrize(("centres", "is_said"), [(APART, False), (TOUCHING, True)])
@pytest.mark.parametrize("value", [1, 255])
def test_touching_objects_in_masks_give_a_hint_at_numbered_objects(work, capsys, centres, is_said, value):
    write([np.minimum(discs(centres), value).astype(np.uint8)] * 3)
    assert make_database(MADE) == 0
    out = capsys.readouterr().out
    assert ("of the objects look like several that touch" in out and "add --objects on" in out) == is_said


@pytest.mark.parametrize("phantom", ["em", "rare"])
def test_touching_hint_is_not_given_for_membranes_and_nuclei_apart(work, capsys, phantom):
    assert make_database(["--synthetic", "4", "--size", "128", "--phantom", phantom]) == 0
    images = ("train-volume.tif", "train-labels.tif") if phantom == "em" else ("images", "labels")
    source, target = (f"datasets/em/{name}" for name in images)
    assert make_database(["--name_data", "b", "--input", source, "--label", target]) == 0
    assert "touch" not in capsys.readouterr().out


def numbered(ground):
    """Label images of 3 squares with numbers, of which two touch, and with this number the rest."""
    labels = np.full((3, 32, 32), ground, np.uint8)
    labels[:, 4:10, 4:10], labels[:, 4:10, 10:16], labels[:, 20:28, 20:28] = 2, 3, 4
    return list(labels)


def test_background_with_a_number_is_found_at_the_borders_or_taken_from_the_flag(work, capsys):
    write(numbered(0))
    assert make_database([*MADE, "--objects", "on"]) == 0
    out = capsys.readouterr().out
    assert "hint" not in out and "objects: 9 numbered, 9 left after a gap between those that touch" in out
    expected = label(work)
    for number, mask in enumerate(numbered(1)):
        Image.fromarray(mask).save(f"masks/{number}.png")
    assert make_database([*MADE, "--objects", "on", "--overwrite"]) == 0
    assert "note: the number 1 is background, since most pixels at the borders of the images have it" in (
        capsys.readouterr().out
    )
    assert np.array_equal(label(work), expected) and info(work)["gap"] == 2
    assert make_database([*MADE, "--objects", "on", "--background", "1", "--overwrite"]) == 0
    assert np.array_equal(label(work), expected) and expected.sum() == 6 * 5 * 2 + 64
    assert "hint" not in capsys.readouterr().out


def test_background_beyond_the_numbers_of_the_objects_is_one_line(work, fails):
    write(numbered(1))
    line = fails(make_database, [*MADE, "--objects", "on", "--background", "9"])
    assert "--background 9: the numbers go from 1 to 4: choose one of them" in line


# --- pixels that are not annotated

IGNORE = 255


def unannotated(mask, value, seed=0):
    """A mask with a value at random pixels, and where these are."""
    where = np.random.default_rng(seed).random(mask.shape[:2]) < 0.4
    mask = mask.copy()
    mask[where] = value
    return mask, where


@pytest.mark.parametrize("value", [0, 128, 255])
def test_ignored_grey_value_is_no_class_and_counts_in_no_fraction(work, capsys, value):
    values = np.array([v for v in (0, 7, 9, 255) if v != value][:3], np.uint8)
    masks, where = zip(*[unannotated(values[mask], value, seed) for seed, mask in enumerate(stripes(3))], strict=True)
    write(masks)
    assert make_database([*MADE, "--ignore", str(value), "--class_names", "a,b,c"]) == 0
    expected = np.where(where[0], IGNORE, stripes(3)[0])
    assert np.array_equal(label(work), expected)
    assert (info(work)["class_values"], info(work)["ignore"]) == (values.tolist(), value)
    assert info(work)["class_share"] == [pytest.approx((expected[~where[0]] == k).mean()) for k in range(3)]
    assert f"annotated: {1 - where[0].mean():.1%} of train" in capsys.readouterr().out


def test_ignored_pixels_stay_ignored_with_another_background(work):
    masks, where = zip(*[unannotated(mask + 1, 0, seed) for seed, mask in enumerate(stripes(3))], strict=True)
    write(masks)
    assert make_database([*MADE, "--ignore", "0", "--background", "3"]) == 0
    assert info(work)["class_values"] == [3, 1, 2]
    assert np.array_equal(label(work), np.where(where[0], IGNORE, np.array([1, 2, 0])[stripes(3)[0]]))


def test_ignored_value_can_be_no_foreground(work, fails):
    masks, _ = zip(*[unannotated(mask * 2, 1) for mask in stripes(2)], strict=True)
    write(masks)
    assert "no class has that value: choose from 0; 2" in fails(
        make_database, [*MADE, "--ignore", "1", "--foreground", "1"]
    )


@pytest.mark.parametrize(("save", "ignore"), [("palette", "2"), ("colour", "9, 9,90")])
def test_ignored_value_may_be_a_palette_index_or_a_colour(work, save, ignore):
    masks = stripes(3)
    write(masks if save == "palette" else [COLOURS[mask] for mask in masks], *[save_palette] * (save == "palette"))
    assert make_database([*MADE, "--ignore", ignore]) == 0
    assert np.array_equal(label(work), np.where(masks[0] == 2, IGNORE, masks[0]))
    assert info(work)["ignore"] == (2 if save == "palette" else [9, 9, 90])


def test_ignored_value_is_left_out_before_the_threshold(work, fails):
    grey = [np.tile(np.arange(64, dtype=np.uint8) * 3, (32, 1)) for _ in range(3)]
    masks, where = zip(*[unannotated(mask, 255) for mask in grey], strict=True)
    write(masks)
    assert "from 0 to 189, which is one class" in fails(make_database, [*MADE, "--threshold", "200", "--ignore", "255"])
    assert make_database([*MADE, "--threshold", "90", "--ignore", "255"]) == 0
    assert np.array_equal(label(work), np.where(where[0], IGNORE, grey[0] > 90))
    assert (info(work)["class_values"], info(work)["ignore"]) == (["<= 90", "> 90"], 255)


def test_ignored_pixels_next_to_numbered_objects_erode_none(work):
    numbers = np.zeros((32, 32), np.uint8)
    numbers[4:12, 4:12], numbers[4:12, 12:20], numbers[4:12, 20:28] = 7, 255, 3
    write([numbers] * 3)
    assert make_database([*MADE, "--objects", "on", "--ignore", "255"]) == 0
    expected = np.select([numbers == 255, numbers > 0], [IGNORE, 1], 0)
    assert np.array_equal(label(work), expected)
    assert info(work)["class_values"] == ["background", "object"]


def test_ignored_value_in_masks_per_object_is_no_object(work):
    first, second = np.zeros((2, 32, 32), np.uint8)
    first[4:12, 4:12], second[4:12, 14:20], second[4:12, 18:24], second[20:25] = 255, 255, 128, 128
    for number in range(3):
        for kind, pixels in (("images", [first]), ("masks", [first, second])):
            (work / f"all/{number}/{kind}").mkdir(parents=True)
            for k, page in enumerate(pixels):
                Image.fromarray(page).save(work / f"all/{number}/{kind}/{k}{number}.png")
    sources = ["--input", "all/*/images/*.png", "--label", "all/*/masks/*.png"]
    assert make_database([*sources, "--ignore", "128"]) == 0
    expected = np.select([second == 128, first + second > 0], [IGNORE, 1], 0)
    assert np.array_equal(label(work), expected)


def test_ignored_everywhere_an_image_is_left_out(work, capsys):
    masks = [np.full((32, 32), 9, np.uint8)] * 2 + stripes(2) + [np.full((32, 32), 9, np.uint8)]
    write(masks)
    assert make_database([*MADE, "--ignore", "9"]) == 0
    samples = info(work)["samples"]
    assert [sample["source"] for of in samples.values() for sample in of] == ["2.png", "3.png", "4.png"]
    assert "left out: 3 image(s) without an annotated pixel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ignore", "3"], "--ignore 3: no label has that value: choose from 0; 1; 9"),
        (["--ignore", "1,2,3"], "--ignore 1,2,3: no label has that value"),
        (["--ignore", "red"], "--ignore red: no label has that value"),
        (["--ignore", "3", "--threshold", "0"], "--ignore 3: no label has that value: the label values go from 0 to 9"),
        (["--ignore", "0", "--objects", "on"], "0 is the background"),
        (["--ignore", "1,2,3", "--objects", "on"], "are grey: give one number"),
    ],
)
def test_ignored_value_that_no_label_has_is_one_line(work, fails, flags, words):
    write([np.array([0, 1, 9], np.uint8)[mask] for mask in stripes(3)])
    assert words in fails(make_database, [*MADE, *flags])
    assert not (work / "datasets").exists()


def test_swapped_images_and_labels_give_a_hint(work, fails):
    write(stripes(2))
    assert "are --input and --label swapped?" in fails(make_database, ["--input", "masks", "--label", "raw"])


@pytest.mark.parametrize(("value", "flags"), [(np.nan, []), (np.inf, []), (np.nan, ["--threshold", "0"])])
def test_label_of_nan_or_infinity_is_refused_with_advice(work, fails, value, flags):
    masks = [mask.astype(np.float32) for mask in stripes(2)]
    masks[1][:8] = value
    write(masks, tifffile.imwrite, "tif")
    line = fails(make_database, [*MADE, *flags])
    assert "1.tif, page 1: NaN or infinity in 256 pixels" in line and "--ignore 128" in line


@pytest.mark.parametrize(
    ("value", "flags", "words"),
    [
        (9, [], "all label pixels have that value: nothing is annotated"),
        (9, ["--objects", "on"], "all label pixels have that value: nothing is annotated"),
        (0, ["--threshold", "0"], "nothing is annotated"),
    ],
)
def test_labels_with_nothing_annotated_are_one_line(work, fails, value, flags, words):
    write([np.full((32, 32), value, np.uint8)] * 3)
    assert words in fails(make_database, [*MADE, "--ignore", str(value), *flags])


def test_annotated_images_that_are_too_few_are_one_line(work, fails):
    write([stripes(2)[0], stripes(2)[1], np.full((32, 32), 9, np.uint8)])
    line = fails(make_database, [*MADE, "--ignore", "9"])
    assert line.startswith("error: 2 image(s), 1 for validation, 1 for testing: none is left for training")
    assert "--split region" in line and line.endswith("left out: 1 image(s) without an annotated pixel")


@pytest.mark.parametrize("flags", [[], ["--threshold", "1"]])
def test_ignored_value_may_be_negative(work, flags):
    masks = [mask.astype(np.int16) - 1 for mask in stripes(4)]
    write(masks, lambda path, mask: tifffile.imwrite(path, mask), "tif")
    assert make_database([*MADE, "--ignore", "-1", *flags]) == 0
    expected = masks[0] > 1 if flags else masks[0]
    assert np.array_equal(label(work), np.where(masks[0] == -1, IGNORE, expected)) and info(work)["ignore"] == -1


def test_ignored_value_that_leaves_one_class_is_one_line(work, fails):
    write([mask * 255 for mask in stripes(2)])
    line = fails(make_database, [*MADE, "--ignore", "0"])
    assert "without --ignore 0 all labels have the same value 255: annotate at least two classes" in line


BLANK = np.zeros((32, 32), np.uint8)


@pytest.mark.parametrize(
    ("masks", "flags", "hint"),
    [
        ([*stripes(3), BLANK, BLANK, BLANK], [], "if so, add --ignore 0"),
        ([*stripes(3), BLANK, BLANK, BLANK], ["--objects", "on"], "if so, leave them out"),  # 0 is the background
        ([*stripes(3), BLANK, BLANK, BLANK], ["--threshold", "1"], "if so, leave them out"),
        ([*stripes(2), BLANK, BLANK, BLANK], [], "if so, leave them out"),  # without 0 one class would be left
        ([*stripes(3), BLANK, BLANK], [], ""),  # fewer than half
        (stripes(3), [], ""),
    ],
)
def test_blank_label_images_give_a_hint_at_ignore(work, capsys, masks, flags, hint):
    write(masks)
    assert make_database([*MADE, *flags]) == 0
    out = capsys.readouterr().out
    question = "hint: 3 of 6 label images have the value 0 everywhere: are they not annotated? "
    assert question + hint in out if hint else "hint" not in out


def test_blank_label_images_that_are_ignored_are_not_asked_about(work, capsys):
    write([*stripes(3), *[BLANK + 9] * 3])
    assert make_database([*MADE, "--ignore", "9"]) == 0
    assert make_database([*MADE, "--ignore", "9", "--objects", "on", "--overwrite"]) == 0
    assert "hint" not in capsys.readouterr().out


def test_ignore_that_is_not_used_has_no_entry(work):
    write(stripes(2))
    assert make_database(MADE) == 0
    assert "ignore" not in info(work)
