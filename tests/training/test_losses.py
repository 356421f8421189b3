import time
import tracemalloc

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from training.losses import FAR, LOSSES, border_distance, cross_entropy, dice_loss, pixel_weight


def test_both_cross_entropies_agree_on_two_classes_with_and_without_weights():
    logits, label, weight = torch.randn(2, 1, 4, 4), torch.randint(0, 2, (2, 4, 4)), torch.rand(2, 4, 4)
    two = torch.cat([torch.zeros_like(logits), logits], 1)
    for w in (None, weight):
        torch.testing.assert_close(cross_entropy(logits, label, w), cross_entropy(two, label, w))


def test_a_weighted_cross_entropy_is_worked_out_by_hand():
    logits, label = torch.tensor([[[[0.0, 0.0]]]]), torch.tensor([[[0, 1]]])
    logits[..., 1] = np.log(3)  # -log(3 / 4) for class 1
    expected = (3 * np.log(2) + 1 * np.log(4 / 3)) / 2
    assert cross_entropy(logits, label, torch.tensor([[[3.0, 1.0]]])).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("nch", [1, 3])
def test_dice_loss_is_0_for_the_truth_and_near_1_for_its_opposite(nch):
    num_class = max(nch, 2)
    label = torch.randint(0, num_class, (2, 16, 16))
    sure = 100.0 * torch.stack([label == k for k in range(num_class)], 1).float()
    sure = sure if nch > 1 else sure[:, 1:] - sure[:, :1]
    assert dice_loss(sure, label) == pytest.approx(0, abs=1e-5)
    assert dice_loss(-sure, label) > (0.9 if nch == 1 else 0.5)
    half = dice_loss(torch.zeros(2, 1, 16, 16), torch.ones(2, 16, 16).long())  # class 1: 2 * 256 / (256 + 512)
    assert half.item() == pytest.approx(1 - (2 / 3 + 1 / 257) / 2, abs=2e-3)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("nch", [1, 4])
def test_every_loss_has_a_finite_gradient_that_points_to_the_truth(name, nch):
    label = torch.randint(0, max(nch, 2), (2, 8, 8))
    logits = torch.zeros(2, nch, 8, 8, requires_grad=True)
    LOSSES[name](logits, label, torch.rand(2, 8, 8) if name == "wbce" else None).backward()
    better = logits.detach() - 10 * logits.grad
    assert logits.grad.isfinite().all()
    assert LOSSES[name](better, label, None) < LOSSES[name](logits, label, None)


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
