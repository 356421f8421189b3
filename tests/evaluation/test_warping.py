import numpy as np

from evaluation.warping import warping_scores


def test_warping_scores_of_a_deformed_cell_and_of_a_hole():
    label, moved = np.zeros((2, 24, 24), bool)
    label[4:16, 4:16] = moved[6:20, 2:12] = True
    assert warping_scores(label, moved) == {"warping_error": 0.0, "num_split": 0, "num_merger": 0}
    moved[12, 7] = False
    assert warping_scores(label, moved) == {"warping_error": 1 / 576, "num_split": 0, "num_merger": 0}


def test_warping_scores_count_splits_and_mergers_of_cells_in_a_row():
    label = np.ones((20, 40), bool)
    label[:, ::10] = False  # four cells between walls at 0, 10, 20, 30
    mask = np.roll(label, 1, axis=1)
    mask[:, 0] = False
    assert warping_scores(label, mask)["warping_error"] == 0  # the walls shifted
    mask[5:15, 11] = mask[5:15, 21] = True  # two walls broken
    mask[:, 36:38] = False  # and a cell cut in two by a broad line
    scores = warping_scores(label, mask)
    assert (scores["num_split"], scores["num_merger"]) == (1, 2)
    assert scores["warping_error"] == (1 + 1 + 20) / 800  # a pixel joins, a line of 20 cuts


def test_warping_scores_count_annotated_pixels_only():
    label = np.ones((6, 6), bool)
    label[:, 3] = False
    valid = np.arange(36).reshape(6, 6) < 24
    mask = label.copy()
    mask[1, 3] = True  # a hole in the border
    assert warping_scores(label, mask, valid) == {"warping_error": 1 / 24, "num_split": 0, "num_merger": 1}
    assert warping_scores(label, label ^ ~valid, valid) == {"warping_error": 0.0, "num_split": 0, "num_merger": 0}
