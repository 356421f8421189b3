"""Devices: which one is chosen, and what is asked of one that isn't here."""

import numpy as np
import pytest
import torch

import device
from dataset import PatchDataset
from description import DataInfo
from device import ABILITIES, pick_device, pick_precision, to_device
from model import UNet
from samples import list_samples, write_sample
from training.augment import Augmentation
from training.loader import TrainingBatches, memory_for
from training.sampler import BatchSettings
from utils import FlagError

CPU, MPS = torch.device("cpu"), torch.device("mps")


def test_pick_device_says_once_that_there_is_no_gpu_and_what_to_type(capsys):
    assert pick_device("-1") == CPU
    assert capsys.readouterr() == ("", "")
    assert pick_device("99") == CPU
    assert "no GPU 99 here, running on the CPU: to choose that, give --gpu_ids -1" in capsys.readouterr().err
    assert pick_device("0") == CPU
    out, err = capsys.readouterr()
    assert out.startswith("note: no GPU 0 here") and out.count("\n") == 1 and err == ""


def test_pick_device_takes_the_gpu_of_apple_where_it_is(monkeypatch, capsys):
    with pytest.raises(FlagError, match=r"--gpu_ids mps .* has none: give --gpu_ids -1"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps") == MPS
    pick_device("0")
    assert "or --gpu_ids mps for Apple's GPU" in capsys.readouterr().out


def test_abilities_of_apple_are_float32_in_the_usual_order_and_memory():
    assert pick_precision("auto", MPS) is pick_precision("off", MPS) is None
    with pytest.raises(FlagError, match=r"--amp bf16: .* float32 on mps"):
        pick_precision("bf16", MPS)
    assert memory_for(1, 2.0, MPS) == CPU


def test_abilities_that_lack_float64_get_the_same_batches_in_float32(tmp_path, monkeypatch):
    info = DataInfo(1, [0, 255], ["a", "b"], [0.5, 0.5], [100.0], [50.0], [0.0, 255.0])
    (tmp_path / "train").mkdir()
    rng = np.random.default_rng(0)
    write_sample(tmp_path / "train" / "0.npy", rng.normal(size=(48, 48, 1)), rng.integers(0, 2, (48, 48), np.uint8))
    augment = Augmentation((32, 32), 2, elastic=3.0, noise=0.1)
    sent = []

    def batches(memory):
        data = PatchDataset(list_samples(tmp_path / "train"), info, labelled=True, memory=memory, margin=augment.margin)
        made = TrainingBatches(data, augment, BatchSettings((32, 32), batch_size=2, seed=0, num_crop=2), CPU)
        moved = made._moved
        monkeypatch.setattr(made, "_moved", lambda batch: (sent.extend(batch.values()), moved(batch))[1])
        return next(made.of(1))

    expected = batches(CPU)
    sent.clear()
    monkeypatch.setitem(device.ABILITIES, "cpu", ABILITIES["mps"])
    batch = batches(memory_for(1, 2.0, CPU))
    assert all(torch.equal(batch[name], expected[name]) for name in ("input", "label"))
    assert {value.dtype for value in sent} == {torch.float32, torch.int64}
    assert to_device(UNet(1, 1, 2), "bnorm", CPU, None).fc.weight.is_contiguous()
