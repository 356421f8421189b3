import numpy as np
import pytest
from scipy import ndimage

from objects import separate_bands, separate_objects


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


def smooth(shape, scale):
    field = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), scale)
    return (0.5 + field / field.std() / 4).clip(0, 1).astype(np.float32)


@pytest.mark.parametrize("windows", [(128, 128, 128), (100, 1000, 64), (37, 64, 90), (700, 64, 64)])
def test_bands_have_the_objects_of_the_whole_image(windows):
    probability = smooth((300, 420), 8)
    whole = separate_objects(probability, 0.4)
    bands = list(separate_bands(probability, 0.4, *windows))
    assert [top for top, _ in bands] == list(range(0, 300, windows[0]))
    objects = np.concatenate([band for _, band in bands])
    assert objects.max() == whole.max() > 10 and np.array_equal(objects > 0, whole > 0)
    assert (objects != whole).mean() < 1e-3  # where two floods meet on one height, the order decides


def test_an_object_longer_than_its_halo_has_one_number_everywhere():
    probability = np.zeros((90, 60), np.float32)
    probability[5:85, 5:10], probability[5:10, 5:55], probability[5:85, 50:55] = 0.6, 0.6, 0.6  # a bow without a core,
    probability[2:22, 25:40] = 0.9  # but for one at its middle
    probability[60:80, 20:35] = 0.6  # an object without one
    for windows in ((512, 512, 64), (16, 16, 4), (7, 60, 3)):
        objects = np.concatenate([band for _, band in separate_bands(probability, 0.5, *windows)])
        assert np.array_equal(np.unique(objects), [0, 1, 2]) and np.array_equal(objects > 0, probability > 0.5)
        assert (objects[60:80, 20:35] == 2).all() and (objects == 2).sum() == 300
