import numpy as np
import pytest
import torch

from samples import IGNORE
from training.augment import Augmentation


def augmented(image, label, seed=0, **kwargs):
    margin = int(np.ceil(3 * kwargs.get("elastic", 0)))
    augment = Augmentation((image.shape[2] - 2 * margin,) * 2, 2, **kwargs)
    return of(augment({"input": image, "label": label}, generators(len(image), seed)))


def generators(num, seed=0):
    return [np.random.default_rng((seed, i)) for i in range(num)]


def of(batch):
    return batch["input"], batch["label"]


def test_augmentation_switched_off_changes_nothing():
    image, label = torch.randn(2, 1, 16, 16), torch.randint(0, 2, (2, 16, 16))
    out, out_label = augmented(image, label)
    torch.testing.assert_close(out, image, atol=1e-4, rtol=0)
    assert out_label.equal(label)


def test_augmentation_flips_and_turns_to_the_eight_of_the_square_exactly():
    image = torch.rand(1, 1, 8, 8)
    label = (image[:, 0] > 0.5).long()
    eight = [torch.rot90(m, k, (-2, -1)) for m in (image, image.flip(-1)) for k in range(4)]
    found = set()
    for seed in range(60):
        out, out_label = augmented(image, label, seed, flip=True, turn=True)
        matches = [i for i, one in enumerate(eight) if torch.allclose(one, out, atol=1e-4)]
        assert len(matches) == 1
        assert out_label.equal((eight[matches[0]][:, 0] > 0.5).long())
        found.update(matches)
    assert len(found) == 8
    seen = {augmented(image, label, seed, flip=True)[0].sum(2).argmax().item() for seed in range(40)}
    assert len(seen) == 2  # without turns, columns stay columns


@pytest.mark.parametrize("seed", range(5))
def test_augmentation_leaves_a_grid_and_its_label_aligned_to_a_pixel(seed):
    size, margin = 64, 30
    y, x = torch.meshgrid(*(2 * (torch.arange(float(size + 2 * margin)),)), indexing="ij")
    label = ((y // 8 + x // 8) % 2).long()
    image = torch.stack([y, x])[None]
    augment = Augmentation((size, size), 2, flip=True, turn=True, elastic=10.0)
    batch = {"input": image, "label": label[None], "distance": (x / 2)[None]}
    batch = augment(batch, generators(1, seed))
    out, out_label = of(batch)
    torch.testing.assert_close(batch["distance"], out[:, 1] / 2, atol=0.03, rtol=0)  # the same grid
    where = out[0].round().long()  # the channels say where each pixel was read
    nearby = [
        label[(where[0] + dy).clamp(0, len(y) - 1), (where[1] + dx).clamp(0, len(y) - 1)]
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    ]
    assert torch.stack([n == out_label[0] for n in nearby]).any(0).all()
    assert (nearby[4] == out_label[0]).float().mean() > 0.9
    assert where.min() >= 0 and where.max() < len(y)


@pytest.mark.parametrize("fraction", [1, 0.5])
def test_elastic_displacement_has_its_deviation_bound_and_fraction(fraction):
    y = torch.arange(93.0)  # 30 px around the crop
    places = torch.stack(torch.meshgrid(y, y, indexing="ij")).expand(400, -1, -1, -1)
    augment = Augmentation((33, 33), 2, elastic=10.0, elastic_share=fraction)
    out = augment({"input": places, "label": torch.zeros(400, 93, 93)}, generators(400))["input"]
    field = out - places[:, :, 30:63, 30:63]
    moved = field.abs().amax((1, 2, 3)) > 1e-3
    assert moved.float().mean() == (1 if fraction == 1 else pytest.approx(fraction, abs=0.1))
    field = field[moved]
    assert field[..., ::16, ::16].std().item() == pytest.approx(10, rel=0.05)  # at the nodes of the 3x3 grid
    assert field.abs().max() <= augment.margin + 1e-3 and augment.margin == 30


def test_brightness_and_contrast_stay_within_their_limits():
    image, label = torch.ones(200, 1, 4, 4), torch.zeros(200, 4, 4)
    out = augmented(image, label, brightness=0.3)[0] - 1
    assert 0.25 < out.abs().max() <= 0.3 and out.std((1, 2, 3)).max() < 1e-6
    gain = augmented(image, label, contrast=0.1)[0]
    assert 0.9 <= gain.min() < 0.92 and 1.08 < gain.max() <= 1.1


def test_gamma_preserves_the_ends_of_each_image_and_the_order_of_its_values():
    image = torch.rand(50, 1, 6, 6, generator=torch.Generator().manual_seed(0)).sort(-1).values * 3 - 1
    out = augmented(image, torch.zeros(50, 6, 6), gamma=0.5)[0]
    assert (out.diff(dim=-1) >= -1e-6).all()
    for end in (torch.amin, torch.amax):
        torch.testing.assert_close(end(out, (1, 2, 3)), end(image, (1, 2, 3)), atol=1e-4, rtol=1e-4)
    bent = (out - image).flatten(1).abs().amax(1)
    assert bent.max() > 0.2 and (out > image + 1e-3).any() and (out < image - 1e-3).any()


def test_noise_has_at_most_its_deviation():
    image = torch.zeros(100, 1, 32, 32)
    out = augmented(image, torch.zeros(100, 32, 32), noise=0.3)[0]
    deviations = out.std((1, 2, 3))
    assert 0.27 < deviations.max() < 0.32 and deviations.min() < 0.02


def test_blur_is_a_gaussian_of_at_most_its_deviation_and_keeps_the_mean():
    image = torch.zeros(60, 2, 41, 41)
    image[:, :, 20, 20] = 1
    out = augmented(image, torch.zeros(60, 41, 41), blur=2.0)[0]
    torch.testing.assert_close(out.sum((2, 3)), torch.ones(60, 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(out[:, 0], out[:, 1])
    x = torch.arange(41.0) - 20
    sigma = (out[:, 0].sum(1) * x**2).sum(1).sqrt()
    assert 1.8 < sigma.max() < 2.02 and sigma.min() < 0.2


def test_augmentation_is_a_function_of_its_generator():
    image, label = torch.randn(2, 1, 32, 32), torch.randint(0, 2, (2, 32, 32))
    grey = {"gamma": 0.2, "blur": 1.0, "noise": 0.2}
    first, again, other = (augmented(image, label, seed, flip=True, elastic=2.0, **grey)[0] for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


def test_augmentation_of_a_sample_is_the_same_in_any_batch():
    image, label = torch.randn(3, 1, 44, 44), torch.randint(0, 2, (3, 44, 44))
    grey = {"brightness": 0.2, "contrast": 0.2, "gamma": 0.2, "blur": 1.0, "noise": 0.2}
    augment = Augmentation((32, 32), 2, flip=True, turn=True, elastic=2.0, **grey)
    whole = augment({"input": image, "label": label}, generators(3))
    alone = augment({"input": image[2:], "label": label[2:]}, generators(3)[2:])
    torch.testing.assert_close(whole["input"][2:], alone["input"])
    assert whole["label"][2:].equal(alone["label"])


def test_turn_of_a_crop_that_is_not_square_is_by_halves():
    augment = Augmentation((8, 16), 2, turn=True)
    image = torch.rand(20, 1, 8, 16)
    out, _ = of(augment({"input": image, "label": torch.zeros(20, 8, 16)}, generators(20)))
    same = torch.isclose(out, image, atol=1e-4).flatten(1).all(1)
    turned = torch.isclose(out, image.flip(2, 3), atol=1e-4).flatten(1).all(1)
    assert (same ^ turned).all() and same.any() and turned.any()


@pytest.mark.parametrize("num_class", [2, 4])
def test_augmentation_moves_ignored_pixels_with_the_image(num_class):
    size, margin = 64, 30
    y, x = torch.meshgrid(*(2 * (torch.arange(float(size + 2 * margin)),)), indexing="ij")
    label = ((y // 8 + x // 8) % num_class).long()
    label[:, :62] = IGNORE
    augment = Augmentation((size, size), num_class, is_partial=True, flip=True, turn=True, elastic=10.0)
    batch = {"input": torch.stack([y, x]).expand(8, -1, -1, -1), "label": label.expand(8, -1, -1)}
    out, out_label = of(augment(batch, generators(8)))
    read_at = out[:, 1]
    assert (out_label[read_at < 61] == IGNORE).all() and (out_label == IGNORE).any()
    assert set(out_label[read_at > 62].unique().tolist()) <= {*range(num_class), IGNORE}
    assert (out_label[read_at > 62] != IGNORE).float().mean() > 0.99  # but where several classes meet
    nearest = out.round().long().clamp(0, len(y) - 1)
    far = read_at > 62
    assert (label[nearest[:, 0], nearest[:, 1]] == out_label)[far].float().mean() > 0.8


def test_augmentation_of_a_complete_partial_label_is_that_of_a_whole_one():
    image, label = torch.randn(4, 1, 44, 44), torch.randint(0, 2, (4, 11, 11)).repeat_interleave(4, 1)
    batch = {"input": image, "label": label.repeat_interleave(4, 2)}
    more = {"flip": True, "turn": True, "elastic": 2.0, "brightness": 0.2}
    whole, partial = (Augmentation((32, 32), 2, part, **more)(batch, generators(4)) for part in (False, True))
    assert whole["input"].equal(partial["input"])
    assert (whole["label"] == partial["label"]).float().mean() > 0.999


def test_augmentation_does_not_displace_the_last_annotated_pixel_out():
    label = torch.full((60, 93, 93), IGNORE)
    label[:, 46, 46] = 1  # alone: between two of its neighbours it has no majority
    image = torch.randn(60, 1, 93, 93)
    augment = Augmentation((33, 33), 2, is_partial=True, elastic=10.0)
    out, out_label = of(augment({"input": image, "label": label}, generators(60)))
    straight = torch.isclose(out, image[:, :, 30:63, 30:63], atol=1e-3).flatten(1).all(1)
    assert (out_label == 1).any(dim=(1, 2)).all()
    assert straight.any() and not straight.all() and (out_label[straight, 16, 16] == 1).all()


@pytest.mark.parametrize(("flags", "sizes", "angles"), [({"zoom": 2.0}, (0.5, 2), 0), ({"rotate": 30.0}, (1, 1), 30)])
def test_zoom_and_rotation_are_of_any_size_and_angle_within_their_limits(flags, sizes, angles):
    """The channels say where each pixel was read, so that two of them tell the map."""
    augment, found = Augmentation((32, 32), 2, **flags), []
    y, x = torch.meshgrid(*(torch.arange(32.0 + 2 * augment.margin),) * 2, indexing="ij")
    label = (x > x.mean()).long()
    for seed in range(40):
        out, out_label = of(augment({"input": torch.stack([y, x])[None], "label": label[None]}, generators(1, seed)))
        down, right = ((out[0, :, 26, 16] - out[0, :, 6, 16]) / 20, (out[0, :, 16, 26] - out[0, :, 16, 6]) / 20)
        assert abs(float(down @ right)) < 0.03 and float(down.norm()) == pytest.approx(float(right.norm()), abs=0.03)
        found.append((float(right.norm()), np.degrees(np.arctan2(float(right[0]), float(right[1])))))
        inside = (out[0, 1] - x.mean()).abs() > 1
        assert out_label[0][inside].equal((out[0, 1] > x.mean()).long()[inside])
    size, angle = np.transpose(found)
    assert sizes[0] - 0.03 <= size.min() and size.max() <= sizes[1] + 0.03
    assert np.abs(angle).max() <= angles + 1
    assert size.max() / size.min() > 0.8 * sizes[1] / sizes[0] and np.ptp(angle) >= 1.5 * angles


def test_zoom_does_not_lose_the_only_annotated_pixel():
    augment = Augmentation((32, 32), 2, is_partial=True, zoom=1.5)
    assert augment.margin == 8
    inner = torch.full((1, 48, 48), IGNORE)
    inner[0, 10, 10] = 1
    kept = [of(augment({"input": torch.rand(1, 1, 48, 48), "label": inner}, generators(1, s)))[1] for s in range(20)]
    assert all((out == 1).any() for out in kept)
