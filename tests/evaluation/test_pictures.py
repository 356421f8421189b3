import numpy as np
import pytest
from PIL import Image

from evaluation.pictures import (
    COLOURS_OF_SEVERAL,
    classes_of,
    error_picture,
    label_picture,
    probability_picture,
    save_images,
)
from images.drawing import input_picture, palette


@pytest.mark.parametrize("constant", [0, 1])
def test_label_picture_of_a_constant_mask_shows_that_constant(tmp_path, constant):
    mask = np.full((4, 5), constant, np.uint8)
    save_images(tmp_path / "images", 3, {"label": label_picture(mask, 2), "output": probability_picture(mask * 1.0)})
    for kind in ("label", "output"):
        picture = np.asarray(Image.open(tmp_path / "images" / f"0003-{kind}.png"))
        assert (picture == 255 * constant).all() and picture.shape == (4, 5)


def test_probability_picture_is_the_probability_in_8_bits():
    assert probability_picture(np.array([[0.0, 0.2, 0.5, 1.0]])).tolist() == [[0, 51, 128, 255]]


def test_input_picture_does_not_stretch_grey_values():
    pixels = np.arange(60, 120, dtype=np.uint8).reshape(6, 10, 1)
    assert np.array_equal(input_picture(pixels, [0.0, 255.0]), pixels[..., 0])
    assert input_picture(np.array([[[100.0], [4095.0]]]), [0.0, 4095.0]).tolist() == [[6, 255]]
    assert input_picture(pixels.repeat(3, -1), [0.0, 255.0]).shape == (6, 10, 3)
    assert input_picture(pixels.repeat(2, -1), [0.0, 255.0]).shape == (6, 10)


def test_palette_has_fixed_colours_that_all_differ():
    colours = palette(32)
    assert len({tuple(colour) for colour in colours.tolist()}) == 32
    assert np.array_equal(palette(5), colours[:5])
    label = np.array([[0, 1, 4]])
    assert np.array_equal(label_picture(label, 5), colours[label])


@pytest.mark.parametrize("num_class", [2, 5, 32])
def test_label_picture_is_grey_without_annotation(num_class):
    label = np.array([[0, 1, 255], [255, num_class - 1, 0]], np.uint8)
    picture = label_picture(label, num_class, label != 255)
    assert (picture[label == 255] == 128).all()
    usual = label_picture(np.where(label == 255, 0, label), num_class)
    assert picture.shape == usual.shape and np.array_equal(picture[label != 255], usual[label != 255])
    assert [128] * 3 not in palette(num_class).tolist()


@pytest.mark.parametrize("num_class", [2, 5, 32])
def test_classes_of_a_picture_are_those_of_its_label(num_class):
    label = np.array([[0, 1, 255], [255, num_class - 1, 0]], np.uint8)
    classes, valid = classes_of(label_picture(label, num_class, label != 255))
    assert np.array_equal(valid, label != 255) and np.array_equal(classes[valid], label[valid])


def test_error_picture_shows_missed_added_and_confused_annotated_pixels():
    label, output = np.array([[1, 0, 1, 2, 2]]), np.array([[1, 2, 0, 1, 0]])
    valid = np.array([[True, True, True, True, False]])
    picture = error_picture(np.full((1, 5), 90, np.uint8), label, output, 0, valid, COLOURS_OF_SEVERAL)[0]
    missed, added, confused = map(list, COLOURS_OF_SEVERAL.values())
    assert picture[:4].tolist() == [[30] * 3, added, missed, confused]
    assert picture[4].tolist() == [118] * 3  # half grey
    other = error_picture(np.full((1, 5, 3), 90, np.uint8), label, output, 1, None, COLOURS_OF_SEVERAL)[0]
    assert other[1].tolist() == confused and other[3].tolist() == missed
