from functools import partial

import pytest
import torch
from conftest import SMALL
from torch import nn

import main
from checkpoint import Checkpoint
from training import compiled
from training.compiled import LONG_MINUTES, LONG_STEPS, maybe_compile


@pytest.mark.parametrize(
    ("choice", "num_step", "max_minutes", "compiles"),
    [
        ("off", 10**6, 0, False),
        ("on", 1, 0, True),
        ("auto", LONG_STEPS, 0, True),
        ("auto", LONG_STEPS - 1, 0, False),
        ("auto", 1, LONG_MINUTES, True),
        ("auto", 10**6, LONG_MINUTES - 1, False),
    ],
)
def test_maybe_compile_compiles_a_long_training_on_a_gpu(monkeypatch, choice, num_step, max_minutes, compiles):
    monkeypatch.setattr(compiled, "can_compile", lambda device: device.type == "cuda")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    net = nn.Conv2d(1, 1, 3)
    with torch._dynamo.config.patch(suppress_errors=False):  # puts back what `auto` sets
        assert (maybe_compile(net, choice, torch.device("cuda"), num_step, max_minutes) is not net) == compiles


def test_maybe_compile_does_not_compile_on_a_cpu():
    net = nn.Conv2d(1, 1, 3)
    assert maybe_compile(net, "auto", torch.device("cpu"), 10**6, 0) is net


def test_maybe_compile_runs_what_can_not_be_compiled_as_it_is(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    monkeypatch.setattr(compiled, "can_compile", lambda _: True)
    net, image = nn.Conv2d(1, 1, 3), torch.ones(1, 1, 8, 8)
    with torch._dynamo.config.patch(suppress_errors=False):
        other = maybe_compile(net, "auto", torch.device("cpu"), LONG_STEPS, 0)
        assert other is not net and torch.equal(other(image), net(image))


def test_compile_on_saves_the_names_and_weights_of_compile_off(database, work, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # inductor takes minutes
    for compile in ("on", "off"):
        flags = ["--compile", compile, "--amp", "off", "--num_epoch", "2", "--batch_size", "3"]
        assert main.main([*SMALL, *flags, "--scope", compile]) == 0
    paths = (work / f"checkpoints/{name}/em/model_epoch0002.pth" for name in ("on", "off"))
    one, other = (Checkpoint.load(path).net for path in paths)
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
