import pytest
import torch

from model import NORMS, UNet, class_probability
from prediction.predictor import TestTimeAugmentation, fold_norm


@pytest.mark.parametrize("nch_out", [1, 3])
def test_test_time_augmentation_turns_with_its_input(nch_out):
    net = UNet(1, nch_out, 2).eval()
    x = torch.randn(2, 1, 32, 48)
    with torch.no_grad():
        one, eight = class_probability(net(x)), class_probability(TestTimeAugmentation(net)(x))
        turned = class_probability(TestTimeAugmentation(net)(torch.rot90(x, 1, (-2, -1)).flip(-1)))
    torch.testing.assert_close(torch.rot90(turned.flip(-1), -1, (-2, -1)), eight)
    torch.testing.assert_close(eight.sum(1), torch.ones(2, 32, 48))
    assert not torch.allclose(one, eight, atol=1e-4)


def test_certain_pixels_keep_their_loss_with_test_time_augmentation():
    net = UNet(1, 1, 2).eval()
    with torch.no_grad():
        net.fc.weight.zero_()
        net.fc.bias.fill_(30)
        assert TestTimeAugmentation(net)(torch.zeros(1, 1, 4, 4)).mean().item() == pytest.approx(30, abs=1e-3)


def test_the_mean_of_the_eight_views_is_not_rounded_to_16_bits():
    torch.manual_seed(0)
    net = UNet(1, 1, 2).eval()
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = class_probability(TestTimeAugmentation(net)(x))
        total = torch.zeros(1, 2, 32, 32)
        for flip in ([], [-1]):
            for quarters in range(4):
                logits = net(torch.rot90(x.flip(flip), quarters, (-2, -1)))
                assert logits.dtype == torch.bfloat16
                total += torch.rot90(class_probability(logits.float()), -quarters, (-2, -1)).flip(flip)
    torch.testing.assert_close(found, total / 8, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_a_folded_network_gives_the_same_logits(norm):
    torch.manual_seed(0)
    net = UNet(2, 3, nch_ker=2, norm=norm)
    image = torch.randn(2, 2, 40, 33)
    for _ in range(3):
        net(image * 2 + 1)  # moves the statistics away from 0 and 1
    folded = fold_norm(net)
    assert (sum("running_mean" in key for key in folded.state_dict()) == 0) and net.training
    torch.testing.assert_close(folded(image), net.eval()(image).detach(), atol=1e-5, rtol=1e-5)
