from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import checkpoint
import main
import predict
import run_make_database
from arguments import parse
from config import DatabaseFlags
from description import load_info
from images.layout import Layout
from images.readers import list_frames
from images.writers import NumberTiffWriter
from model import UNet
from prediction.predictor import Member, Predictor
from prediction.tiling import Band
from samples import IGNORE
from sources.database import _classes
from sources.pairing import list_pairs

SIZE = 48
CLASSES = np.zeros((3, SIZE, SIZE), np.uint8)  # class indices of three images
CLASSES[:, 8:20, 5:30], CLASSES[:, 30:40, 10:22] = 1, 2
CLASSES[1] = CLASSES[1].T
NUMBERS = np.zeros((3, SIZE, SIZE), np.uint16)  # objects, two of which touch
NUMBERS[:, 8:20, 5:17], NUMBERS[:, 8:20, 17:30], NUMBERS[:, 30:40, 10:22] = 7, 3, 300
COLOURS = np.uint8([[0, 0, 0], [255, 0, 0], [0, 128, 255]])
TWO = np.minimum(CLASSES, 1)
PART = np.where(np.arange(SIZE) < 3, 128, TWO * 255).astype(np.uint8)  # some columns are not annotated


def save_palette(path, label):
    image = Image.fromarray(label, "P")
    image.putpalette(COLOURS.tobytes())
    image.save(path)


def save_picture(path, label):
    Image.fromarray(label).save(path)


def save_rgba(path, label):
    Image.fromarray(np.dstack([np.zeros((SIZE, SIZE, 3), np.uint8), label])).save(path)


# labels, flags, how they are saved, and the type of the label images that are written
DRESSES = {
    "0 and 255": (TWO * np.uint8(255), [], save_picture, "uint8"),
    "0, 1, 2": (CLASSES, [], save_picture, "uint8"),
    "foreground is the lower": (TWO * np.uint8(255), ["--foreground", "0"], save_picture, "uint8"),
    "colours": (COLOURS[CLASSES], [], save_picture, "uint8"),
    "palette": (CLASSES, [], save_palette, "uint8"),
    "transparency": (TWO * np.uint8(255), [], save_rgba, "uint8"),
    "masks of two kinds": ([TWO[0], TWO[1] * 255, TWO[2] * 255], [], save_picture, "uint8"),
    "16 bits": (CLASSES * np.uint16(1000), [], tifffile.imwrite, "uint16"),
    "below 0": (CLASSES * np.float32(0.1) - 1, [], tifffile.imwrite, "float32"),
    "float64": (CLASSES * 0.1, [], tifffile.imwrite, "float64"),
    "threshold": (TWO * np.uint8(90), ["--threshold", "40.5"], save_picture, "uint8"),
    "high threshold": (TWO * np.uint16(900), ["--threshold", "600"], tifffile.imwrite, "uint16"),
    "threshold below 0": (TWO * np.float32(9) - 8, ["--threshold", "-3"], tifffile.imwrite, "float32"),
    "threshold and ignored": (
        np.where(PART == 128, 255, TWO * 90).astype(np.uint8),
        ["--threshold", "40.5", "--ignore", "255"],
        save_picture,
        "uint16",
    ),
    "ignored": (PART, ["--ignore", "128"], save_picture, "uint8"),
    "objects": (NUMBERS, ["--objects", "on"], tifffile.imwrite, "uint16"),
    "objects and ignored": (
        np.where(NUMBERS == 7, 1, NUMBERS),
        ["--objects", "on", "--ignore", "1"],
        tifffile.imwrite,
        "uint16",
    ),
}


class Perfect(Predictor):
    """Sees the classes that the images show."""

    def bands(self, image, grid, *, tta, every_class=False):
        def compute(numbers):
            for rows in (grid.rows[number].interior for number in numbers):
                classes = np.asarray(image[rows])[..., 0]
                one_hot = (np.arange(self.info.num_class)[:, None, None] == classes).astype(np.float32)
                yield Band(rows, one_hot[-self.num_channel :])

        return SimpleNamespace(compute=compute)


@pytest.fixture
def loop(work, monkeypatch):
    """Makes a database of label images, and a network that predicts its images perfectly; returns its flags."""

    def make(labels, flags, save):
        for folder in (Path("images"), Path("labels")):
            folder.mkdir()
        for number, label in enumerate(labels):
            save_picture(f"images/{number}.png", CLASSES[number])
            save(f"labels/{number}.{'tif' if save is tifffile.imwrite else 'png'}", label)
        source = ["--input", "images", "--label", "labels", "--num_val", "0", "--num_test", "0"]
        assert run_make_database.main([*source, *flags]) == 0
        made, info = parse(DatabaseFlags, [*source, *flags], ""), load_info(Path("datasets/em"))
        for number, shown in enumerate(indices_of("labels", made)):
            save_picture(f"images/{number}.png", np.where(shown == IGNORE, 0, shown).astype(np.uint8))
        net = UNet(1, 1 if info.num_class == 2 else info.num_class, 2, num_level=1)
        predictor = Perfect((Member(net, info),), 0.5, torch.device("cpu"))
        monkeypatch.setattr(checkpoint, "load_trained", lambda *_, **__: {Path("net.pth"): SimpleNamespace(info=info)})
        monkeypatch.setattr(predict, "predictor_of", lambda *_: predictor)
        return made

    return make


def indices_of(labels, flags):
    """Class indices of label images by the flags of a database."""
    pairs = list_pairs("images", labels)
    classes = _classes(pairs, flags)
    return [classes.indices(pair.label) for pair in pairs]


def segment(source, target, *flags):
    return main.main(["--mode", "predict", "--gpu_ids", "-1", "--input", source, "--output", target, *flags])


@pytest.mark.parametrize("name", DRESSES)
def test_labels_come_back_as_the_classes_of_the_database(loop, name):
    labels, flags, save, dtype = DRESSES[name]
    made = loop(labels, flags, save)
    assert segment("images", "out", "--what", "labels") == 0
    written = sorted(Path("out/labels").iterdir())
    assert [path.stem for path in written] == ["0", "1", "2"]
    assert {list_frames(str(path))[0].read().dtype.name for path in written} == {dtype}
    again = indices_of("out/labels", replace(made, ignore=""))  # every pixel is predicted
    for old, new in zip(indices_of("labels", made), again, strict=True):
        assert np.array_equal(new[old != IGNORE], old[old != IGNORE])
    values = {value for path in written for value in np.unique(list_frames(str(path))[0].read()).tolist()}
    assert not made.ignore or float(made.ignore) not in values


def test_labels_of_stacks_are_stacks_that_imagej_reads_next_to_pngs(loop, capsys):
    loop(*DRESSES["objects"][:3])
    shown = [np.asarray(Image.open(f"images/{number}.png")) for number in range(3)]
    tifffile.imwrite("images/stack.tif", np.stack(shown), imagej=True, metadata={"axes": "ZYX"})
    assert segment("images", "out", "--what", "labels,cells") == 0
    assert {path.name for path in Path("out/labels").iterdir()} == {"0.png", "1.png", "2.png", "stack.tif"}
    with tifffile.TiffFile("out/labels/stack.tif") as tif:
        assert (tif.is_imagej, tif.series[0].axes, tif.pages.first.dtype.name) == (True, "ZYX", "uint16")
        for number, page in enumerate(tif.asarray()):
            assert page.max() == 3
            assert np.array_equal(page, np.asarray(Image.open(f"out/labels/{number}.png")))
            assert np.array_equal(page, np.asarray(Image.open(f"out/stack-{number:04d}-cells.png")))
    *_, advice, command = capsys.readouterr().out.splitlines()
    assert advice.startswith("correct label images in out/labels, and save them")
    flags = "--gpu_ids -1 --add images --label out/labels --labelled_only on --replace on"
    assert command == f"next: python run_make_database.py {flags}".replace("--gpu_ids -1 ", "")


def test_labels_as_one_file_are_that_file(loop):
    loop(*DRESSES["objects"][:3])
    assert segment("images", "out.tif", "--what", "labels") == 0
    pages = tifffile.imread("out.tif")
    assert (pages.dtype.name, pages.shape, pages.max()) == ("uint16", (3, SIZE, SIZE), 3)


def test_labels_that_were_edited_are_not_replaced(loop, fails):
    loop(*DRESSES["0, 1, 2"][:3])
    tifffile.imwrite("images/stack.tif", np.zeros((2, SIZE, SIZE), np.uint8))
    for _ in range(2):
        assert segment("images", "out", "--what", "labels") == 0
    edited = np.ones((2, SIZE, SIZE), np.uint8)
    tifffile.imwrite("out/labels/stack.tif", edited)
    again = ["--mode", "predict", "--gpu_ids", "-1", "--input", "images", "--output", "out", "--what", "labels"]
    assert "out/labels/stack.tif: not a TIFF of predict, and not replaced: move it" in fails(main.main, again)
    assert np.array_equal(tifffile.imread("out/labels/stack.tif"), edited)


def test_labels_of_two_images_of_one_name_are_refused(loop, fails):
    loop(*DRESSES["0, 1, 2"][:3])
    tifffile.imwrite("images/0.tif", np.zeros((2, SIZE, SIZE), np.uint8))
    again = ["--mode", "predict", "--gpu_ids", "-1", "--input", "images", "--output", "out", "--what", "labels"]
    assert "the labels of two images would become out/labels/0: rename one" in fails(main.main, again)
    tifffile.imwrite("images/3.tif", np.zeros((2, SIZE, SIZE), np.uint8))
    with tifffile.TiffWriter("images/4.tif") as tif:
        for size in (16, 32):
            tif.write(np.zeros((size, size), np.uint8))
    Path("images/0.tif").unlink()
    assert "one file can't hold both, choose by --series" in fails(main.main, again)
    assert not [*Path("out").rglob("*.*")]
    assert "applies to objects, which these labels don't number" in fails(main.main, [*again, "--min_size", "5"], 2)


@pytest.mark.parametrize(("most", "dtype"), [(65535, "uint16"), (65536, "uint32")])
def test_number_tiff_writer_takes_16_bits_where_they_suffice(tmp_path, most, dtype):
    numbers = np.array([[[0, 1], [most, 2]]], np.uint32)
    writer = NumberTiffWriter(tmp_path / "out.tif", Layout((1, 1, 2, 2), numbers.dtype, labels=True), create=True)
    writer.write(0, 0, numbers)
    writer.finish()
    written = tifffile.imread(tmp_path / "out.tif")
    assert (written.dtype.name, written.tolist()) == (dtype, numbers[0].tolist())
