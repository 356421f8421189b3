import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, needs_golden

from checkpoint import Checkpoint
from legacy import convert_legacy
from model import (
    INITS,
    NORMS,
    UNet,
    class_probability,
    init_weights,
    pad_to_multiple,
)


@pytest.mark.parametrize(("norm", "num"), [("bnorm", 23_375_041), ("inorm", 23_370_113)])
def test_unet_has_as_many_parameters_as_the_original(norm, num):
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(1, 1, 64, norm).parameters()) == num


@needs_golden
@pytest.mark.parametrize("norm", ["bnorm", "inorm"])
def test_legacy_checkpoint_gives_its_logits_and_resumes_to_its_losses(norm):
    folder = SHARED / "golden" / "upstream"
    saved = Checkpoint.load(folder / f"{norm}_model_epoch0003.pth")
    expected = np.load(folder / f"{norm}_expected.npz")
    image, label = torch.tensor(expected["input"]), torch.tensor(expected["label"])
    assert saved.arch == {"nch_in": 1, "nch_out": 1, "nch_ker": 2, "norm": norm, "pool": "avg", "num_level": 4}
    net = UNet(**saved.arch)
    net.load_state_dict(saved.net)
    with torch.no_grad():
        np.testing.assert_allclose(net.eval()(image).numpy(), expected["logits_eval"], atol=1e-5)
    optimizer = torch.optim.Adam(net.train().parameters(), 1e-3, betas=(0.5, 0.999))
    optimizer.load_state_dict(saved.optim)
    for loss_expected in expected["losses_resumed"]:
        loss = F.binary_cross_entropy_with_logits(net(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(loss_expected, abs=1e-6)


def _legacy(net: UNet) -> dict:
    """State of a network under the original's names, written out by hand."""
    names = {f"encoders.{i}.{j}": f"enc{i + 1}_{j + 1}" for i in range(4) for j in range(2)}
    names |= {"bottom.0": "enc5_1", "bottom.1": "dec5_1"}
    names |= {f"decoders.{i}.convs.{j}": f"dec{4 - i}_{2 - j}" for i in range(4) for j in range(2)}
    state = {}
    for key, value in net.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(f"{ours}.conv.", f"{theirs}.cbr.0.conv.").replace(
                f"{ours}.norm.", f"{theirs}.cbr.1.norm."
            )
        for i in range(4):
            key = key.replace(f"decoders.{i}.up.", f"unpool{4 - i}.unpooling.")
        state["module." + key.replace("fc.", "fc.conv.")] = value
    return state


@pytest.mark.parametrize("norm", ["bnorm", "inorm"])
def test_legacy_names_are_renamed_in_order(norm):
    net = UNet(3, 2, 2, norm)
    saved = convert_legacy({"netG": _legacy(net), "optimG": {}})
    assert list(saved["net"]) == list(net.state_dict())
    assert saved["arch"] == net.arguments


@pytest.mark.parametrize(("nch_out", "is_said"), [(1, False), (2, True), (3, True)])
def test_legacy_networks_of_several_outputs_say_that_these_were_sigmoids(tmp_path, capsys, nch_out, is_said):
    path = tmp_path / "model_epoch0001.pth"
    torch.save({"netG": _legacy(UNet(1, nch_out, 2, "inorm")), "optimG": {}}, path)
    assert Checkpoint.load(path).info.num_class == max(nch_out, 2)
    said = f"{path}: its {nch_out} outputs were trained as one sigmoid each" in capsys.readouterr().err
    assert said == is_said


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [(1, 1), (5, 70), (16, 16), (33, 48)])
def test_unet_takes_any_height_and_width_with_every_norm(norm, size):
    net = UNet(2, 3, 2, norm)
    assert net(torch.randn(2, 2, *size)).shape == (2, 3, *size)


def test_pad_to_multiple_reflects_and_leaves_a_fitting_image_alone():
    x = torch.arange(33.0).expand(1, 1, 32, 33)
    padded = pad_to_multiple(x, 16)
    assert padded.shape == (1, 1, 32, 48)
    assert padded[0, 0, 0, 33:36].tolist() == [31, 30, 29]
    assert pad_to_multiple(x[..., :32], 16).equal(x[..., :32])


@pytest.mark.parametrize("norm", ["bnorm", "inorm"])
def test_unet_gives_an_image_of_1_to_40_px_the_logits_that_it_has_in_a_batch(norm):
    torch.manual_seed(0)
    net = UNet(1, 2, 2, norm).eval()
    with torch.no_grad():
        for size in range(1, 41):
            x = torch.randn(2, 1, size, 41 - size)
            logits = net(x)
            assert logits.shape == (2, 2, size, 41 - size)
            torch.testing.assert_close(net(x[1:]), logits[1:], atol=1e-5, rtol=1e-5)


def test_pad_to_multiple_from_1_to_40_px_is_that_of_numpy():
    for size in range(1, 41):
        x = np.random.default_rng(size).random((size, 41 - size))
        padded = x
        for axis in (0, 1):
            missing = max(-(-x.shape[axis] // 16), 2) * 16 - x.shape[axis]
            width = [(0, missing if axis == place else 0) for place in (0, 1)]
            padded = np.pad(padded, width, "reflect" if missing < x.shape[axis] else "edge")
        assert np.array_equal(pad_to_multiple(torch.tensor(x)[None, None], 16)[0, 0], padded)


def test_unet_gives_a_fitting_part_logits_without_the_padding():
    net = UNet(1, 1, 2).eval()
    x = torch.randn(1, 1, 48, 48)
    cut = torch.cat([x[..., :40], x[..., 31:39].flip(-1)], -1)  # what 40 columns are padded to
    with torch.no_grad():
        torch.testing.assert_close(net(x[..., :40]), net(cut)[..., :40])


@pytest.mark.parametrize("init", INITS)
def test_init_weights_is_a_function_of_the_seed(init):
    first, second, third = (UNet(1, 1, 2) for _ in range(3))
    for net, seed in ((first, 1), (second, 1), (third, 2)):
        init_weights(net, init, seed)
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not first.fc.weight.equal(third.fc.weight)


def test_class_probability_of_one_channel_equals_that_of_two():
    logits = torch.randn(2, 1, 4, 4)
    two = torch.cat([torch.zeros_like(logits), logits], 1)
    torch.testing.assert_close(class_probability(logits), class_probability(two))
