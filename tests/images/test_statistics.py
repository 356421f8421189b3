import weakref

import numpy as np
import pytest

from images.statistics import ObjectSizes, image_statistics
from utils import UserError


def test_image_statistics_of_a_large_image_are_of_all_its_pixels():
    image = np.full((2100, 2100, 1), 140, np.uint8)
    image[::2] += 60  # a pattern that a part of the rows would miss
    assert image_statistics(image) == ([170.0], [30.0])


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e300])
def test_image_statistics_refuse_numbers_without_squares_and_do_not_warn(value):
    image = np.ones((9, 9, 1))
    image[4, 4] = value
    with pytest.raises(UserError, match="NaN, infinity or numbers beyond"):
        image_statistics(image)


def test_image_statistics_keep_no_more_of_a_large_image_than_their_rows():
    class Rows:
        shape, alive = (4096, 4096, 1), []

        def __getitem__(self, rows):
            block = np.zeros((rows.stop - rows.start, *self.shape[1:]), np.uint8)
            self.alive = [ref for ref in self.alive if ref() is not None]
            self.alive.append(weakref.ref(block))
            return block

    image = Rows()
    image_statistics(image)
    assert len(image.alive) <= 2


def sizes_of(*labels, num_class=2):
    sizes = ObjectSizes(num_class)
    for label in labels:
        sizes.add(np.array(label, np.uint8))
    return sizes


def squares(*sides, hole=False):
    """A label with a square of each side, none of which touches the border."""
    label = np.zeros((max(sides) + 2, sum(sides) + len(sides) + 1), np.uint8)
    left = 1
    for side in sides:
        label[1 : 1 + side, left : left + side] = 1
        label[1 + side // 2, left + side // 2] = not hole
        left += side + 1
    return label


def test_min_size_is_half_of_the_smallest_object_that_is_no_speck():
    assert sizes_of(squares(4, 5, 6)).min_size[1] == 16 // 2
    specks = np.zeros((40, 40), np.uint8)
    specks[2::4, 2:30:4] = 1  # 70 of one pixel
    assert sizes_of(specks).min_size[1] == 0
    large = [squares(*[60] * 20), squares(*[50] * 4)]
    assert sizes_of(specks, *large * 4).min_size[1] == 2500 // 2  # the specks are 0.02 % of the area
    assert sizes_of(np.zeros((9, 9)), np.ones((9, 9))).min_size == [0, 0]


def test_min_size_is_not_that_of_cut_objects():
    label = squares(9)
    label[4:6, 9:] = 1  # reaches the border
    assert sizes_of(label).min_size == [0, 0]
    label = np.pad(squares(9, 4), 1)
    label[3, 3] = 255  # not annotated
    assert sizes_of(label).min_size[1] == 8 and sizes_of(label).fill_holes[1]
    label[3, 3] = 1
    label[3, 1] = 255  # beside it
    assert sizes_of(label).min_size[1] == 8


def test_fill_holes_where_the_labels_have_next_to_none():
    full, ring = squares(*[5] * 100), squares(5, hole=True)
    assert sizes_of(full).fill_holes == [False, True]
    assert sizes_of(full, ring).fill_holes[1] and not sizes_of(full, ring, ring).fill_holes[1]
    nested = np.pad(squares(9), 1)
    nested[3:8, 3:8], nested[4:7, 4:7] = 0, 1  # a cell within a cell: its rim is not a hole of one of them
    assert sizes_of(nested).fill_holes[1]
    assert not sizes_of(np.zeros((9, 9))).fill_holes[1]  # no object says that there are no holes


def test_object_sizes_of_a_large_label_are_measured_in_tiles(monkeypatch):
    label = np.tile(squares(3, 4, 5), (9, 9))
    whole = sizes_of(label)
    monkeypatch.setattr("images.statistics.LABEL_TILE", 40)
    assert sizes_of(label).min_size == [0, 4] == whole.min_size and sizes_of(label).fill_holes == whole.fill_holes


def test_object_sizes_are_of_each_class():
    label = np.pad(squares(6, 3), 1)
    label[:, 9:][label[:, 9:] == 1] = 2
    assert sizes_of(label, num_class=3).min_size == [0, 18, 4]
