import numpy as np
import pytest
from scipy import ndimage

from sources.numbered import border_number, part_objects


def rods(width, num=8):
    """Image of objects of this width that touch, numbered from 1."""
    numbers = np.zeros((20, num * width + 8), np.uint16)
    numbers[3:17, 4:-4] = np.arange(1, num + 1).repeat(width)
    return numbers


@pytest.mark.parametrize("width", [2, 3, 4, 6])
def test_part_objects_loses_no_object_however_thin(width):
    foreground = part_objects(rods(width))
    assert ndimage.label(foreground)[1] == 8
    assert np.array_equal(np.unique(rods(width)[foreground]), np.arange(1, 9))


def test_part_objects_of_large_numbers_takes_little_time_and_memory():
    numbers = rods(6).astype(np.int64) * 10**12
    assert np.array_equal(part_objects(numbers), part_objects(rods(6)))


def test_border_number_is_that_of_the_background():
    inner = np.ones((9, 9), int)
    assert [border_number([np.pad(inner, 1, constant_values=ground)] * 3) for ground in (0, 7)] == [0, 7]
    assert border_number([np.arange(100).reshape(10, 10)]) is None  # cells without a gap
