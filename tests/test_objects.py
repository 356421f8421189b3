import numpy as np
import pytest

from objects import separate_objects


def test_touching_discs_are_two_objects_and_the_rest_is_background():
    y, x = np.mgrid[:40, :80]
    distance = np.minimum(np.hypot(y - 20, x - 28), np.hypot(y - 20, x - 52))
    probability = np.clip(1.2 - distance / 18, 0, 1)  # 0.53 in the middle between them
    objects = separate_objects(probability, 0.5)
    assert objects.dtype == np.uint32 and set(np.unique(objects)) == {0, 1, 2}
    assert objects[20, 28] != objects[20, 52] and np.array_equal(objects > 0, probability > 0.5)
    assert separate_objects(probability, 0.9).max() == 2


@pytest.mark.parametrize(("value", "num"), [(0.0, 0), (0.6, 1), (1.0, 1)])
def test_constant_images(value, num):
    objects = separate_objects(np.full((20, 30), value, np.float32), 0.5)
    assert objects.max() == num and objects.shape == (20, 30)


def test_a_faint_region_without_a_core_is_an_object():
    probability = np.zeros((20, 40))
    probability[5:15, 5:15], probability[5:15, 20:30] = 0.95, 0.6
    assert len(np.unique(separate_objects(probability, 0.5))) == 3
