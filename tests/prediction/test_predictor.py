import numpy as np
import pytest
import torch

from description import DataInfo
from model import NORMS, UNet, class_probability
from prediction.predictor import Member, Predictor, fold_norm, predict_array
from prediction.views import TilePlace, augmented_logits


def augmented(net, x):
    """Logits of an image (N, C, H, W) that is a single tile."""
    return augmented_logits(net, x, TilePlace.of_image(*x.shape[-2:]))


@pytest.mark.parametrize("nch_out", [1, 3])
def test_augmented_logits_turn_with_the_input(nch_out):
    net = UNet(1, nch_out, 2).eval()
    x = torch.randn(2, 1, 32, 48)
    with torch.no_grad():
        one, eight = class_probability(net(x)), class_probability(augmented(net, x))
        turned = class_probability(augmented(net, torch.rot90(x, 1, (-2, -1)).flip(-1)))
    torch.testing.assert_close(torch.rot90(turned.flip(-1), -1, (-2, -1)), eight)
    torch.testing.assert_close(eight.sum(1), torch.ones(2, 32, 48))
    assert not torch.allclose(one, eight, atol=1e-4)


def views(array):
    """The eight flips and quarter turns of an array (..., H, W, C)."""
    for flipped in (array, array[..., ::-1, :]):
        for quarters in range(4):
            yield np.rot90(flipped, quarters, (-3, -2)).copy()


def trained(norm, nch_in=1, nch_out=1, num_level=2):
    """A predictor whose network has statistics away from 0 and 1."""
    torch.manual_seed(0)
    net = UNet(nch_in, nch_out, nch_ker=4, norm=norm, num_level=num_level)
    for _ in range(3):
        net(torch.randn(2, nch_in, 64, 64))
    num = max(nch_out, 2)
    share, mean, std = [1 / num] * num, [100.0] * nch_in, [50.0] * nch_in
    info = DataInfo(nch_in, list(range(num)), list(map(str, range(num))), share, mean, std, [0.0, 255.0])
    return Predictor((Member(fold_norm(net), info),), 0.5, torch.device("cpu"))


SIZES = [(73, 90), (64, 96), (33, 65), (17, 40), (1, 1), (3, 50), (95, 31)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("norm", ["bnorm", "inorm"])
def test_predict_array_of_a_view_is_the_view_of_it(norm, size):
    predictor = trained(norm)
    image = np.random.default_rng(0).integers(0, 200, (*size, 1)).astype(np.float32)
    expected = predict_array(predictor, image)
    for view, wanted in zip(views(image), views(expected[..., None]), strict=True):
        np.testing.assert_allclose(predict_array(predictor, view), wanted[..., 0], atol=1e-5)


@pytest.mark.parametrize(("nch_in", "nch_out"), [(1, 1), (3, 3)])
def test_predict_array_in_tiles_turns_with_the_image_too(nch_in, nch_out):
    predictor = trained("bnorm", nch_in, nch_out)
    image = np.random.default_rng(0).integers(0, 200, (201, 330, nch_in)).astype(np.float32)
    whole = predict_array(predictor, image)
    for view, wanted in zip(views(image), views(whole.reshape(-1, 201, 330, 1)), strict=True):
        found = predict_array(predictor, view, tile=64)  # tiles of 64 x 256 px
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=1e-5)
        assert len(predictor.tile_grid(view.shape, 64).rows) > 3


def test_augmented_logits_keep_the_loss_of_certain_pixels():
    net = UNet(1, 1, 2).eval()
    with torch.no_grad():
        net.fc.weight.zero_()
        net.fc.bias.fill_(30)
        assert augmented(net, torch.zeros(1, 1, 4, 4)).mean().item() == pytest.approx(30, abs=1e-3)


def test_augmented_logits_are_not_rounded_to_16_bits():
    torch.manual_seed(0)
    net = UNet(1, 1, 2).eval()
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = class_probability(augmented(net, x))
        total = torch.zeros(1, 2, 32, 32)
        for flip in ([], [-1]):
            for quarters in range(4):
                logits = net(torch.rot90(x.flip(flip), quarters, (-2, -1)))
                assert logits.dtype == torch.bfloat16
                total += torch.rot90(class_probability(logits.float()), -quarters, (-2, -1)).flip(flip)
    torch.testing.assert_close(found, total / 8, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_fold_norm_gives_the_same_logits(norm):
    torch.manual_seed(0)
    net = UNet(2, 3, nch_ker=2, norm=norm)
    image = torch.randn(2, 2, 40, 33)
    for _ in range(3):
        net(image * 2 + 1)  # moves the statistics away from 0 and 1
    folded = fold_norm(net)
    assert (sum("running_mean" in key for key in folded.state_dict()) == 0) and net.training
    torch.testing.assert_close(folded(image), net.eval()(image).detach(), atol=1e-5, rtol=1e-5)
