import copy
import shutil
from itertools import chain

import numpy as np
import pytest
import torch
from conftest import SMALL, checkpoint_of, finish, same, write_stacks

import main as main_module
import run_make_database
from dataset import PatchDataset
from description import DataInfo, load_info
from distributed import World
from model import UNet, init_weights
from samples import IGNORE, list_samples, list_unlabelled, write_sample
from train import train_step
from training.augment import Augmentation
from training.consistency import consistency, ramped
from training.loader import TrainingBatches
from training.sampler import BatchSettings, PatchSampler

CPU = torch.device("cpu")
TRAIN = ["--mode", "train", *SMALL, "--num_epoch", "2"]
TAUGHT = [*TRAIN, "--consistency", "10"]


@pytest.fixture
def with_unlabelled(work):
    """A database of five labelled sections and four others."""
    stacks = write_stacks(work / "in", 5)
    np.save(work / "others.npy", np.random.default_rng(5).integers(0, 255, (4, 32, 32), dtype=np.uint8))
    source = ["--input", str(stacks / "train-volume.tif"), "--label", str(stacks / "train-labels.tif")]
    run_make_database.main([*source, "--unlabelled", str(work / "others.npy")])
    return work / "datasets" / "em"


def nets():
    made = [UNet(1, 1, nch_ker=2, num_level=2) for _ in range(2)]
    for seed, net in enumerate(made):
        init_weights(net, "kaiming", seed)
    return made[0], made[1].eval().requires_grad_(False)


def test_consistency_is_the_weighted_squared_difference_of_probabilities_by_the_batch():
    _, teacher = nets()
    batch = {"unchanged": torch.randn(2, 1, 8, 8)}
    with torch.no_grad():
        probability = teacher.train()(batch["unchanged"]).sigmoid()
    before = copy.deepcopy(teacher.eval().state_dict())
    agreeing = probability.logit()
    assert float(consistency(agreeing, batch, teacher=teacher, weight=10)) < 1e-9
    certain = torch.full_like(probability, 50)
    expected = 3 * (1 - probability).square().mean()
    torch.testing.assert_close(consistency(certain, batch, teacher=teacher, weight=3), expected)
    assert same(teacher.state_dict(), before) and not any(module.training for module in teacher.modules())
    assert all(module.track_running_stats for module in teacher.modules() if isinstance(module, torch.nn.BatchNorm2d))


def test_weight_rises_to_its_end():
    weights = [ramped(10, fraction / 100) for fraction in range(101)]
    assert weights == sorted(weights) and weights[0] < 0.1 and weights[30:] == [10] * 71


def test_step_without_annotation_moves_the_network_towards_the_teacher():
    student, teacher = nets()
    image = torch.randn(2, 1, 16, 16)
    batch = {"input": image, "unchanged": image, "label": torch.zeros(2, 16, 16, dtype=torch.int64)}
    batch["weight"] = torch.zeros(2, 16, 16)
    optimizer = torch.optim.SGD(student.parameters(), 0.05)
    before = [value.clone() for value in teacher.state_dict().values()]
    losses = []

    def also(logits, batch):
        losses.append(consistency(logits, batch, teacher=teacher, weight=10))
        return losses[-1]

    for _ in range(20):
        assert train_step(student, batch, optimizer, also=also) == 0  # the loss of what is annotated
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.state_dict().values(), strict=True))


@pytest.mark.parametrize("memory", [CPU, None])
def test_unlabelled_sample_is_not_annotated_anywhere(tmp_path, memory):
    info = DataInfo(1, [0, 255], ["a", "b"], [0.5, 0.5], [0.0], [1.0], [0.0, 255.0])
    write_sample(tmp_path / "0.npy", np.zeros((20, 20, 1), np.uint8), np.ones((20, 20), np.uint8))
    write_sample(tmp_path / "1.npy", np.full((20, 30, 1), 7, np.uint8), None)
    labelled, unlabelled = ([file] for file in list_samples(tmp_path))
    data = PatchDataset(labelled, info, labelled=True, memory=memory, margin=4, unlabelled=unlabelled)
    assert len(data) == 2 and data.shapes == [(20, 20), (20, 30)]
    assert (data[0]["label"] == 1).all() and (data[1]["label"] == IGNORE).all() and (data[1]["input"] == 7).all()


@pytest.mark.parametrize("num_crop", [0, 7, 1])
def test_every_other_crop_is_of_an_unlabelled_sample(num_crop):
    settings = BatchSettings((16, 16), 4, 0, num_crop)
    sampler = PatchSampler([(32, 32)] * 5, 2, settings, num_unlabelled=2)
    seen = set()
    for epoch in range(1, 9):
        batches = sampler.batches(epoch)
        for batch in batches:
            assert [window.index >= 3 for window in batch] == [False, True, False, True][: len(batch)]
            seen |= {window.index for window in batch}
        assert sum(map(len, batches)) == (num_crop or 24)
    assert seen == {*range(5)} if num_crop != 1 else {*range(3)}
    assert sampler.batches(3) == PatchSampler([(32, 32)] * 5, 2, settings, num_unlabelled=2).batches(3)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_process_sees_labelled_and_unlabelled_crops(size):
    """Batch normalisation on a CPU has the statistics of its own process alone."""
    settings, shapes = BatchSettings((16, 16), 2 * size, 0), [(32, 32)] * 5
    shares = [list(PatchSampler(shapes, 2, settings, None, World(rank, size), 2)) for rank in range(size)]
    for parts in zip(*shares, strict=True):
        assert all({window.index >= 3 for window in part} == {False, True} for part in parts)
    whole = PatchSampler(shapes, 2, settings, num_unlabelled=2).batches(1)
    assert [[*chain(*parts)] for parts in zip(*shares, strict=True)] == whole


def test_batches_keep_the_input_for_the_teacher_before_intensities_change(with_unlabelled):
    info, files = load_info(with_unlabelled), list_samples(with_unlabelled / "train")
    unlabelled = list_unlabelled(with_unlabelled)
    augment = Augmentation((32, 32), 2, True, True, elastic=2, contrast=0.5, brightness=0.5)
    data = PatchDataset(files, info, labelled=True, memory=CPU, margin=augment.margin, unlabelled=unlabelled)
    for batch in TrainingBatches(data, augment, BatchSettings((32, 32), 4, 0), CPU).of(1):
        factors = [
            np.polyfit(*(batch[name][k].ravel().numpy() for name in ("unchanged", "input")), 1) for k in range(4)
        ]
        assert all(abs(factor - 1) > 1e-4 for factor, _ in factors)
        assert (batch["weight"][1::2] == 0).all() and (batch["weight"][::2] > 0).all()
        assert batch["weight"].mean() == pytest.approx(1)


def test_training_with_unlabelled_images_differs_and_resumes_to_the_same_bits(with_unlabelled, work):
    main_module.main([*TAUGHT, "--scope", "a", "--num_freq_save", "1"])
    main_module.main([*TRAIN, "--scope", "off"])
    first = work / "checkpoints" / "a" / "em" / "model_epoch0001.pth"
    resumed = work / "checkpoints" / "b" / "em"
    resumed.mkdir(parents=True)
    (resumed / first.name).write_bytes(first.read_bytes())
    main_module.main([*TAUGHT, "--scope", "b", "--num_freq_save", "1"])
    unbroken = checkpoint_of(work, 2, "a").net
    assert same(unbroken, checkpoint_of(work, 2, "b").net)
    assert not same(unbroken, checkpoint_of(work, 2, "off").net)


def test_consistency_needs_an_average_and_pixels_that_are_not_annotated(with_unlabelled, fails):
    assert "--consistency 10.0: the average of --average teaches" in fails(
        main_module.main, [*TAUGHT, "--average", "0"], 2
    )
    shutil.rmtree(with_unlabelled / "unlabelled")
    assert "--consistency 10.0: all pixels are annotated: leave it out" in fails(main_module.main, TAUGHT, 2)


def test_unlabelled_images_are_said_to_be_used_or_not(with_unlabelled, capfd):
    main_module.main([*TRAIN, "--scope", "a"])
    assert "4 unlabelled image(s): every other crop is of one of them" in capfd.readouterr().out
    main_module.main([*TRAIN, "--scope", "b", "--norm", "inorm"])
    assert "note: 4 unlabelled image(s) are not used: with --norm inorm only --consistency" in capfd.readouterr().out


def test_two_processes_learn_from_unlabelled_images(with_unlabelled, together, work):
    finish(together(2, *TAUGHT, "--scope", "two"))
    assert np.isfinite(checkpoint_of(work, 2, "two").losses).all()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_without_annotation_changes_nothing_but_statistics(with_unlabelled, work, batch_size):
    main_module.main([*TRAIN, "--batch_size", str(batch_size), "--cache_gb", "0"])
    assert np.isfinite(checkpoint_of(work, 2).losses).all()
