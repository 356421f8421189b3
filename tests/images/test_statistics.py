import weakref

import numpy as np
import pytest

from images.statistics import image_statistics
from utils import UserError


def test_statistics_of_a_large_image_are_of_all_its_pixels():
    image = np.full((2100, 2100, 1), 140, np.uint8)
    image[::2] += 60  # a pattern that a part of the rows would miss
    assert image_statistics(image) == ([170.0], [30.0])


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e300])
def test_numbers_that_nothing_can_be_computed_with_are_refused_without_a_warning(value):
    image = np.ones((9, 9, 1))
    image[4, 4] = value
    with pytest.raises(UserError, match="NaN, infinity or numbers beyond"):
        image_statistics(image)


def test_statistics_of_a_large_image_keep_no_more_of_it_than_their_pixels():
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
