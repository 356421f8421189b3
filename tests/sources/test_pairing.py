import json
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from zarrs import write_plate

from run_make_database import main

MADE = ["--input", "raw", "--label", "masks"]


def noise(number, channels=0, dtype=np.uint8):
    shape = (24, 30, channels) if channels else (24, 30)
    return np.random.default_rng(number).integers(0, 256, shape).astype(dtype)


def mask(number):
    return (noise(number) > 99).astype(np.uint8) * 255


def save(path, pixels):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack", byteorder=None)
    else:
        Image.fromarray(pixels).save(path)


def write(images):
    for number, image in enumerate(images):
        save(f"raw/{number}.tif", image)
        save(f"masks/{number}.tif", mask(number))


def sample(split, number=0):
    return np.load(f"datasets/em/{split}/{number:05d}.npy")


def info():
    return json.loads(Path("datasets/em/dataset.json").read_text())


@pytest.mark.parametrize("order", [[0, 3, 0], [3, 0, 3]])
def test_grey_images_among_colours_become_colours(work, capsys, order):
    images = [noise(number, channels) for number, channels in enumerate(order)]
    write(images)
    assert main(MADE) == 0
    for split, image in zip(("train", "val", "test"), images, strict=True):
        expected = image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)
        assert np.array_equal(sample(split)["input"], expected)
    grey = order.count(0)
    assert f"{grey} image(s) are grey, {3 - grey} RGB: grey images are converted to RGB" in capsys.readouterr().out
    assert info()["nch_in"] == 3


@pytest.mark.parametrize("order", [[0, 3, 0], [3, 0, 3]])
def test_colours_that_are_copies_of_grey_become_grey(work, capsys, order):
    images = [noise(number) for number in range(3)]
    write([np.repeat(i[..., None], 3, 2) if channels else i for i, channels in zip(images, order, strict=True)])
    assert main(MADE) == 0
    assert np.array_equal(sample("train")["input"][..., 0], images[0]) and info()["nch_in"] == 1
    assert f"{order.count(3)} RGB without colours: these are converted to grey" in capsys.readouterr().out


def test_byte_orders_go_together_and_types_do_not(work, fails):
    write([noise(0, dtype=np.uint16)] * 3)
    tifffile.imwrite("raw/1.tif", noise(1).astype(">u2"), byteorder=">", photometric="minisblack")
    tifffile.imwrite("raw/2.tif", noise(2).astype("<u2"), byteorder="<", photometric="minisblack")
    assert main(MADE) == 0
    assert np.array_equal(sample("val")["input"][..., 0], noise(1)) and sample("val")["input"].dtype == np.uint16
    save("raw/1.tif", noise(1))
    line = fails(main, [*MADE, "--overwrite"])
    assert "raw/1.tif, page 1 is uint8, raw/0.tif, page 1 uint16: convert them to one type" in line


@pytest.mark.parametrize("source", ["raw/*.tif", "raw"])
def test_images_and_masks_may_lie_in_one_folder(work, fails, capfd, source):
    for number in range(3):
        save(f"raw/cell{number}.tif", noise(number))
        save(f"raw/cell{number}_mask.tif", mask(number))
    assert main(["--input", source, "--label", "raw/*_mask.tif"]) == 0
    assert f"3 image(s) of {source} are matched by raw/*_mask.tif: used as labels only" in capfd.readouterr().out
    for number, split in enumerate(("train", "val", "test")):
        assert np.array_equal(sample(split)["input"][..., 0], noise(number))
        assert np.array_equal(sample(split)["label"] * 255, mask(number))
    assert "are also labels: give only the images to --input" in (
        fails(main, ["--input", source, "--label", "raw/*.tif", "--overwrite"])
    )


def test_images_of_one_name_are_paired_by_their_folders(work):
    for number in range(3):
        save(f"raw/id{number}/img.tif", noise(number))
        save(f"raw/id{number}/mask.tif", mask(number))
    assert main(["--input", "raw/*/img.tif", "--label", "raw/*/mask.tif"]) == 0
    for number, split in enumerate(("train", "val", "test")):
        assert np.array_equal(sample(split)["input"][..., 0], noise(number))
        assert np.array_equal(sample(split)["label"] * 255, mask(number))


def write_objects():
    """Three images in folders of their own, each with masks of a left and a right object that touch."""
    left, right = np.zeros((2, 24, 30), np.uint8)
    left[4:20, 2:15], right[4:20, 15:28] = 255, 255
    for number in range(3):
        save(f"raw/id{number}/images/id{number}.png", noise(number))
        for name, pixels in (("a", left), ("b", right)):
            save(f"raw/id{number}/masks/{name}{number}.png", pixels)
    return left, right


def test_masks_per_object_are_read_from_a_folder_per_image(work, capfd, fails):
    left, right = write_objects()
    argv = ["--input", "raw/*/images/*.png", "--label", "raw/*/masks/*.png"]
    assert main(argv) == 0
    expected = (left | right) > 0
    expected[:, 14:16] = False  # where two touch
    for number, split in enumerate(("train", "val", "test")):
        assert np.array_equal(sample(split)["label"], expected)
        assert np.array_equal(sample(split)["input"][..., 0], noise(number))
    assert "6 masks of 3 images" in capfd.readouterr().out
    assert (info()["class_names"], len(info()["sources"])) == (["background", "object"], 9)
    save("raw/id1/masks/b1.png", np.zeros((24, 31), np.uint8))
    line = fails(main, [*argv, "--overwrite"])
    assert "raw/id1/masks/b1.png has (height, width) (24, 31)" in line and "must agree" in line


def test_message_about_many_paths_is_short(work, fails):
    for number in range(60):
        save(f"raw/{number}.tif", noise(number))
        save(f"masks/{number}.tif", mask(number))
    images, masks = (sorted(map(str, Path(name).iterdir())) for name in ("raw", "masks"))
    for argv in (
        ["--input", *images, "--label", *masks[:-1]],
        ["--input", *images, "--label", masks[0]],
        ["--input", *masks, "--label", *masks],
    ):
        line = fails(main, argv)
        assert len(line) < 400 and not re.search(r"\('", line)
        assert "60 paths from raw/0.tif on" in line or "60 paths from masks/0.tif on" in line


def write_stacks(num=8):
    """A stack of two channels in OME-TIFF, and its labels."""
    pixels = np.stack([np.stack([noise(number), noise(number + 50)]) for number in range(num)])
    masks = np.stack([mask(number) for number in range(num)])
    metadata = {"axes": "ZCYX", "Channel": {"Name": ["DAPI", "GFP"]}}
    tifffile.imwrite("raw.ome.tif", pixels, metadata=metadata)
    tifffile.imwrite("masks.tif", masks, photometric="minisblack")
    return pixels, masks


@pytest.mark.parametrize("is_small", [False, True])
def test_sections_choose_labels_too_unless_they_are_of_the_chosen(work, is_small):
    pixels, masks = write_stacks()
    if is_small:
        tifffile.imwrite("masks.tif", masks[[1, 4, 6]], photometric="minisblack")
    given = ["--input", "raw.ome.tif", "--label", "masks.tif", "--section", "1,4,6", "--channel", "GFP"]
    assert main(given) == 0
    for number, split in zip((1, 4, 6), ("train", "val", "test"), strict=True):
        assert np.array_equal(sample(split)["input"][..., 0], pixels[number, 1])
        assert np.array_equal(sample(split)["label"] * 255, masks[number])
    facts = info()
    assert facts["nch_in"] == 1
    assert facts["samples"]["val"] == [{"file": "00000.npy", "source": "raw.ome.tif", "frame": 4, "channels": [1]}]


def test_sections_of_another_number_than_labels_are_refused(work, fails):
    _, masks = write_stacks()
    tifffile.imwrite("masks.tif", masks[:5], photometric="minisblack")
    given = ["--input", "raw.ome.tif", "--label", "masks.tif", "--section", "1,4,6"]
    assert "raw.ome.tif has 3 pages, masks.tif has 5" in fails(main, given)
    assert "no section 9: it has 8, 0 to 7" in fails(main, [*given[:4], "--section", "9"])
    assert "no channel RFP: it has 2, 0 (DAPI), 1 (GFP)" in fails(main, [*given[:4], "--channel", "RFP"])
    assert not (work / "datasets" / "em" / "dataset.json").exists()


def test_sections_are_chosen_in_each_file_of_folders(work):
    for name in ("a", "b"):
        Path("raw").mkdir(exist_ok=True)
        Path("masks").mkdir(exist_ok=True)
        _, masks = write_stacks(4)
        Path("raw.ome.tif").rename(f"raw/{name}.tif")
        Path("masks.tif").rename(f"masks/{name}.tif")
    assert main([*MADE, "--section", "0,3", "--context", "1"]) == 0
    assert np.array_equal(sample("train", 1)["label"] * 255, masks[3])
    assert sample("train")["input"].shape[-1] == 6
    assert np.array_equal(sample("train")["input"][..., 4], noise(1))  # the section below, which is not chosen


def test_images_and_labels_may_be_data_sets_of_one_file(work):
    h5py = pytest.importorskip("h5py")
    for number in range(3):
        with h5py.File(f"{number}.h5", "w") as file:
            file["raw"], file["label"] = noise(number), mask(number)
    assert main(["--input", "*.h5:/raw", "--label", "*.h5:/label"]) == 0
    for number, split in enumerate(("train", "val", "test")):
        assert np.array_equal(sample(split)["input"][..., 0], noise(number))
        assert np.array_equal(sample(split)["label"] * 255, mask(number))
    with h5py.File("volume.h5", "w") as file:
        file["raw"] = np.stack([noise(number) for number in range(4)])
        file["label"] = np.stack([mask(number) for number in range(4)])
    given = ["--input", "volume.h5:/raw", "--label", "volume.h5:/label", "--overwrite", "--split", "contiguous"]
    assert main([*given, "--section", "1:"]) == 0
    assert np.array_equal(sample("test")["input"][..., 0], noise(3))
    assert np.array_equal(sample("test")["label"] * 255, mask(3))


def test_series_of_a_sample_is_well_and_field(work):
    names = ("A/1/0", "A/1/1", "B/2/0")
    write_plate(work / "p.zarr", {name: noise(number) for number, name in enumerate(names)})
    tifffile.imwrite("masks.tif", np.stack([mask(number) for number in range(3)]), photometric="minisblack")
    assert main(["--input", "p.zarr", "--label", "masks.tif"]) == 0
    samples = [of[0]["series"] for of in info()["samples"].values()]
    assert samples == ["A/1/0", "A/1/1", "B/2/0"] and np.array_equal(sample("test")["input"][..., 0], noise(2))
