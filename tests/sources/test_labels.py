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
def test_classes_of_a_palette_are_in_the_order_of_its_indices(work, capsys, ending):
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


def test_labels_that_seem_to_number_objects_are_told_of_the_flag_and_class_maps_are_not(work, capsys):
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


def test_masks_of_0_and_1_beside_masks_of_0_and_255_are_refused(work, fails):
    write([mask * value for mask, value in zip(stripes(2), (1, 255, 1), strict=True)])
    line = fails(make_database, MADE)
    assert "masks/0.png has the values 0 and 1, masks/1.png 0 and 255: save all masks in the same way" in line
    assert not (work / "datasets").exists()


def test_a_threshold_beyond_the_labels_is_one_line(work, fails):
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
def test_the_background_is_class_0_and_the_names_go_along(work, capsys, flags, values, names):
    masks = [np.array([0, 7, 9], np.uint8)[mask] for mask in stripes(3)]
    write(masks)
    assert make_database([*MADE, "--class_names", "a,b,c", *flags]) == 0
    assert (info(work)["class_values"], info(work)["class_names"]) == (values, names)
    assert np.array_equal(np.array(values)[label(work)], masks[0])
    assert info(work)["class_share"] == [(masks[0] == value).mean() for value in values]
    out = capsys.readouterr().out
    assert f"class 0 (background): {names[0]}, label value {values[0]}, " in out and "foreground" not in out


def test_the_background_of_colours_is_named_by_red_green_and_blue(work, fails):
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
def test_a_class_that_is_not_there_is_one_line(work, fails, flags, words):
    write([mask * 255 for mask in stripes(2)])
    assert words in fails(make_database, [*MADE, *flags])


def test_a_foreground_among_three_classes_is_one_line(work, fails):
    write(stripes(3))
    assert "there are 3 classes, not 2: use --background" in fails(make_database, [*MADE, "--foreground", "1"])


def test_weight_map_and_cells_are_of_the_foreground_that_is_chosen(work, capsys):
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
    assert " of object; background is ground" in capsys.readouterr().out
