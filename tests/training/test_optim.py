import copy
from functools import partial

import pytest
import torch
from torch import nn

from training.optim import OPTIMS, MovingAverage, learning_rate, load_optimizer_state


def test_learning_rate_rises_then_falls_to_the_end():
    rates = [learning_rate(step / 100, 2.0, "cosine", warmup=0.1) for step in range(100)]
    assert rates[0] == 0 and rates[5] == pytest.approx(1.0) and rates[10] == max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01
    assert learning_rate(1.0, 2.0, "cosine", warmup=0.0) == pytest.approx(0)
    assert {learning_rate(step / 100, 2.0, "constant", warmup=0.0) for step in range(101)} == {2.0}


def test_moving_average_of_two_steps_is_worked_out_by_hand():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    average = MovingAverage(net, decay=0.5)
    for _ in range(2):
        nn.init.ones_(net.weight)
        average.update(net)
    # the first steps keep 2/11 and 3/12 of the old average, less than the decay
    assert average.net.weight.item() == pytest.approx(1 - 2 / 11 * 3 / 12)


def test_moving_average_holds_statistics_and_goes_on_from_its_state():
    net = nn.BatchNorm1d(2)
    first = MovingAverage(net, 0.9)
    second = MovingAverage(net, 0.9)
    for step in range(4):
        net(torch.randn(8, 2))
        first.update(net)
        if step == 1:
            second.load_state_dict(first.state_dict())
        elif step > 1:
            second.update(net)
    assert first.net.running_mean.equal(second.net.running_mean)
    assert not first.net.running_mean.equal(net.running_mean)
    assert first.net.num_batches_tracked == 4


PYTORCHS = {
    "adam": partial(torch.optim.Adam, lr=0.1, betas=(0.5, 0.999)),
    "adamw": partial(torch.optim.AdamW, lr=0.1, betas=(0.5, 0.999)),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.5),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMS)
def test_optims_have_the_steps_and_state_of_pytorch(name):
    rng = torch.Generator().manual_seed(0)
    first, second = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    ours, theirs = OPTIMS[name]([first], 0.1, 0.5), PYTORCHS[name]([second])
    for step in range(4):
        gradient = torch.randn(4, 3, generator=rng)
        for weight, optimizer in ((first, ours), (second, theirs)):
            optimizer.zero_grad()
            assert weight.grad is None
            weight.grad = gradient.clone()
            optimizer.step()
        if step == 1:
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    torch.testing.assert_close(first, second)
    moments, others = (optimizer.state_dict()["state"][0] for optimizer in (ours, theirs))
    assert moments.keys() == others.keys()
    for key, value in moments.items():
        torch.testing.assert_close(value, others[key])


def moments_of(*shape):
    """State of pytorch-UNET's Adam, which is not fused, after a step."""
    weight = nn.Parameter(torch.zeros(shape))
    adam = torch.optim.Adam([weight], lr=1e-4, betas=(0.5, 0.999))
    weight.grad = torch.ones(shape)
    adam.step()
    return adam.state_dict()


def test_load_optimizer_state_moves_moments_to_the_device_of_the_weights():
    # on a GPU a fused step takes all of them from there; "meta" is a device that a CPU can tell apart
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2, 3, device="meta"))], 1e-2)
    optimizer.param_groups[0]["fused"] = True
    load_optimizer_state(optimizer, moments_of(2, 3))
    assert {value.device.type for value in next(iter(optimizer.state.values())).values()} == {"meta"}
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999) and optimizer.param_groups[0]["lr"] == 1e-4


def test_load_optimizer_state_refuses_moments_of_other_weights():
    with pytest.raises(ValueError, match="other weights"):
        load_optimizer_state(OPTIMS["adam"]([nn.Parameter(torch.zeros(3, 2))], 1e-2, 0.9), moments_of(2, 3))


def test_load_optimizer_state_refuses_moments_that_some_weights_lack():
    weights = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = OPTIMS["adamw"](weights, 0.1, 0.9)
    for weight in weights:
        weight.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][1]["exp_avg"] = None
    with pytest.raises(ValueError, match="some weights lack"):
        load_optimizer_state(OPTIMS["adamw"](weights, 0.1, 0.9), state)
