from functools import partial

import pytest
import torch
from conftest import SMALL
from torch import nn

import checkpoint
import main
from training.compiled import PAYS, Compiled, settle


def chosen(choice, speeds, left):
    """Whether each epoch of a training was compiled, given the speeds of one that is not and of one that is."""
    plain, other = nn.Identity(), nn.Identity()
    nets = Compiled(plain, choice, lambda net: other)
    epochs = []
    for _ in range(7):
        epochs.append(nets.choose(left) is other)
        nets.measured(speeds[epochs[-1]])
    return "".join("c" if epoch else "-" for epoch in epochs)


@pytest.mark.parametrize(
    ("choice", "speeds", "left", "epochs"),
    [
        ("off", (1, 2), 2 * PAYS, "-------"),
        ("on", (2, 1), 0, "ccccccc"),
        ("auto", (1, 2), 2 * PAYS, "--ccccc"),
        ("auto", (2, 1), 2 * PAYS, "--cc---"),
        ("auto", (1, 2), PAYS / 2, "-------"),
    ],
)
def test_auto_compiles_a_long_training_if_that_is_faster(choice, speeds, left, epochs):
    assert chosen(choice, speeds, left) == epochs


def test_nothing_is_gained_on_a_cpu():
    assert [settle(choice, torch.device("cpu")) for choice in ("auto", "on", "off")] == ["off", "on", "off"]


def test_what_can_not_be_compiled_runs_as_it_is(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    net, image = nn.Conv2d(1, 1, 3), torch.ones(1, 1, 8, 8)
    nets = Compiled(net, "auto")
    nets.speeds = [1.0, 1.0]
    with torch._dynamo.config.patch(suppress_errors=False):  # puts back what the trial sets
        trial = nets.choose(2 * PAYS)
        assert trial is not net and torch.equal(trial(image), net(image))


def test_a_compiled_training_saves_the_names_and_weights_of_one_that_is_not(database, work, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # inductor takes minutes
    for compile in ("on", "off"):
        flags = ["--compile", compile, "--amp", "off", "--num_epoch", "2", "--batch_size", "3"]
        assert main.main([*SMALL, *flags, "--scope", compile]) == 0
    one, other = (checkpoint.load(work / f"checkpoints/{name}/em/model_epoch0002.pth")["net"] for name in ("on", "off"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
