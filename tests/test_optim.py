import pytest
import torch
from torch import nn

from optim import MovingAverage, learning_rate


def test_the_rate_rises_then_falls_to_the_end():
    rates = [learning_rate(step / 100, 2.0, "cosine", warmup=0.1) for step in range(100)]
    assert rates[0] == 0 and rates[5] == pytest.approx(1.0) and rates[10] == max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01
    assert learning_rate(1.0, 2.0, "cosine", warmup=0.0) == pytest.approx(0)
    assert {learning_rate(step / 100, 2.0, "constant", warmup=0.0) for step in range(101)} == {2.0}


def test_the_average_of_two_steps_by_hand():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    average = MovingAverage(net, decay=0.5)
    for _ in range(2):
        nn.init.ones_(net.weight)
        average.update(net)
    # the first steps keep 2/11 and 3/12 of the old average, less than the decay
    assert average.net.weight.item() == pytest.approx(1 - 2 / 11 * 3 / 12)


def test_the_average_holds_statistics_and_goes_on_from_its_state():
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
