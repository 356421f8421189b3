import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import tifffile
from conftest import SMALL, finish, wait_for
from PIL import Image

import main
import run_make_database
from images.readers import list_frames, read_geometry
from predict import load, predict_array
from prediction.predictor import Predictor
from utils import UserError

PREDICT = ["--mode", "predict", "--gpu_ids", "-1", "--tta", "off", "--amp", "off"]  # `load` computes in float32, too


def segment(source, target, *flags):
    return main.main([*PREDICT, "--input", str(source), "--output", str(target), *flags])


def newest(work):
    return load(work / "checkpoints" / "unet" / "em" / "model_epoch0001.pth")


@pytest.fixture
def stack(trained):
    """A stack of three sections of 200 x 330 px, which takes several tiles of 64 px."""
    pixels = np.random.default_rng(0).integers(0, 255, (3, 200, 330)).astype(np.uint8)
    options = {"imagej": True, "resolution": (1 / 0.004, 1 / 0.005)}
    tifffile.imwrite("in.tif", pixels, **options, metadata={"axes": "ZYX", "unit": "micron", "spacing": 0.05})
    return pixels


@pytest.mark.parametrize("tile", ["0", "64"])
def test_tiff_output_equals_the_array_and_has_its_pixel_size(stack, work, tile):
    assert segment("in.tif", "out.tif", "--dtype", "float32", "--tile", tile) == 0
    expected = predict_array(newest(work), stack, tta=False)
    assert expected.shape == stack.shape and expected.dtype == np.float32 and 0 <= expected.min() < expected.max() <= 1
    np.testing.assert_allclose(tifffile.imread("out.tif"), expected, atol=1e-5)
    with tifffile.TiffFile("out.tif") as tif:
        assert tif.series[0].axes == "ZYX" and tif.imagej_metadata["unit"] == "micron"
    g = read_geometry(list_frames(work / "out.tif"))
    assert (g.axes, g.lengths, g.unknown) == ("Z", (3,), "")
    assert g.pixel == pytest.approx({"X": 0.004, "Y": 0.005, "Z": 0.05})
    assert not list(work.glob("*.partial"))


@pytest.mark.parametrize("num_level", ["3", "5"])
def test_tiles_of_other_numbers_of_levels_give_what_the_whole_image_gives(stack, work, num_level, fails):
    assert main.main([*SMALL, "--num_epoch", "1", "--scope", "deep", "--num_level", num_level]) == 0
    assert segment("in.tif", "out.npy", "--dtype", "float32", "--tile", "80", "--scope", "deep") == 0
    predictor = load(work / "checkpoints" / "deep" / "em" / "model_epoch0001.pth")
    assert predictor.stride == 2 ** int(num_level)
    np.testing.assert_allclose(np.load("out.npy"), predict_array(predictor, stack, tta=False), atol=1e-5)
    again = [*SMALL, "--num_epoch", "2", "--scope", "deep", "--train_continue", "on"]
    assert f"was trained with --num_level {num_level}" in fails(main.main, again)
    assert main.main([*again, "--num_level", num_level]) == 0


def test_average_over_eight_views_is_the_same_in_tiles(stack, work):
    whole = predict_array(newest(work), stack[0])
    np.testing.assert_allclose(predict_array(newest(work), stack[0], tile=64), whole, atol=1e-5)
    assert not np.allclose(predict_array(newest(work), stack[0], tta=False), whole, atol=1e-5)


@pytest.mark.parametrize("target", ["out.npy", "out/"])
def test_image_is_complete_where_memory_for_its_tiles_shrinks_meanwhile(stack, work, monkeypatch, target):
    sizes = iter([2**15, *[2**12] * 99])  # as on a GPU that the first tiles fill
    monkeypatch.setattr(Predictor, "_max_pixels", lambda *_: next(sizes))
    assert segment("in.tif", target) == 0
    result = (
        np.load(target)
        if target == "out.npy"
        else np.stack([Image.open(f"out/in-{page:04d}.png") for page in range(3)])
    )
    assert np.abs(result - 255.0 * predict_array(newest(work), stack, tta=False)).max() < 0.51


def test_outputs_written_together_agree(stack, work):
    assert segment("in.tif", "out.npy", "--what", "probability,mask,cells", "--tile", "64") == 0
    probability, mask, cells = (np.load(f"out-{what}.npy") for what in ("probability", "mask", "cells"))
    assert (probability.dtype, mask.dtype, cells.dtype) == (np.uint8, np.uint8, np.uint32)
    assert probability.shape == mask.shape == cells.shape == stack.shape
    assert set(np.unique(mask)) <= {0, 255} and np.array_equal(cells > 0, mask > 0)
    predictor = newest(work)
    real = predict_array(predictor, stack, tta=False)
    assert np.array_equal(probability, np.round(255 * real)) or np.abs(probability - 255 * real).max() < 0.51
    assert np.mean((mask > 0) == (real > predictor.threshold)) > 0.999


def test_folder_becomes_a_folder_of_pngs_under_the_same_names(stack, work):
    (work / "raw").mkdir()
    for name, page in zip(("b10.png", "b9.png"), stack, strict=False):
        Image.fromarray(page[:, : 100 + len(name)]).save(work / "raw" / name)
    tifffile.imwrite(work / "raw" / "c.tif", stack[:2], photometric="minisblack", compression="zlib", tile=(64, 64))
    assert segment("raw", "out", "--tile", "64") == 0
    assert sorted(path.name for path in (work / "out").iterdir()) == [
        "b10.png",
        "b9.png",
        "c-0000.png",
        "c-0001.png",
        "index.html",
    ]
    expected = np.round(predict_array(newest(work), stack[1], tta=False) * 255)
    assert np.abs(np.asarray(Image.open("out/c-0001.png")) - expected).max() <= 1
    assert segment("raw/*.png", "out2", "--what", "cells,mask") == 0
    assert len(list((work / "out2").glob("*.png"))) == 4


def test_zarr_that_is_stopped_leaves_nothing_and_begins_again(stack, work, monkeypatch):
    zarr = pytest.importorskip("zarr")
    from images.zarr_writer import ZarrWriter

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ZarrWriter, "write", stopped)
        assert segment("in.tif", "out.zarr", "--tile", "64") == 130
    assert not list(work.glob("*out*")) and not list(work.glob(".*out*"))
    assert segment("in.tif", "out.zarr", "--tile", "64") == segment("in.tif", "out.npy", "--tile", "64") == 0
    group = zarr.open_group("out.zarr", mode="r")
    assert np.array_equal(group["0"][:], np.load("out.npy"))
    scale = group.attrs["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"]
    assert scale == pytest.approx([0.05, 0.005, 0.004]) and group.attrs["ome"]["version"] == "0.5"
    assert segment("out.zarr", "again.zarr", "--tile", "64") == 0  # what was written is read
    assert not list(work.glob("*.partial"))


def tree(folder):
    """All files below a folder with what they hold, and links with where they lead."""
    return {
        path.relative_to(folder): path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.fixture
def inputs(trained, work):
    """An image as TIFF, in folders called .zarr, as Zarr, and behind links."""
    zarr = pytest.importorskip("zarr")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32)).astype(np.uint8)
    for folder in ("d.zarr", "notes.zarr", "pngs/in"):
        (work / folder).mkdir(parents=True)
    for name in ("in.tif", "d.zarr/px.tif", "in.tif.partial"):
        tifffile.imwrite(name, pixels)
    Image.fromarray(pixels).save("pngs/in/a.png")
    (work / "notes.zarr" / "notes.txt").write_text("mine")
    (work / "link.tif").symlink_to("in.tif")
    (work / "link").symlink_to("pngs")
    (work / "loop").symlink_to("loop")
    group = zarr.create_group("raw.zarr")
    for level in "01":
        group.create_array(level, data=pixels)
    (work / "raw.zarr.old").symlink_to("raw.zarr")
    return work


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("raw.zarr/0", "raw.zarr", "would replace the input"),
        ("raw.zarr/0", "raw.zarr/1", "unknown ending|would replace the input"),
        ("raw.zarr/0", "raw.zarr/x.zarr", "would replace the input"),
        ("raw.zarr/0", "raw.zarr/png/", "would replace the input"),
        ("raw.zarr/0", "other/../raw.zarr", "would replace the input"),
        ("d.zarr/px.tif", "d.zarr", "would replace the input"),
        ("in.tif.partial", "in.tif", "would replace the input"),
        ("link.tif", "in.tif", "would replace the input"),
        ("in.tif", "link.tif", "would replace the input"),
        ("pngs/in", "link/in", "would replace the input"),
        ("in.tif", "notes.zarr", "is not a Zarr image that --mode predict wrote .it holds notes.txt"),
        ("in.tif", "raw.zarr", "raw.zarr.old is not a folder"),
        ("in.tif", "loop/x.tif", "a link in this path leads to itself"),
        ("in.tif", "loop/x", "a link in this path leads to itself"),
        ("in.tif", "results_v1.2", "end the name of a folder with /"),
    ],
)
def test_inputs_and_files_of_others_are_not_replaced_or_removed(inputs, fails, source, target, words):
    before = tree(inputs)
    line = fails(main.main, [*PREDICT, "--input", source, "--output", target])
    assert re.search(words, line), line
    assert tree(inputs) == before


def test_pngs_may_lie_next_to_the_inputs_and_older_outputs_are_counted(inputs, capsys):
    def said(source, target, *flags):
        assert segment(source, target, *flags) == 0
        return capsys.readouterr().out.strip().splitlines()[-1]

    assert "replaced" not in said("in.tif", "pngs/in")
    assert said("in.tif", "pngs/in").endswith("pngs/in (replaced 2 older file(s))")  # with the page
    assert "replaced" not in said("in.tif", "results_v1.2/") and "replaced 2" in said("in.tif", "results_v1.2")
    for target in ("out.tif", "out.npy", "out.zarr", "out.png"):
        assert "replaced" not in said("in.tif", target)
        assert said("in.tif", target).endswith(f"{target} (replaced 1 older file(s))")
    assert np.array_equal(np.asarray(Image.open("out.png")), tifffile.imread("out.tif"))
    assert not [path for path in inputs.rglob("*") if path.name.endswith((".lock", "out.tif.partial", "out.zarr.old"))]


def test_picture_of_the_user_in_the_folder_is_not_replaced(inputs, fails):
    shutil.copy("pngs/in/a.png", "pngs/in.png")
    assert "pngs/in.png: not a PNG of predict" in fails(main.main, [*PREDICT, "--input", "in.tif", "--output", "pngs"])
    assert (inputs / "pngs" / "in.png").read_bytes() == (inputs / "pngs" / "in" / "a.png").read_bytes()
    assert segment("pngs/in", "pngs") == 0  # around the input, which stays
    assert (inputs / "pngs" / "a.png").is_file() and (inputs / "pngs" / "in" / "a.png").is_file()


def test_png_output_holds_one_image_of_one_output(stack, work, fails):
    for flags in (["in.tif"], ["one.tif", "--what", "mask,cells"], ["one.tif", "--dtype", "float32"]):
        tifffile.imwrite("one.tif", stack[0])
        line = fails(main.main, [*PREDICT, "--output", "out.png", "--input", *flags])
        assert "will be written: name a folder" in line or "no such type" in line
    assert not list(work.glob("*out*"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
@pytest.mark.parametrize("target", ["out.tif", "out.zarr", "out/"])
def test_target_that_another_run_writes_is_refused(inputs, fails, target):
    import fcntl

    lock = inputs / target / ".lock" if target.endswith("/") else inputs / f".{target}.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "in use" in fails(main.main, [*PREDICT, "--input", "in.tif", "--output", target])
    assert segment("in.tif", target) == 0


def test_link_planted_under_the_partial_name_is_not_followed(inputs):
    (inputs / "mine").write_text("mine")
    (inputs / "out.tif.partial").symlink_to("mine")
    (inputs / "out.tif").symlink_to("mine")
    assert segment("in.tif", "out.tif") == 0
    assert (inputs / "mine").read_text() == "mine" and not (inputs / "out.tif").is_symlink()


def test_axes_come_in_the_order_of_the_format_with_interval_and_names(trained, work, fails):
    pytest.importorskip("zarr")
    pixels = np.random.default_rng(0).integers(0, 255, (3, 2, 32, 48)).astype(np.uint8)  # Z, T
    metadata = {"axes": "ZTYX", "TimeIncrement": 2.5, "TimeIncrementUnit": "s"}
    tifffile.imwrite("in.ome.tif", pixels, metadata=metadata)
    for target in ("out.tif", "out.ome.tif", "out.zarr", "out.npy"):
        assert segment("in.ome.tif", target) == 0
    expected = np.load("out.npy").swapaxes(0, 1)
    for target in ("out.tif", "out.ome.tif"):
        with tifffile.TiffFile(target) as tif:
            assert tif.series[0].axes == "TZYX" and np.array_equal(tif.asarray(), expected)
            assert tif.is_ome == ("ome" in target) and tif.is_imagej == ("ome" not in target)
        assert read_geometry(list_frames(work / target)).interval == 2.5
    assert read_geometry(list_frames(work / "out.zarr")).interval == 2.5
    assert np.array_equal(valid_zarr("out.zarr"), expected)
    names = [f"slice {number}" for number in range(6)]
    tifffile.imwrite("named.tif", pixels.swapaxes(0, 1), imagej=True, metadata={"axes": "TZYX", "Labels": names})
    tifffile.imwrite("stack.tif", pixels[:, 0], imagej=True, metadata={"axes": "ZYX", "Labels": names[:3]})
    # ImageJ shows those of uncompressed files only
    for source, section, kept in (("named", "0:3", names), ("named", "1", names[1::3]), ("stack", "1", names[1:2])):
        assert segment(f"{source}.tif", "out.tif", "--what", "mask", "--compression", "none", "--section", section) == 0
        assert read_geometry(list_frames(work / "out.tif")).labels == tuple(kept)


def valid_zarr(path):
    """Pixels of an OME-Zarr image that the specification allows."""
    import zarr

    models = pytest.importorskip("ome_zarr_models.v05")
    group = zarr.open_group(path, mode="r")
    models.Image.from_zarr(group)
    if "image-label" in group.attrs["ome"]:
        assert models.ImageLabel.from_zarr(group).attributes.ome.image_label.version == "0.5"
    return group["0"][:]


@pytest.mark.parametrize("value", [np.inf, 1e300])
def test_numbers_beyond_all_ranges_are_one_line(trained, work, fails, value):
    pixels = np.ones((32, 32))
    pixels[3, 3] = value
    tifffile.imwrite("huge.tif", pixels)
    assert "holds NaN, infinity or" in fails(main.main, [*PREDICT, "--input", "huge.tif", "--output", "out.tif"])


@pytest.mark.parametrize("target", ["raw", "raw/out/", "raw/out.tif"])
def test_output_in_the_folder_of_the_images_is_refused(trained, work, fails, target):
    (work / "raw").mkdir()
    tifffile.imwrite("raw/a.tif", np.zeros((40, 50), np.uint8))
    assert "lie in it" in fails(
        main.main, ["--mode", "predict", "--gpu_ids", "-1", "--input", "raw", "--output", target]
    )
    assert [path.name for path in (work / "raw").iterdir()] == ["a.tif"]


@pytest.mark.parametrize("target", ["out.tif", "out.zarr"])
def test_processes_write_together_the_bytes_of_one(stack, work, together, target):
    if target.endswith("zarr"):
        pytest.importorskip("zarr")
    assert segment("in.tif", target, "--tile", "64") == 0
    finish(together(2, *PREDICT, "--input", "in.tif", "--output", f"two-{target}", "--tile", "64"))
    one, two = (
        sorted(p for p in [path, *path.rglob("*")] if p.is_file()) for path in (work / target, work / f"two-{target}")
    )
    same = [a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True) if a.name != "zarr.json"]
    assert same and all(same)


def test_killed_prediction_leaves_the_old_file(stack, work, start):
    (work / "out.tif").write_bytes(b"old")
    tifffile.imwrite("large.tif", np.tile(stack, (1, 8, 4)), photometric="minisblack")  # takes seconds
    process = start(main.main, *PREDICT, "--tta", "on", "--input", "large.tif", "--output", "out.tif", "--tile", "64")
    wait_for(work / "out.tif.partial", process)
    time.sleep(0.3)  # into the computation
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and (work / "out.tif").read_bytes() == b"old"
    assert not (work / "out.tif.partial").exists()


def test_bad_input_ends_in_one_line(stack, work, fails):
    def message(source, target, *flags):
        return fails(main.main, [*PREDICT, "--input", str(source), "--output", str(target), *flags])

    assert "needs --input" in message("", "out.tif")
    assert "none.tif: no such file" in message("none.tif", "out.tif")
    (work / "text.doc").write_text("text")
    assert "text.doc" in message("text.doc", "out.tif")
    assert "unknown ending .gif" in message("in.tif", "out.gif")
    assert "would replace the input" in message("in.tif", "./in.tif")
    tifffile.imwrite("rgb.tif", np.zeros((40, 40, 3), np.uint8), photometric="rgb")
    assert "rgb.tif, page 1: 3 channel(s), the network was trained on 1" in message("rgb.tif", "out.tif")
    tifffile.imwrite("nan.tif", np.full((40, 40), np.nan, np.float32))
    assert "nan.tif, page 1: it holds NaN" in message("nan.tif", "out.tif")
    tifffile.imwrite("small.tif", np.zeros((20, 20), np.uint8))
    (work / "mixed").mkdir()
    for name in ("in.tif", "small.tif"):
        (work / "mixed" / name).write_bytes((work / name).read_bytes())
    assert "one file can't hold both" in message("mixed", "out.tif")
    assert "no such type" in message("in.tif", "folder", "--dtype", "float32")
    (work / "file").write_text("")
    assert "/file: File exists" in message("in.tif", "file/out.tif")
    assert not list(work.glob("out*")) and not list(work.glob("*.partial"))


def test_damaged_page_in_the_middle_is_named(stack, work, fails):
    tifffile.imwrite("bad.tif", stack, photometric="minisblack", compression="zlib")
    with tifffile.TiffFile("bad.tif") as tif:
        offset = tif.pages[1].dataoffsets[0]
    data = bytearray((work / "bad.tif").read_bytes())
    data[offset : offset + 200] = bytes(200)
    (work / "bad.tif").write_bytes(data)
    assert "bad.tif, page 2: damaged" in fails(main.main, [*PREDICT, "--input", "bad.tif", "--output", "out.tif"])
    assert not list(work.glob("out*"))


@pytest.mark.slow
def test_classes_and_channels_go_through_every_format(work):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (6, 4, 4)).repeat(16, 1).repeat(16, 2).astype(np.uint8)
    images = np.stack([labels * 80, 200 - labels * 50], axis=1).astype(np.uint8) + rng.integers(
        0, 9, (6, 2, 64, 64), np.uint8
    )
    tifffile.imwrite("images.tif", images, imagej=True, metadata={"axes": "ZCYX"})
    tifffile.imwrite("labels.tif", labels, photometric="minisblack")
    assert run_make_database.main(["--input", "images.tif", "--label", "labels.tif"]) == 0
    assert main.main([*SMALL, "--nch_ker", "4", "--num_epoch", "20", "--batch_size", "1", "--lr", "0.01"]) == 0
    targets = ["out.tif", "out.npy"]
    targets += ["out.zarr"] if importlib.util.find_spec("zarr") else []
    for target in targets:
        assert segment("images.tif", target, "--what", "probability,mask,cells") == 0
    probability, mask = tifffile.imread("out-probability.tif"), tifffile.imread("out-mask.tif")
    assert probability.shape == (6, 3, 64, 64) and np.array_equal(np.load("out-probability.npy"), probability)
    assert np.mean(mask == labels) > 0.8
    if "out.zarr" in targets:
        assert np.array_equal(valid_zarr("out-probability.zarr"), probability.swapaxes(0, 1))  # C, Z, Y, X
        assert np.array_equal(valid_zarr("out-cells.zarr"), tifffile.imread("out-cells.tif"))
        assert np.array_equal(valid_zarr("out-mask.zarr"), mask)
        metadata = {path.name: json.loads((path / "zarr.json").read_text()) for path in work.glob("*.zarr")}
        labels = {name for name, entry in metadata.items() if "image-label" in entry["attributes"]["ome"]}
        assert labels == {"out-cells.zarr", "out-mask.zarr"}
    assert segment("images.tif", "folder", "--what", "mask,probability") == 0
    assert len(list((work / "folder").glob("*.png"))) == 6 * 4


def test_predict_array_says_what_it_can_not_segment(trained, work):
    predictor = newest(work)
    with pytest.raises(UserError, match="an image of shape"):
        predict_array(predictor, np.zeros(5))
    with pytest.raises(UserError, match="NaN"):
        predict_array(predictor, np.full((32, 32), np.nan))
    with pytest.raises(UserError, match="no such file"):
        load(work / "none.pth")
    assert predict_array(predictor, np.zeros((2, 2, 20, 40), np.uint16)).shape == (2, 2, 20, 40)
    assert predict_array(predictor, np.zeros((3, 1, 1))).shape == (3, 1, 1)  # a stack of single pixels
    with pytest.raises(UserError, match="1e150"):
        predict_array(predictor, np.eye(32) * 1e300)
    net = predictor.members[0].net.requires_grad_(False)
    next(net.parameters()).fill_(float("inf"))  # what overflows in 16 bits
    with pytest.raises(UserError, match="output is NaN"):
        predict_array(predictor, np.eye(32))


def test_channel_axis_makes_no_stack_of_slivers(trained, work):
    predictor, image = newest(work), np.random.default_rng(0).integers(0, 255, (2, 40, 48)).astype(np.uint8)
    expected = predict_array(predictor, image, tta=False)
    assert np.array_equal(predict_array(predictor, image[..., None], tta=False), expected)
    assert np.array_equal(predict_array(predictor, image[0, ..., None], tta=False), expected[0])
    for wrong in (np.dstack([image[0]] * 3), np.stack([image] * 2, axis=-1)):
        with pytest.raises(UserError, match=r"channel\(s\), the network was trained on 1"):
            predict_array(predictor, wrong)


@pytest.mark.parametrize(("dtype", "offset"), [("float64", 1e9), ("int64", 2**40), ("uint32", 2**31)])
def test_offset_of_the_grey_values_changes_no_result(trained, work, dtype, offset):
    image = np.random.default_rng(0).integers(0, 255, (40, 48)).astype(dtype)
    expected = predict_array(newest(work), image, tta=False)
    np.testing.assert_allclose(
        predict_array(newest(work), image + np.array(offset, dtype), tta=False), expected, atol=1e-5
    )


def test_sizes_in_nanometre_and_micrometre_become_micron_in_files_for_imagej(trained, work):
    metadata = {"axes": "ZYX", "PhysicalSizeX": 4, "PhysicalSizeXUnit": "nm", "PhysicalSizeZ": 0.05}
    metadata |= {"PhysicalSizeY": 0.004, "PhysicalSizeYUnit": "µm"}
    tifffile.imwrite("in.tif", np.zeros((2, 32, 32), np.uint8), ome=True, metadata=metadata)
    assert segment("in.tif", "out.tif", "--what", "mask,cells") == 0
    for name in ("out-mask.tif", "out-cells.tif"):
        g = read_geometry(list_frames(work / name))
        assert g.pixel == pytest.approx({"X": 0.004, "Y": 0.004, "Z": 0.05}) and not g.unknown
    with tifffile.TiffFile("out-mask.tif") as tif:
        assert tif.imagej_metadata["unit"] == "micron"
    with tifffile.TiffFile("out-cells.tif") as tif:  # ImageJ reads no OME, but the baseline's tags
        page = tif.pages[0]
        assert page.resolutionunit == 3 and page.resolution == pytest.approx((2.5e6, 2.5e6))


def test_metadata_of_a_run_is_plain_json(stack, work):
    pytest.importorskip("zarr")
    assert segment("in.tif", "out.zarr") == 0
    entry = json.loads((work / "out.zarr" / "zarr.json").read_text())
    assert entry["attributes"]["ome"]["multiscales"][0]["axes"][0] == {
        "name": "z",
        "type": "space",
        "unit": "micrometer",
    }


def test_context_of_sections_is_used_in_training_and_prediction(work, fails):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 40, 48)).astype(np.uint8)
    tifffile.imwrite("images.tif", pixels, photometric="minisblack")
    tifffile.imwrite("labels.tif", (pixels > 128) * np.uint8(255), photometric="minisblack")
    stacks = ["--input", "images.tif", "--label", "labels.tif"]
    assert run_make_database.main([*stacks, "--context", "1"]) == 0
    sample = np.load("datasets/em/train/00000.npy")["input"]
    assert np.array_equal(sample.transpose(2, 0, 1), pixels[[0, 0, 1]])  # at the end the section itself again
    assert main.main([*SMALL, "--num_epoch", "1"]) == main.main(["--mode", "test", "--gpu_ids", "-1"]) == 0
    assert np.asarray(Image.open("results/unet/em/images/0000-input.png")).shape == (40, 48)
    assert segment("images.tif", "out.npy", "--dtype", "float32") == 0
    around = np.stack([pixels[[max(i - 1, 0), i, min(i + 1, 5)]] for i in range(6)]).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(np.load("out.npy"), predict_array(newest(work), around, tta=False), atol=1e-6)
    tifffile.imwrite("rgb.tif", pixels[:3].transpose(1, 2, 0), photometric="rgb")
    assert "3 channel(s), the network was trained on 1: choose 1 of them, such as --channel 0" in fails(
        main.main, [*PREDICT, "--input", "rgb.tif", "--output", "o.npy"]
    )
    assert run_make_database.main(["--input", "rgb.tif", "--label", "none", "--overwrite"]) == 0
    assert "context 0, " in fails(main.main, ["--mode", "test", "--gpu_ids", "-1"])  # colours are no neighbours
    (work / "mixed").mkdir()
    for number, size in enumerate((40, 41, 40, 40)):
        for ending in ("png", "bmp"):
            Image.fromarray(pixels[0, :, :size]).save(work / "mixed" / f"{number}.{ending}")
    flags = ["--input", "mixed/*.png", "--label", "mixed/*.bmp", "--threshold", "9"]
    assert "must be of one size" in fails(run_make_database.main, [*flags, "--context", "1", "--name_data", "mixed"])


def test_input_names_several_images_after_one_flag(stack, work):
    for number, page in enumerate(stack):
        Image.fromarray(page).save(f"{number}.png")
    images = [f"{number}.png" for number in range(3)]
    assert main.main([*PREDICT, "--input", *images, "--output", "out.npy"]) == 0
    assert segment("in.tif", "whole.npy") == 0
    assert np.array_equal(np.load("out.npy"), np.load("whole.npy"))


def test_stack_named_by_its_number_has_all_its_pages(stack, work):
    with (work / "in.tif").open("rb") as file:
        assert segment(f"/dev/fd/{file.fileno()}", "out.npy") == 0  # as /dev/stdin < in.tif
    assert np.load("out.npy").shape == stack.shape


def test_gpu_that_is_missing_is_said_once(stack, capsys):
    assert main.main(["--mode", "predict", "--gpu_ids", "99", "--input", "in.tif", "--output", "out.tif"]) == 0
    assert capsys.readouterr().err.count("no GPU 99 here") == 1


def test_input_that_is_no_file_is_named_without_flags_of_other_programs(stack, work, fails):
    for source, words in (
        ("none.tif", "no such file or folder"),
        ("x/*.tif", "this pattern matches nothing"),
        ("datasets:/raw", "no such file"),
        ("https://a.org/b.tif", "URLs are not read"),
    ):
        line = fails(main.main, [*PREDICT, "--input", source, "--output", "out.tif"])
        assert f"{source}: {words}" in line and "--label" not in line
    os.mkfifo("pipe.tif")
    assert "is a pipe" in fails(main.main, [*PREDICT, "--input", "pipe.tif", "--output", "out.tif"])
