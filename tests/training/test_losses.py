import numpy as np
import pytest
import torch

from training.losses import LOSSES, cross_entropy, dice_loss


def test_cross_entropy_of_one_and_two_channels_agree_with_and_without_weights():
    logits, label, weight = torch.randn(2, 1, 4, 4), torch.randint(0, 2, (2, 4, 4)), torch.rand(2, 4, 4)
    two = torch.cat([torch.zeros_like(logits), logits], 1)
    for w in (None, weight):
        torch.testing.assert_close(cross_entropy(logits, label, w), cross_entropy(two, label, w))


def test_cross_entropy_with_weights_is_worked_out_by_hand():
    logits, label = torch.tensor([[[[0.0, 0.0]]]]), torch.tensor([[[0, 1]]])
    logits[..., 1] = np.log(3)  # -log(3 / 4) for class 1
    expected = (3 * np.log(2) + 1 * np.log(4 / 3)) / 2
    assert cross_entropy(logits, label, torch.tensor([[[3.0, 1.0]]])).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("nch", [1, 3])
def test_dice_loss_is_0_for_the_truth_and_near_1_for_its_opposite(nch):
    num_class = max(nch, 2)
    label = torch.randint(0, num_class, (2, 16, 16))
    sure = 100.0 * torch.stack([label == k for k in range(num_class)], 1).float()
    sure = sure if nch > 1 else sure[:, 1:] - sure[:, :1]
    assert dice_loss(sure, label) == pytest.approx(0, abs=1e-5)
    assert dice_loss(-sure, label) > (0.9 if nch == 1 else 0.5)
    half = dice_loss(torch.zeros(2, 1, 16, 16), torch.ones(2, 16, 16).long())  # class 1: 2 * 256 / (256 + 512)
    assert half.item() == pytest.approx(1 - (2 / 3 + 1 / 257) / 2, abs=2e-3)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("nch", [1, 4])
def test_losses_have_finite_gradients_that_point_to_the_truth(name, nch):
    label = torch.randint(0, max(nch, 2), (2, 8, 8))
    logits = torch.zeros(2, nch, 8, 8, requires_grad=True)
    LOSSES[name](logits, label, torch.rand(2, 8, 8) if name == "wbce" else None).backward()
    better = logits.detach() - 10 * logits.grad
    assert logits.grad.isfinite().all()
    assert LOSSES[name](better, label, None) < LOSSES[name](logits, label, None)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("nch", [1, 3])
def test_losses_give_a_pixel_of_weight_0_no_gradient_and_no_part(name, nch):
    label = torch.randint(0, max(nch, 2), (2, 8, 8))
    valid = torch.rand(2, 8, 8) < 0.3
    weight = valid / valid.float().mean()
    logits = torch.randn(2, nch, 8, 8, requires_grad=True)
    loss = LOSSES[name](logits, label, weight)
    loss.backward()
    changed, unknown = logits.detach().clone(), ~valid[:, None].expand_as(logits)
    assert logits.grad[unknown].eq(0).all() and logits.grad[~unknown].ne(0).all()
    changed[unknown] = 1000 * torch.randn(int(unknown.sum()))
    other = torch.where(valid, label, (label + 1) % max(nch, 2))
    assert LOSSES[name](changed, other, weight).equal(loss.detach())


@pytest.mark.parametrize("nch", [1, 3])
def test_losses_of_a_partial_label_are_those_of_its_annotated_pixels(nch):
    label, logits = torch.randint(0, max(nch, 2), (2, 8, 8)), torch.randn(2, nch, 8, 8)
    valid = torch.zeros(2, 8, 8).bool()
    valid[:, 2:5, 1:7] = True
    weight = valid / valid.float().mean()
    for name in LOSSES:
        alone = LOSSES[name](logits[:, :, 2:5, 1:7], label[:, 2:5, 1:7], None)
        torch.testing.assert_close(LOSSES[name](logits, label, weight), alone)
