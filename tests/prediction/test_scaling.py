import re
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from conftest import SMALL, finish, write_stacks
from skimage.measure import regionprops

import main
import run_make_database
from images.resample import resampled
from predict import load, predict_array
from prediction import scaling
from prediction.objects import ObjectFilter
from prediction.scaling import Scale, restored, restored_rows
from sources.phantom import nuclei_images
from utils import UserError

PREDICT = ["--mode", "predict", "--gpu_ids", "-1", "--tta", "off", "--amp", "off"]
RNG = np.random.default_rng(0)


def write_tiff(name, pixels, height=None, width=None):
    """ImageJ TIFF, with pixels of a height and width [µm] if they are given."""
    options = {"resolution": (1 / (width or height), 1 / height)} if height else {}
    axes = "ZYX" if pixels.ndim == 3 else "YX"
    tifffile.imwrite(name, pixels, imagej=True, metadata={"axes": axes} | ({"unit": "um"} if height else {}), **options)


def train(work, *flags, size=0.25, values=(0, 255)):
    """Network of images whose pixels have a size [µm], or none."""
    write_stacks(work, 5, (48, 48), values=values)
    if size:
        write_tiff("train-volume.tif", tifffile.imread("train-volume.tif"), size)
    assert (
        run_make_database.main(["--overwrite", "--input", "train-volume.tif", "--label", "train-labels.tif", *flags])
        == 0
    )
    assert main.main([*SMALL, "--num_epoch", "1", "--train_continue", "off"]) == 0
    return load(work / "checkpoints" / "unet" / "em" / "model_epoch0001.pth")


def segment(*flags):
    return main.main([*PREDICT, *flags])


def newest(work):
    return load(work / "checkpoints" / "unet" / "em" / "model_epoch0001.pth")


def test_scale_gives_the_mask_of_the_image_before_it_was_resampled(work):
    assert run_make_database.main(["--synthetic", "8", "--size", "96", "--phantom", "nuclei"]) == 0
    assert main.main([*SMALL, "--num_epoch", "40", "--nch_ker", "4", "--batch_size", "2", "--lr", "0.01"]) == 0
    predictor = load(work / "checkpoints" / "unet" / "em" / "model_epoch0040.pth")
    image = nuclei_images(1, 128, seed=5)[0][0][..., None]
    expected = predict_array(predictor, image, tta=False)
    for factor in (0.5, 2, (2, 0.5)):
        scale = Scale(*np.broadcast_to(factor, 2))
        other = resampled(image, Scale(1 / scale.y, 1 / scale.x).shape(image.shape))[:]
        found = predict_array(predictor, other, tta=False, scale=factor)
        assert found.shape == other.shape[:2] and found.min() >= 0 and found.max() <= 1
        unscaled = predict_array(predictor, other, tta=False)
        dices = []
        for each in (found, unscaled):
            masks = [expected > 0.5, resampled(each[..., None], image.shape[:2])[:][..., 0] > 0.5]
            dices.append(2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum()))
        assert dices[0] > 0.95 and dices[0] > dices[1]


def test_scale_1_changes_no_bit(trained, work):
    write_tiff("in.tif", RNG.integers(0, 255, (2, 90, 130)).astype(np.uint8))
    for target, flags in (("a.npy", []), ("b.npy", ["--scale", "1"]), ("c.npy", ["--scale", "1.0,1"])):
        assert segment("--input", "in.tif", "--output", target, "--dtype", "float32", "--tile", "64", *flags) == 0
    image = tifffile.imread("in.tif")
    arrays = [predict_array(newest(work), image, tta=False, tile=64, **scale) for scale in ({}, {"scale": 1})]
    assert all(np.array_equal(array, np.load("a.npy")) for array in (np.load("b.npy"), np.load("c.npy"), *arrays))


@pytest.mark.parametrize("norm", ["bnorm", "inorm"])
def test_scaled_outputs_in_bands_are_those_of_the_whole(trained, work, norm, monkeypatch):
    assert main.main([*SMALL, "--num_epoch", "8", "--lr", "0.01", "--scope", "more", "--norm", norm]) == 0
    image = np.random.default_rng(1).integers(0, 255, (3, 150, 190)).astype(np.uint8)
    write_tiff("in.tif", image)
    monkeypatch.setattr(scaling, "BAND_VALUES", 190 * 37)  # bands of 37 rows
    outputs = ["probability", "mask", "cells", "table", "overlay"]
    flags = ["--scope", "more", "--scale", "1.7", "--what", ",".join(outputs), "--dtype", "float32", "--tile", "64"]
    assert segment("--input", "in.tif", "--output", "out.npy", *flags) == 0
    probability, mask, cells = (np.load(f"out-{name}.npy") for name in outputs[:3])
    predictor = load(work / "checkpoints" / "more" / "em" / "model_epoch0008.pth")
    assert np.array_equal(probability, predict_array(predictor, image, tta=False, scale=1.7, tile=64))
    assert norm == "inorm" or np.allclose(probability, predict_array(predictor, image, tta=False, scale=1.7), atol=1e-5)
    assert np.array_equal(mask == 255, probability > predictor.threshold) and probability.shape == image.shape
    assert np.array_equal(cells, predict_array(predictor, image, tta=False, scale=1.7, tile=64, what="cells"))
    areas = [round(region.area) for section in cells for region in regionprops(section)]
    table = (work / "out-table.csv").read_text().splitlines()
    column = table[0].split(",").index("area_px")
    assert [int(row.split(",")[column]) for row in table[1:]] == areas and len(areas) > 3
    assert tifffile.imread("out-overlay.tif").shape == (3, 150, 190, 3)


@pytest.mark.parametrize("target", ["out.npy", "out.zarr", "out.tif"])
def test_scaled_images_are_the_same_whatever_the_number_of_processes(trained, work, together, target):
    if target == "out.zarr":
        pytest.importorskip("zarr")
    write_tiff("in.tif", RNG.integers(0, 255, (3, 150, 90)).astype(np.uint8))
    flags = ["--input", "in.tif", "--scale", "0.6", "--tile", "64", "--dtype", "float32"]
    assert segment(*flags, "--output", "one.npy") == 0
    finish(together(2, *PREDICT, *flags, "--output", target))
    read = {".npy": np.load, ".tif": tifffile.imread, ".zarr": read_zarr}[target[3:]]
    assert np.array_equal(read(target), np.load("one.npy"))


def read_zarr(name):
    import zarr

    return zarr.open(name, mode="r")["0"][:].reshape(3, 150, 90)


@pytest.mark.parametrize(
    ("flags", "options"),
    [(["--context", "1"], {}), ([], {"values": (0, 128, 255)}), (["--context", "1"], {"values": (0, 1, 2)})],
)
def test_scaled_images_with_context_or_several_classes_are_those_of_the_array(work, flags, options):
    predictor = train(work, *flags, **options)
    image = RNG.integers(0, 255, (3, 60, 50)).astype(np.uint8)
    write_tiff("in.tif", image)
    around = [image[[max(n - 1, 0), n, min(n + 1, 2)]] for n in range(3)]  # neighbours, repeated at the ends
    channels = np.stack(around).transpose(0, 2, 3, 1) if flags else image
    what = ["--what", "probability,cells,rois", "--dtype", "float32", "--link", "0.2", "--tta", "on"]
    assert segment("--input", "in.tif", "--output", "out.npy", "--scale", "2,1.5", *what) == 0
    expected = predict_array(predictor, channels, scale=(2, 1.5))
    found = np.load("out-probability.npy")
    assert np.array_equal(found, expected)
    cells = predict_array(predictor, channels, scale=(2, 1.5), what="cells", link=0.2)
    assert np.array_equal(np.load("out-cells.npy"), cells)


def test_scale_auto_resamples_to_the_pixel_size_of_the_training(work, capsys):
    predictor = train(work, size=0.25)
    image = RNG.integers(0, 255, (60, 80)).astype(np.uint8)
    write_tiff("in.tif", image, 0.5, 0.125)
    write_tiff("same.tif", image, 0.2525)
    assert segment("--input", "in.tif", "same.tif", "--output", "warned.npy") == 0
    assert "use --scale auto" in capsys.readouterr().out
    assert segment("--input", "in.tif", "same.tif", "--output", "out.npy", "--scale", "auto", "--dtype", "float32") == 0
    output = capsys.readouterr()
    assert "scale of the images for the network: 2,0.5, 1\n" in output.out and "warning" not in output.out
    found = np.load("out.npy")
    assert np.array_equal(found[0], predict_array(predictor, image, tta=False, scale=(2, 0.5)))
    assert np.array_equal(found[1], predict_array(predictor, image, tta=False))
    assert segment("--input", "in.tif", "--output", "out.npy", "--scale", "4") == 0
    assert "in.tif, page 1 at --scale 4: a pixel has 0.03125 µm" in capsys.readouterr().out
    assert segment("--input", "in.tif", "--output", "out.npy", "--scale", "2,0.5") == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("trained_size", "size", "words"),
    [
        (0.25, None, r"--scale auto: in.tif, page 1: its pixel size is unknown \(.+\): give --scale FACTOR"),
        (
            None,
            0.5,
            r"--scale auto: .*model_epoch0001.pth: the pixel size of its training is unknown: give --scale FAC",
        ),
        (
            0.25,
            250.0,
            r"a pixel has 250 µm, in the training 0.25 µm: they may differ by a factor of 20: check the unit",
        ),
    ],
)
def test_scale_auto_is_refused_where_a_pixel_size_is_unknown_or_wrong(work, fails, trained_size, size, words):
    train(work, size=trained_size)
    write_tiff("in.tif", RNG.integers(0, 255, (60, 80)).astype(np.uint8), size)
    argv = [*PREDICT, "--input", "in.tif", "--output", "out.npy", "--scale"]
    assert re.search(words, fails(main.main, [*argv, "auto"]))
    assert main.main([*argv, "2"]) == 0


def test_scale_auto_of_networks_with_other_pixel_sizes_is_refused(work, fails):
    train(work, size=0.25)
    assert main.main([*SMALL, "--num_epoch", "1", "--scope", "b"]) == 0
    write_tiff("in.tif", RNG.integers(0, 255, (60, 80)).astype(np.uint8), 0.5)
    argv = [*PREDICT, "--input", "in.tif", "--output", "out.npy", "--scale", "auto", "--scope", "unet,b"]
    assert main.main(argv) == 0
    train(work, size=0.5)
    words = "trained with pixels of 0.5 x 0.5 µm and 0.25 x 0.25 µm: give --scale FACTOR"
    assert words in fails(main.main, argv)


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "1e9", "half", "2,", "1,2,3", "0.01"])
def test_scale_refuses_what_is_no_factor(trained, work, scale, fails):
    argv = [*PREDICT, "--input", "in.tif", "--output", "out.npy", "--scale", scale]
    assert f"--scale {scale}: must be auto, a factor in [0.05, 20], or two" in fails(main.main, argv, status=2)


def test_scale_of_an_array_refuses_what_is_no_factor(trained, work):
    for scale in (0, -1, float("nan"), (1, 2, 3), "auto"):
        with pytest.raises(UserError, match=r"give a factor in \[0.05, 20\], or two"):
            predict_array(newest(work), np.zeros((40, 40), np.uint8), scale=scale)


def test_scale_divides_the_smallest_area_of_the_training_by_its_square():
    assert Scale(0.5, 0.5).filter(ObjectFilter(24, True)) == ObjectFilter(96, True)
    assert Scale(2, 1).filter(ObjectFilter(25)) == ObjectFilter(13)
    assert Scale(4, 4).filter(ObjectFilter(10)).is_active is False  # each pixel is 16 of the training


def test_scale_leaves_a_given_size_in_pixels_of_the_image(work, capsys):
    assert run_make_database.main(["--synthetic", "4", "--size", "96", "--phantom", "nuclei"]) == 0
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    write_tiff("in.tif", RNG.integers(0, 255, (96, 80)).astype(np.uint8))
    argv = ["--input", "in.tif", "--output", "out.npy", "--what", "cells", "--scale", "0.5"]
    smallest = newest(work).object_filter.min_size
    assert smallest > 1
    for flags, size in (([], 4 * smallest), (["--min_size", "9"], 9)):
        assert segment(*argv, *flags) == 0
        assert f"filter of the objects: under {size} px dropped" in capsys.readouterr().out


def test_scaled_image_of_pytorch_unet_is_normalised_by_the_type_of_its_file(trained, work):
    predictor, image = newest(work), RNG.integers(0, 255, (40, 50, 1)).astype(np.uint8)
    member = predictor.members[0]
    predictor = replace(predictor, members=(replace(member, info=replace(member.info, normalize="legacy")),))
    expected = predict_array(predictor, (image / 255).astype(np.float32), tta=False, scale=2)
    np.testing.assert_allclose(predict_array(predictor, image, tta=False, scale=2), expected, atol=1e-5)


def test_scaled_image_of_a_wide_type_keeps_its_differences(trained, work):
    predictor, image = newest(work), RNG.integers(0, 255, (40, 50)).astype(np.uint32)
    expected = predict_array(predictor, image, tta=False, scale=0.5)
    found = predict_array(predictor, image + np.uint32(2**31), tta=False, scale=0.5)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_restored_probability_is_the_same_in_bands_of_any_height(monkeypatch):
    probability = RNG.random((31, 23, 3)).astype(np.float32)
    whole = np.concatenate([band.values for band in restored(probability, (70, 40))], axis=1)
    monkeypatch.setattr(scaling, "BAND_VALUES", 40 * 3 * 7)
    assert [rows.stop for rows in restored_rows((70, 40), 3)] == list(range(7, 71, 7))
    bands = list(restored(probability, (70, 40)))
    assert whole.shape == (3, 70, 40) and np.array_equal(np.concatenate([band.values for band in bands], axis=1), whole)
    np.testing.assert_allclose(whole.sum(0), resampled(probability.sum(2)[..., None], (70, 40))[:][..., 0], atol=1e-5)
