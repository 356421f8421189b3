import numpy as np
from golden_cases import GOLDEN, load_case

from evaluation.metrics import challenge_scores
from evaluation.thinning import thin_borders


def test_thin_borders_are_one_pixel_wide_and_part_the_segments():
    mask = np.zeros((9, 11), bool)
    mask[2:7, 1:4] = mask[1:8, 8:10] = True
    segments = thin_borders(mask)
    assert np.array_equal(segments[mask] > 0, np.ones(mask.sum(), bool))
    assert ((segments == 0).sum(1) == 1).all()  # one border pixel a row
    left, right = np.unique(segments[2:7, 1:4]), np.unique(segments[1:8, 8:10])
    assert len(left) == len(right) == 1 and left != right


def test_thin_borders_are_lines_between_all_segments():
    _, probability = (stack[0] for stack in load_case(GOLDEN / "voronoi_a_blurred.npz"))
    segments = thin_borders(probability > 0.5)
    for axis in (0, 1):  # no two segments touch
        first, second = np.moveaxis(segments, axis, 0)[:-1], np.moveaxis(segments, axis, 0)[1:]
        assert ((first == second) | (first == 0) | (second == 0)).all()
    assert thin_borders(np.zeros((5, 5), bool)).max() == 0 and thin_borders(np.ones((5, 5), bool)).min() == 1


def test_thin_borders_keep_segments_within_the_annotation():
    valid = np.ones((6, 6), bool)
    valid[:, 3] = False  # through a cell that fills the image
    segments = thin_borders(np.ones((6, 6), bool), valid)
    assert segments.tolist() == [[1, 1, 1, 0, 2, 2]] * 6
    ring = np.ones((6, 6), bool)
    ring[1:5, 1:5] = False  # a cell with a large hole, of which the left and the right side are annotated
    valid[:, 2:4] = False
    valid[:, 1] = valid[:, 4] = True
    segments = thin_borders(ring, valid)
    assert segments.tolist() == [[1, 1, 0, 0, 2, 2]] * 6
    assert challenge_scores(ring, ring * 1.0, (0.5,), valid)["v_rand"] == 1


def test_thin_borders_of_pixels_that_meet_in_one_step():
    for width, line in ((5, 2), (6, 3), (7, 3), (8, 3)):  # of even width two pixels meet, the even one joins first
        row = np.zeros((1, width), bool)
        row[0, [0, -1]] = True
        assert np.flatnonzero(thin_borders(row)[0] == 0).tolist() == [line]
        assert np.unique(thin_borders(row)).tolist() == [0, 1, 2]
