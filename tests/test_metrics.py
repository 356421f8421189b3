import itertools

import numpy as np
import pytest
import torch

from metrics import confusion_matrix, confusion_scores, dice, iou, majority_confusion, mean_scores, pixel_error

LABEL = np.array([[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]])
PREDICTION = np.array([[[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]])


def test_scores_of_a_mask_worked_out_by_hand():
    matrix = confusion_matrix(LABEL, PREDICTION, 2)[0].numpy()
    assert matrix.tolist() == [[11, 1], [1, 3]]
    assert dice(matrix) == pytest.approx([22 / 24, 6 / 8])
    assert iou(matrix) == pytest.approx([11 / 13, 3 / 5])
    assert pixel_error(matrix) == 2 / 16


def test_all_scores_of_all_small_masks_lie_in_0_to_1():
    masks = np.array(list(itertools.product((0, 1), repeat=4))).reshape(16, 2, 2)
    labels, predictions = np.repeat(masks, 16, axis=0), np.tile(masks, (16, 1, 1))
    matrices = confusion_matrix(labels, predictions, 2).numpy()
    for score in (dice(matrices), iou(matrices), pixel_error(matrices)):
        assert score.min() >= 0
        assert score.max() <= 1
    assert (dice(matrices)[:: 16 + 1] == 1).all()  # each mask against itself, the empty and the full one too
    assert (pixel_error(matrices)[:: 16 + 1] == 0).all()


@pytest.mark.parametrize(
    ("label", "prediction"), [([[[0, 255]]], [[[0, 1]]]), ([[[0, 1]]], [[[0, 2]]]), ([[[0]]], [[[0, 1]]])]
)
def test_what_is_no_class_map_is_refused(label, prediction):
    with pytest.raises(ValueError, match="must"):
        confusion_matrix(torch.tensor(label), torch.tensor(prediction), 2)


def test_the_majority_baseline_is_right_where_the_class_is():
    matrix = majority_confusion(confusion_matrix(LABEL, PREDICTION, 2)[0].numpy(), 0)
    assert pixel_error(matrix) == 4 / 16
    assert dice(matrix) == pytest.approx([24 / 28, 0])


def test_scores_carry_the_names_of_their_classes():
    scores = confusion_scores(np.array([[1, 1, 0], [0, 2, 0], [0, 0, 0]]), ["a", "b", "c"])
    assert scores["dice_a"] == pytest.approx(2 / 3)
    assert scores["iou_c"] == 1
    assert mean_scores([scores, scores]) == pytest.approx(scores)
