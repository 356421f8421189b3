import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch

from dataset import PatchDataset
from description import DataInfo
from distributed import World
from model import UNet
from samples import IGNORE, list_samples, write_sample
from train import train_step
from training.augment import Augmentation
from training.loader import TrainingBatches
from training.losses import LOSSES
from training.sampler import BatchSettings
from training.weight_map import pixel_weight

CPU = torch.device("cpu")
INFO = DataInfo(1, [0, 255], ["a", "b"], [0.5, 0.5], [100.0], [50.0], [0.0, 255.0], ignore=128)


def write_partial(folder, annotated, shape=(64, 64)):
    """A database of one sample whose label is annotated at these indices alone."""
    rng = np.random.default_rng(0)
    label = np.full(shape, IGNORE, np.uint8)
    label[annotated] = rng.integers(0, 2, label[annotated].shape)
    (folder / "train").mkdir(parents=True)
    write_sample(folder / "train" / "0.npy", rng.integers(0, 200, (*shape, 1), np.uint8), label)
    (folder / "dataset.json").write_text(json.dumps(asdict(INFO)))
    return list_samples(folder / "train")


def batches_of(files, augment, info=INFO, weigh=None, world=None, num_crop=0):
    """Batches of four."""
    data = PatchDataset(files, info, labelled=True, memory=CPU, distances=weigh is not None, margin=augment.margin)
    settings = BatchSettings(augment.crop, batch_size=4, seed=0, num_crop=num_crop)
    return TrainingBatches(data, augment, settings, CPU, world=world, weigh=weigh)


@dataclass(frozen=True)
class SimulatedWorld(World):
    """One of several processes that run one after the other."""

    add: Callable = None

    def sum(self, values):
        return self.add(values)


@pytest.mark.parametrize("place", [(0, 0), (63, 30), (31, 31), (5, 60)])
@pytest.mark.parametrize("elastic", [0.0, 10.0])
def test_batches_have_the_one_annotated_pixel_of_an_image_in_every_crop(tmp_path, place, elastic):
    augment = Augmentation((32, 32), 2, is_partial=True, flip=True, turn=True, elastic=elastic)
    batches = batches_of(write_partial(tmp_path, place), augment)
    for epoch in range(1, 31):
        for batch in batches.of(epoch):
            valid = batch["weight"] > 0
            assert valid.any(dim=(1, 2)).all()
            assert batch["weight"].mean() == pytest.approx(1)


def test_weighted_annotated_pixels_are_alike_and_their_mean_is_1(tmp_path):
    augment = Augmentation((48, 48), 2, is_partial=True, turn=True)
    batch = next(batches_of(write_partial(tmp_path, np.s_[10:40, 20:30]), augment).of(1))
    valid = batch["weight"] > 0
    assert 0 < valid.float().mean() <= 300 / 48**2
    torch.testing.assert_close(batch["weight"], valid / valid.float().mean())
    assert set(batch["label"].unique().tolist()) <= {0, 1} and (batch["label"][~valid] == 0).all()


def test_weighted_annotated_pixels_have_the_weight_map(tmp_path):
    files = write_partial(tmp_path, np.s_[10:40, 20:30])
    np.save(files[0].distance, np.arange(64.0).repeat(64).reshape(64, 64).astype(np.float16))
    weigh = partial(pixel_weight, class_share=None, w0=5.0, sigma=9.0)
    augment = Augmentation((48, 48), 2, is_partial=True, flip=True)
    batch = next(batches_of(files, augment, weigh=weigh).of(1))
    valid = batch["weight"] > 0
    expected = pixel_weight(batch["label"], batch["distance"], None, 5.0, 9.0) / valid.float().mean()
    torch.testing.assert_close(batch["weight"][valid], expected[valid])
    assert batch["weight"][valid].std() > 0.1


def test_batches_of_whole_labels_have_no_weight(tmp_path):
    info = replace(INFO, ignore=None)
    batch = next(batches_of(write_partial(tmp_path, np.s_[:, :]), Augmentation((48, 48), 2), info).of(1))
    assert "weight" not in batch and set(batch["label"].unique().tolist()) == {0, 1}


def test_loss_scale_makes_the_mean_over_processes_that_of_the_whole_batch(tmp_path):
    files = write_partial(tmp_path, (np.r_[0:5, 40:64], slice(3, 40)), (64, 80))
    augment = Augmentation((32, 32), 2, is_partial=True, turn=True, elastic=2.0)
    more = {"num_crop": 5}  # batches of four and one: the second and third process have none of the last one
    logits = {}

    def loss_of(batch):
        """Loss with logits that depend on the crop alone."""
        for image in batch["input"]:
            logits[image.sum().item()] = image[None] * 2
        given = torch.cat([logits[image.sum().item()] for image in batch["input"]])
        return LOSSES["bce"](given, batch["label"], batch["weight"]) * batch.get("loss_scale", 1)

    whole = [loss_of(batch).item() for batch in batches_of(files, augment, **more).of(1)]
    # first each process's number of annotated pixels, then, with the sums of these, its losses
    numbers = [[], [], []]
    for rank, own in enumerate(numbers):
        world = SimulatedWorld(rank, 3, add=lambda n, own=own: own.append(n) or n)
        list(batches_of(files, augment, world=world, **more).of(1))
    losses = []
    for rank in range(3):
        sums = iter([sum(step) for step in zip(*numbers, strict=True)])
        world = SimulatedWorld(rank, 3, add=lambda _, sums=sums: next(sums))
        losses.append([loss_of(batch).item() for batch in batches_of(files, augment, world=world, **more).of(1)])
    assert np.mean(losses, axis=0).tolist() == pytest.approx(whole, rel=1e-5)


def test_batches_augment_each_crop_of_a_sample_by_other_random_numbers(tmp_path):
    augment = Augmentation((64, 64), 2, brightness=1.0)  # as large as the image
    info = replace(INFO, ignore=None)
    files = write_partial(tmp_path, np.s_[:, :])
    first = {}
    for batch in batches_of(files, augment, info, num_crop=6).of(3):
        for crop, image in zip(batch["crop"].tolist(), batch["input"], strict=True):
            first[crop] = image.mean().item()
    assert sorted(first) == list(range(6)) and len({round(value, 5) for value in first.values()}) == 6
    (alone,) = batches_of(files, augment, info, num_crop=1).of(3)
    assert alone["input"].mean().item() == first[0]


@pytest.mark.parametrize("name", LOSSES)
def test_train_step_does_not_depend_on_the_class_of_ignored_pixels(tmp_path, name):
    augment = Augmentation((48, 48), 2, is_partial=True, flip=True, turn=True, elastic=3.0)
    trained = []
    for change in (False, True):
        torch.manual_seed(0)
        net = UNet(1, 1, 2)
        batches = list(batches_of(write_partial(tmp_path / str(change), np.s_[10:40, 20:30]), augment).of(1))
        for batch in batches if change else []:
            batch["label"][batch["weight"] == 0] = 1
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for batch in batches:
            train_step(net, batch, optimizer, criterion=LOSSES[name])
        trained.append(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in trained), strict=True))
