"""`--min_size`, `--fill_holes` and `--link` on the command line and in Python."""

import csv
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import finish
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from test_ensemble import INFO, write_network

import main
from checkpoint import Checkpoint
from description import DataInfo, load_info
from evaluation.metrics import object_scores
from predict import load, predict_array
from prediction.linking import SectionLinker
from prediction.objects import ObjectFilter, ObjectList, filter_objects
from samples import write_sample
from utils import UserError

TRAINED = replace(INFO, min_size=[3, 12], fill_holes=[False, True])
ALL = ["--min_size", "0", "--fill_holes", "off"]
THREE = DataInfo(1, [0, 1, 2], ["a", "b", "c"], [0.4, 0.3, 0.3], [120.0], [50.0], [0.0, 255.0], "image")


@pytest.fixture
def stack(work):
    """A network, and a stack of five sections that look alike in pairs: objects, small ones and holes in each."""
    write_network("unet", {"nch_ker": 2}, TRAINED)
    pixels = np.random.default_rng(0).integers(0, 255, (3, 90, 110)).astype(np.uint8)
    pixels = pixels[[0, 0, 1, 1, 2]]
    tifffile.imwrite("in.tif", pixels, imagej=True, metadata={"axes": "ZYX"})
    return pixels


def segment(target, *flags, source="in.tif"):
    predict = ["--mode", "predict", "--gpu_ids", "-1", "--tta", "off", "--amp", "off", "--what", "cells"]
    assert main.main([*predict, "--input", source, "--output", target, *flags]) == 0
    return np.load(target) if Path(target).suffix == ".npy" and Path(target).exists() else None


def filtered(stack, probability, *chosen):
    both = zip(stack, probability, strict=True)
    return np.stack([filter_objects(cells.copy(), values, ObjectFilter(*chosen)) for cells, values in both])


def linked(stack, min_iou):
    linker = SectionLinker(min_iou)
    return np.stack([linker.link(section)[section] for section in stack])


def test_predict_filters_by_the_training_labels_unless_flags_say_otherwise(stack, capsys):
    raw = segment("raw.npy", *ALL)
    assert "filter of the objects" not in capsys.readouterr().out
    trained = segment("trained.npy", "--tile", "64")
    said = capsys.readouterr().out
    assert "under 12 px dropped, holes filled (as in the training; to keep all: --min_size 0 --fill_holes off" in said
    assert np.array_equal(trained, filtered(raw, raw, 12, True)) and not np.array_equal(trained, raw)
    assert f"objects: {sum(section.max() for section in trained)} cell in 5 images\n" in said
    given = segment("given.npy", "--min_size", "30", "--fill_holes", "off", "--certainty", "0")
    assert np.array_equal(given, filtered(raw, raw, 30, False)) and 0 < given.max() < trained.max()
    assert "filter of the objects: under 30 px dropped\n" in capsys.readouterr().out
    predictor = load("checkpoints/unet/em/model_epoch0001.pth")
    options = {"tta": False, "what": "cells"}
    assert np.array_equal(predict_array(predictor, stack, **options), trained)
    assert np.array_equal(predict_array(predictor, stack[0], **options, min_size=30, fill_holes=False), given[0])


def test_predict_drops_objects_as_certain_as_the_checkpoint_says(stack, capsys):
    path = Path("checkpoints/unet/em/model_epoch0001.pth")
    options = {"tta": False, "min_size": 0, "fill_holes": False}
    raw = predict_array(load(path), stack, what="cells", **options)
    probability = predict_array(load(path), stack, tta=False)
    peaks = [ndimage.maximum(p, cells, range(1, cells.max() + 1)) for p, cells in zip(probability, raw, strict=True)]
    certainty = float(np.mean([min(map(min, peaks)), max(map(max, peaks))]))  # many objects have the highest
    replace(Checkpoint.load(path), certainty=certainty).save(path)
    found = segment("out.npy", *ALL, "--tile", "64")
    assert [section.max() for section in found] == [np.sum(peak > certainty) for peak in peaks]
    assert np.array_equal(found, filtered(raw, probability, 0, False, certainty)) and 0 < found.max() < raw.max()
    assert np.array_equal(found, predict_array(load(path), stack, what="cells", **options))
    assert f"nowhere above {certainty:g} dropped (as in the training" in capsys.readouterr().out
    assert np.array_equal(segment("all.npy", *ALL, "--certainty", "0"), raw)
    assert load(path).certainty == certainty
    assert load(path, background="cell").certainty == 0  # it was chosen for the objects of the other class


def test_filter_of_an_older_checkpoint_and_of_an_ensemble_is_the_mildest(stack, work):
    write_network("old", {"nch_ker": 2})
    write_network("mild", {"nch_ker": 2}, replace(TRAINED, min_size=[0, 5], fill_holes=[True, False]))
    paths = [f"checkpoints/{scope}/em/model_epoch0001.pth" for scope in ("unet", "mild", "old")]
    filters = [load(paths[:number]).object_filter for number in (1, 2, 3)]
    assert filters == [ObjectFilter(12, True), ObjectFilter(5, False), ObjectFilter(0, False)]
    assert load(paths[0], background="cell").object_filter == ObjectFilter(3, False)
    before = {name: value for name, value in asdict(TRAINED).items() if name not in ("min_size", "fill_holes")}
    assert DataInfo.from_dict(before, Path("dataset.json")) == INFO


@pytest.mark.parametrize(("name", "value"), [("min_size", [1]), ("min_size", [0, -1]), ("fill_holes", [1, 0])])
def test_description_with_other_sizes_is_refused(name, value):
    with pytest.raises(UserError, match=f"{name} is"):
        DataInfo.from_dict(asdict(TRAINED) | {name: value}, Path("dataset.json"))


def test_database_has_the_sizes_of_its_labels_and_a_training_keeps_them(trained, work):
    info = load_info(trained)
    assert len(info.min_size) == len(info.fill_holes) == 2
    assert load("checkpoints/unet/em/model_epoch0001.pth").info.min_size == info.min_size


@pytest.mark.parametrize("flags", [ALL, []])
def test_linked_objects_have_one_number_through_the_stack(stack, capsys, flags):
    cells = segment("cells.npy", *flags)
    capsys.readouterr()
    result = segment("linked.npy", "--link", "0.3", "--tile", "64", *flags)
    expected = linked(cells, 0.3)
    assert np.array_equal(result, expected)
    assert f"objects: {expected.max()} cell in 5 images, linked in 1 stack(s)" in capsys.readouterr().out
    assert np.array_equal(result[0], result[1]) and np.array_equal(result[2], result[3])  # and the others are new:
    assert cells[0].max() < result.max() < sum(section.max() for section in cells)
    given = {} if not flags else {"min_size": 0, "fill_holes": False}
    predictor = load("checkpoints/unet/em/model_epoch0001.pth")
    assert np.array_equal(predict_array(predictor, stack, tta=False, what="cells", link=0.3, **given), result)
    assert {path.name for path in Path().iterdir()} == {"checkpoints", "in.tif", "cells.npy", "linked.npy"}


def test_sections_in_files_of_their_own_are_a_stack_in_every_format(stack, work):
    Path("raw").mkdir()
    for number, section in enumerate(stack):
        Image.fromarray(section).save(f"raw/{number + 8}.png")  # 8, 9, 10
    segment("out/", "--link", "0.3", source="raw")
    segment("out.tif", "--link", "0.3", source="raw")
    expected = segment("out.npy", "--link", "0.3")
    assert np.array_equal(tifffile.imread("out.tif"), expected)
    names = [f"out/{number}.png" for number in range(8, 13)]
    assert np.array_equal(np.stack([np.asarray(Image.open(name)) for name in names]), expected)


@pytest.mark.slow
def test_stacks_are_not_linked_with_each_other_and_processes_share_them(stack, together):
    two = np.stack([stack, stack[::-1]])
    tifffile.imwrite("tz.tif", two, imagej=True, metadata={"axes": "TZYX"})
    tifffile.imwrite("zt.ome.tif", two.swapaxes(0, 1), metadata={"axes": "ZTYX"})
    flags = ["--mode", "predict", "--gpu_ids", "-1", "--tta", "off", "--amp", "off", "--what", "cells", "--link", "0.3"]
    text = finish(together(3, *flags, "--input", "tz.tif", "--output", "tz.npy"))
    found = np.load("tz.npy")
    assert np.array_equal(segment("zt.npy", "--link", "0.3", source="zt.ome.tif"), found.swapaxes(0, 1))
    assert np.array_equal(segment("one.npy", "--link", "0.3"), found[0])
    assert f"objects: {found[0].max() + found[1].max()} cell in 10 images, linked in 2 stack(s)" in text
    assert "a whole stack: 1 of 3 have nothing to do" in text


def test_table_of_several_stacks_tells_which_objects_are_one(stack, work):
    two = np.stack([stack, stack[::-1]])
    tifffile.imwrite("tz.tif", two, imagej=True, metadata={"axes": "TZYX"})
    for target in ("tz.npy", "out/", "tz.npy"):  # the last one replaces the table
        segment(target, "--link", "0.3", "--what", "cells,table", source="tz.tif")
    cells = np.load("tz-cells.npy").reshape(10, 90, 110)
    for name in ("tz-table.csv", "out/table.csv"):
        with Path(name).open() as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0])[:4] == ["image", "section", "stack", "object"]
        of_stack = [{int(row["object"]) for row in rows if row["stack"] == number} for number in "12"]
        assert of_stack == [{*np.unique(part[part > 0]).tolist()} for part in np.split(cells, 2)]
        places = {(row["section"], row["stack"], row["t"], row["z"]) for row in rows}  # a stack is a time point
        assert places == {(str(5 * t + z), str(t + 1), str(t + 1), str(z)) for t in (0, 1) for z in range(1, 6)}
    segment("one.npy", "--link", "0.3", "--what", "table")
    assert "stack" not in Path("one.csv").read_text()


@pytest.mark.parametrize("flag", ["--link 0.5", "--min_size 9", "--fill_holes off"])
def test_flags_of_objects_need_objects(stack, fails, flag):
    argv = ["--mode", "predict", "--input", "in.tif", "--output", "o.npy", "--what", "mask", *flag.split()]
    assert f"{flag}: applies to objects: add cells to --what mask" in fails(main.main, argv, 2)


def test_image_that_is_no_stack_is_not_linked(stack, fails):
    tifffile.imwrite("time.tif", stack, imagej=True, metadata={"axes": "TYX"})
    tifffile.imwrite("one.tif", stack[0])
    argv = ["--mode", "predict", "--gpu_ids", "-1", "--output", "o.npy", "--what", "cells", "--link", "0.5", "--input"]
    assert "each of these images is a stack of its own: name a stack" in fails(main.main, [*argv, "time.tif"])
    assert "one.tif, page 1 is one image: name a stack" in fails(main.main, [*argv, "one.tif"])
    predictor = load("checkpoints/unet/em/model_epoch0001.pth")
    for image, what in ((stack[0], "cells"), (stack[None], "cells"), (stack, "probability")):
        with pytest.raises(UserError, match="links the cells of a stack"):
            predict_array(predictor, image, what=what, link=0.5)
    with pytest.raises(UserError, match="choose probability or cells"):
        predict_array(predictor, stack, what="mask")


@pytest.mark.parametrize("link", ["0", "0.2"])
def test_table_of_several_classes_lists_the_objects_that_were_written(stack, link):
    write_network("three", {"nch_ker": 2}, THREE)
    segment("out.npy", "--scope", "three", "--min_size", "6", "--fill_holes", "on", "--link", link)
    raw, cells = segment("raw.npy", "--scope", "three", *ALL), np.load("out.npy")
    with Path("out.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = {(int(row["section"]) - 1, int(row["object"])): int(row["area_px"]) for row in rows}
    assert table == {(z, n): np.sum(cells[z] == n) for z in range(5) for n in np.unique(cells[z])[1:]}
    assert {row["class"] for row in rows} == {"b", "c"} and raw.max() > filtered(raw, raw, 6, True).max()
    predictor = load("checkpoints/three/em/model_epoch0001.pth")
    options = {"tta": False, "min_size": 6, "fill_holes": True, "link": float(link)}
    assert np.array_equal(predict_array(predictor, stack, what="cells", **options), cells)
    classes = predict_array(predictor, stack, tta=False).argmax(1)
    for z in range(5):
        found = ObjectList()
        found.add(cells[z], classes[z] + 1)
        of_page = {int(row["object"]): row["class"] for row in rows if int(row["section"]) == z + 1}
        assert {number: "abc"[found.class_id[number] - 1] for number in of_page} == of_page


TEST = ["--mode", "test", "--gpu_ids", "-1", "--tta", "off", "--amp", "off"]


def test_test_mode_filters_objects_by_flags(trained, capsys):
    results = Path("results/unet/em/metrics.json")
    found = []
    for flags in (ALL, [*ALL, "--min_size", "100000"], [*ALL, "--fill_holes", "on"]):
        assert main.main([*TEST, *flags]) == 0
        found.append(json.loads(results.read_text()))
    kept, none, filled = found
    assert "min_size" not in kept and "object_f1_unfiltered" not in kept["mean"]
    assert none["mean"]["object_f1"] == 0 and (none["min_size"], none["fill_holes"]) == (100000, False)
    pixels = ("pixel_error", "v_rand", "num_split")
    assert all(none["mean"][name] == filled["mean"][name] == kept["mean"][name] for name in pixels)
    assert "; objects under 100000 px dropped" in capsys.readouterr().out and filled["fill_holes"] is True


@pytest.mark.parametrize("flags", [[], ["--min_size", "30"], ["--fill_holes", "off"], ALL])
def test_test_mode_scores_the_objects_that_predict_writes(stack, database, capsys, flags):
    np.save("section.npy", stack[0])
    capsys.readouterr()
    cells, raw = (segment("cells.npy", *more, source="section.npy") for more in (flags, ALL))
    num = int(re.search(r"objects: (\d+) cell", capsys.readouterr().out)[1])
    for file in (database / "test").iterdir():
        file.unlink()
    label = np.uint8(raw > 0)
    label[:, ::40] = 0  # parts some objects that are one for the network
    write_sample(database / "test" / "00000.npy", stack[0][..., None], label)
    assert main.main([*TEST, *flags]) == 0
    table = capsys.readouterr().out
    scores = json.loads(Path("results/unet/em/metrics.json").read_text())["mean"]
    truth = ndimage.label(label)[0]
    area, other = np.bincount(truth.ravel()), np.bincount(cells.ravel())
    joint = np.histogram2d(truth.ravel(), cells.ravel(), [np.arange(len(area) + 1), np.arange(len(other) + 1)])[0]
    matches = (joint / (area[:, None] + other - joint))[1:, 1:] >= 0.5
    num_match = matches[linear_sum_assignment(matches, maximize=True)].sum()
    assert num == cells.max() and num_match > 0
    assert 2 * num_match / scores["object_f1"] - truth.max() == pytest.approx(num)  # objects that the test has scored
    assert scores["object_f1"] == object_scores(truth, cells)["object_f1"]
    if num == raw.max():
        assert flags == ALL and "object_f1_unfiltered" not in scores
    else:
        assert scores["object_f1_unfiltered"] == object_scores(truth, raw)["object_f1"] != scores["object_f1"]
        assert "object_f1  object_f1_unfiltered\n" in table and "; objects " in table
        assert "object_f1_unfiltered</button>" in Path("results/unet/em/index.html").read_text()
        assert ",object_f1,object_f1_unfiltered," in Path("results/unet/em/metrics.csv").read_text()
