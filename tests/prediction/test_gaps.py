import numpy as np
import pytest

from prediction.gaps import grow_bands, grown
from sources.numbered import part_objects

SQUARES = (np.arange(120)[:, None] // 20 * 6 + np.arange(120) // 20 + 1).astype(np.uint32)  # 20 x 20 px, without a gap


def test_grown_objects_have_the_areas_of_the_labels():
    parted = np.where(part_objects(SQUARES), SQUARES, 0)
    assert np.bincount(parted.ravel())[8] == 18 * 18
    assert np.array_equal(grown(parted), SQUARES)


def test_grown_objects_far_from_others_stay_as_they_are():
    objects = np.zeros((20, 30), np.uint32)
    objects[4:8, 4:8], objects[4:8, 11:15] = 1, 2  # three pixels between them
    assert np.array_equal(grown(objects), objects)
    objects[4:8, 10] = 2  # two
    assert np.bincount(grown(objects).ravel()).tolist() == [600 - 48, 16 + 6, 20 + 6]  # with the corners of the gap


@pytest.mark.parametrize("tile_height", [1, 3, 50, 200])
def test_grow_bands_are_those_of_the_whole_image(tile_height):
    numbers = np.random.default_rng(0).integers(0, 4, (12, 12)).repeat(9, 0).repeat(9, 1).astype(np.uint32)
    objects = np.where(part_objects(numbers), numbers, 0)
    bands = [band.values for band in grow_bands(objects, tile_height)]
    assert np.array_equal(np.concatenate(bands), grown(objects))
