import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import UNet
from training import cpu_layers as layers
from training.cpu_layers import FastConv2d, FastConvTranspose2d, FastDecoder, speed_up

ORDERS = [torch.contiguous_format, torch.channels_last]


def up_with_torch(net, x):
    return F.conv_transpose2d(x, net.weight, net.bias, stride=2)


def results(function, inputs):
    """Value of a function, and the gradients of its squares' sum by the inputs."""
    value = function(*inputs)
    return value, *torch.autograd.grad(value.float().square().sum(), inputs)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("nch", [(6, 4), (32, 40)])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_upsampling_has_the_values_and_gradients_of_torch(order, precision, nch, capability, monkeypatch):
    monkeypatch.setattr(layers, "CAPABILITY", capability)
    monkeypatch.setattr(layers, "LARGE", 1)
    torch.manual_seed(0)
    net = FastConvTranspose2d(*nch, 2, stride=2).to(memory_format=order)
    x = torch.randn(3, nch[0], 10, 7).to(memory_format=order).requires_grad_()
    inputs = (x, net.weight, net.bias)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        found = results(lambda x, *_: net(x), inputs)
        expected = results(lambda x, *_: up_with_torch(net, x), inputs)
    torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=0)
    rounding = 1e-4 if precision == torch.float32 else 2**-7
    torch.testing.assert_close(found[2:], expected[2:], rtol=rounding, atol=rounding)
    assert found[2].stride() == expected[2].stride()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 10, 7), (1, 1, 1), (2, 4, 32)])
def test_convolution_without_avx512_has_the_values_and_gradients_of_torch(bias, shape, monkeypatch):
    monkeypatch.setattr(layers, "CAPABILITY", "AVX2")
    monkeypatch.setattr(layers, "LARGE", 1)
    torch.manual_seed(0)
    net = FastConv2d(32, 40, 3, padding=1, bias=bias).to(memory_format=torch.channels_last)
    x = torch.randn(shape[0], 32, *shape[1:]).to(memory_format=torch.channels_last).requires_grad_()
    inputs = (x, *net.parameters())
    assert type(net(x).grad_fn).__name__ == "_Conv2dBackward"
    found, again = (results(lambda x, *_: net(x), inputs) for _ in range(2))
    expected = results(lambda x, *_: F.conv2d(x, net.weight, net.bias, padding=1), inputs)
    torch.testing.assert_close(found, again, rtol=0, atol=0)  # a resumed run is the unbroken one
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found[2].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", ["large", "small", "narrow", "planes", "bfloat16", "AVX512", "frozen", "no gradient"])
def test_convolution_has_another_gradient_only_if_large_without_avx512(case, monkeypatch):
    monkeypatch.setattr(layers, "CAPABILITY", "AVX512" if case == "AVX512" else "AVX2")
    called = []
    monkeypatch.setattr(layers._Conv2d, "apply", lambda x, *_: called.append(x) or x)
    nch, height = 16 if case == "narrow" else 32, 127 if case == "small" else 256
    order = torch.contiguous_format if case == "planes" else torch.channels_last
    net = FastConv2d(nch, 32, 3, padding=1, bias=False).to(memory_format=order).requires_grad_(case != "frozen")
    x = torch.ones(2, nch, height, 32, requires_grad=True).to(memory_format=order)
    with torch.autocast("cpu", enabled=case == "bfloat16"), torch.set_grad_enabled(case != "no gradient"):
        net(x)
    assert bool(called) == (case == "large")


def test_upsampling_without_a_gradient_of_the_image_trains_its_weights():
    net = FastConvTranspose2d(2, 2, 2, stride=2)
    net(torch.ones(1, 2, 3, 3)).sum().backward()
    assert net.bias.grad.tolist() == [36, 36]
    torch.testing.assert_close(net.weight.grad, torch.full((2, 2, 2, 2), 9.0))


@pytest.mark.parametrize("order", ORDERS)
def test_concatenation_has_dense_gradients_with_the_values_of_torch(order):
    torch.manual_seed(0)
    parts = [torch.randn(2, nch, 6, 4).to(memory_format=order).requires_grad_() for nch in (3, 5)]
    found = results(layers._Concat.apply, parts)
    expected = results(lambda *both: torch.cat(both, dim=1), parts)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(grad.is_contiguous(memory_format=order) for grad in found[1:])


def test_speed_up_changes_the_classes_of_the_layers_alone():
    net = UNet(1, 1, nch_ker=2)
    state, last = net.state_dict(), net.fc
    speed_up(net)
    kinds = [type(module) for module in net.modules()]
    assert [kinds.count(kind) for kind in (FastConv2d, FastConvTranspose2d, FastDecoder)] == [18, 4, 4]
    assert type(last) is nn.Conv2d and [*net.state_dict()] == [*state]
    again = UNet(1, 1, nch_ker=2)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(torch.ones(1, 1, 32, 32)), net(torch.ones(1, 1, 32, 32)))
