import time
import tracemalloc

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from dataset import IGNORE
from training.weight_map import FAR, border_distance, pixel_weight


def nearest_two(label):
    """d1 + d2 from all pairs of pixels."""
    objects = sum(ndimage.label(label == k)[0] + 1000 * k * (label == k) for k in range(1, label.max() + 1))
    everywhere = np.argwhere(np.ones_like(label))
    each = [cdist(everywhere, np.argwhere(objects == n)).min(1) for n in np.unique(objects[objects > 0])]
    return np.sort(each, 0)[:2].sum(0).reshape(label.shape)


@pytest.mark.parametrize("seed", range(6))
def test_border_distance_is_that_of_all_pairs_of_pixels(seed):
    rng = np.random.default_rng(seed)
    label = np.digitize(ndimage.gaussian_filter(rng.normal(size=(40, 50)), 3), [0.03, 0.06][: 1 + seed % 2])
    assert np.allclose(border_distance(label), nearest_two(label), atol=0.02)


def test_border_distance_of_a_large_label_takes_few_bytes_and_is_that_of_all_pairs_of_pixels():
    label = np.zeros((3000, 400), np.uint8)
    label[::60, :120:40] = label[5::90, 150::70] = 1
    label[500:900, 340:] = 2
    tracemalloc.start()
    distance = border_distance(label)
    assert tracemalloc.get_traced_memory()[1] < 60 * label.size  # of which 48 are of a band of a third
    tracemalloc.stop()
    pixels = np.argwhere(label[740:960] > 0) + np.array([740, 0])
    numbers = ndimage.label(label > 0)[0][tuple(pixels.T)]
    for y, x in ((873, 250), (874, 250), (785, 60), (873, 20), (900, 100), (898, 338)):
        away = np.hypot(*(pixels - [y, x]).T)
        nearest = sorted(away[numbers == n].min() for n in np.unique(numbers))
        assert distance[y, x] == pytest.approx(min(sum(nearest[:2]), FAR), abs=0.02)


def test_border_distance_beyond_its_reach_and_without_a_second_object_is_far():
    label = np.zeros((20, 200), int)
    assert (border_distance(label) == FAR).all()
    label[5:9, 5:9] = 1
    assert (border_distance(label) == FAR).all()
    label[5:9, 190:] = 1
    distance = border_distance(label)
    assert distance[6, 100] == FAR and distance.max() <= FAR


def test_pixels_that_are_not_annotated_are_neither_object_nor_background():
    label = np.zeros((20, 60), np.uint8)
    label[5:9, 5:9] = label[5:9, 12:16] = 1
    partial = label.copy()
    partial[:, 30:] = IGNORE
    distance = border_distance(partial)
    assert np.array_equal(distance, border_distance(label))  # an object there would be near the second one
    assert np.isfinite(distance).all()


def test_a_slice_with_300_cells_takes_less_than_a_second():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 512, (300, 2))
    owner = cKDTree(points).query(np.argwhere(np.ones((512, 512))))[1].reshape(512, 512)
    border = ndimage.maximum_filter(owner, 3) != ndimage.minimum_filter(owner, 3)
    start = time.perf_counter()
    distance = border_distance((~border).astype(np.uint8))
    assert time.perf_counter() - start < 1.0  # 0.3 s when written
    assert distance[border].min() >= 2 and distance[border].max() < 10


def test_pixel_weight_follows_the_papers_equation():
    label, distance = torch.tensor([[[0, 1, 2]]]), torch.tensor([[[4.0, 4.0, 4.0]]])
    weight = pixel_weight(label, distance, [0.5, 0.3, 0.2], w0=10.0, sigma=5.0)[0, 0]
    expected = [1 / 1.5 + 10 * np.exp(-16 / 50), 1 / 0.9, 1 / 0.6]
    assert weight.tolist() == pytest.approx(expected, rel=1e-5)
    plain = pixel_weight(label, distance, None, w0=10.0, sigma=5.0)[0, 0]
    assert plain.tolist() == pytest.approx([1 + 10 * np.exp(-16 / 50), 1, 1], rel=1e-5)
