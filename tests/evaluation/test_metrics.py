import itertools
import json

import numpy as np
import pytest
from conftest import SHARED
from golden_cases import GOLDEN, load_case
from scipy.optimize import linear_sum_assignment

from evaluation.metrics import (
    challenge_scores,
    confusion_matrix,
    confusion_scores,
    contingency,
    dice,
    iou,
    mask_scores,
    mean_scores,
    number_segments,
    object_scores,
    pixel_error,
    rand_error,
    v_info,
    v_rand,
)

PERFECT = dict.fromkeys(("object_f1", "matched_iou", "ap", "ap_50", "ap_75"), 1.0)
LABEL = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
PREDICTION = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_confusion_matrix_and_its_scores_worked_out_by_hand():
    matrix = confusion_matrix(LABEL, PREDICTION, 2)
    assert matrix.tolist() == [[11, 1], [1, 3]]
    assert dice(matrix) == pytest.approx([22 / 24, 6 / 8])
    assert iou(matrix) == pytest.approx([11 / 13, 3 / 5])
    assert pixel_error(matrix) == 2 / 16


def test_dice_iou_pixel_error_of_all_small_masks_lie_in_0_to_1():
    masks = np.array(list(itertools.product((0, 1), repeat=4))).reshape(16, 2, 2)
    matrices = np.array([[confusion_matrix(label, found, 2) for found in masks] for label in masks])
    for score in (dice(matrices), iou(matrices), pixel_error(matrices)):
        assert np.nanmin(score) >= 0
        assert np.nanmax(score) <= 1
    itself = np.arange(16)  # each mask against itself, the empty and the full one too
    of_itself = dice(matrices)[itself, itself]
    assert np.isnan(of_itself).sum() == 2 and (of_itself[~np.isnan(of_itself)] == 1).all()
    assert (pixel_error(matrices)[itself, itself] == 0).all()


def test_confusion_scores_carry_the_names_of_their_classes():
    scores = confusion_scores(np.array([[1, 1, 0], [0, 2, 0], [0, 0, 0]]), ["a", "b", "c"])
    assert scores["dice_a"] == pytest.approx(2 / 3)
    assert not {"dice_c", "iou_c"} & {*scores}  # in neither label nor prediction
    assert mean_scores([scores, scores]) == pytest.approx(scores)


def golden_cases():
    local = sorted(GOLDEN.glob("voronoi_*.npz"))
    real = SHARED / "golden" / "isbi_metrics" / "isbi_real.npz"
    return [*local, pytest.param(real, marks=pytest.mark.skipif(not real.exists(), reason="needs ../shared/golden"))]


@pytest.mark.parametrize("path", golden_cases(), ids=lambda path: path.stem)
def test_challenge_scores_agree_with_fijis_own_code(path):
    expected = json.loads((path.parent / "expected.json").read_text())[path.stem]
    labels, probabilities = load_case(path)
    thresholds = tuple(expected["thresholds"][:-1])  # at 1.0 the truth has no cell left
    scores = [challenge_scores(*pair, thresholds) for pair in zip(labels, probabilities, strict=True)]
    for name, theirs, tolerance in (
        ("v_rand", "v_rand_thin", 2e-3),
        ("v_info", "v_info_thin", 2e-3),
        ("pixel_error", "pixel_error", 1e-6),
    ):
        ours = np.mean([score[name] for score in scores], axis=0)
        np.testing.assert_allclose(ours, expected[theirs][:-1], atol=tolerance)
        if name != "pixel_error":
            assert ours.max() == pytest.approx(expected[f"max_{theirs}"], abs=1e-3)
    error = rand_error(sum(score["rand_counts"] for score in scores))
    assert error == pytest.approx(expected["rand_error"], abs=1e-6)


def test_v_rand_and_v_info_of_a_split_and_a_merger_by_hand():
    whole, halves = np.ones((2, 4), int), np.array([[1, 1, 2, 2]] * 2)
    merger, split = contingency(halves, whole), contingency(whole, halves)
    assert v_rand(merger) == v_rand(split) == pytest.approx(2 * 32 / (32 + 64))  # 4^2 + 4^2 of 8^2
    assert v_info(merger) == v_info(split) == 0  # one segment tells nothing of two
    assert v_rand(contingency(halves, halves)) == v_info(contingency(halves, halves)) == 1
    lost = contingency(whole, np.zeros((2, 4), int))  # each pixel a segment of its own
    assert v_rand(lost) == pytest.approx(2 * 1 / (64 + 1)) and v_info(lost) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("value", [0, 1])
def test_mask_scores_of_empty_and_full_masks_lie_in_0_to_1(value):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, (16, 16))
    constant = np.full((16, 16), float(value))
    for truth, probability in ((label, constant), (constant, label * 1.0), (constant, constant)):
        scores = challenge_scores(truth, probability)
        if truth.any():
            assert 0 <= rand_error(scores.pop("rand_counts")) <= 1
            assert all(values.min() >= 0 and values.max() <= 1 for values in scores.values())
        scores = mask_scores(truth, probability > 0.5)
        assert all(score >= 0 for score in scores.values())
        assert all(score <= 1 for name, score in scores.items() if not name.startswith("num_"))
    assert np.array_equal(
        challenge_scores(constant, constant)["v_rand"], [1.0 if value else np.nan] * 9, equal_nan=True
    )


def test_scores_of_nothing_are_absent_and_of_something_predicted_0():
    empty, speck = np.zeros((6, 8), bool), np.arange(48).reshape(6, 8) == 20
    nothing = {"warping_error": 0.0, "num_split": 0, "num_merger": 0}
    assert mask_scores(empty, empty) == nothing
    wrong = dict.fromkeys(("v_rand", "v_info", *PERFECT), 0.0)
    assert mask_scores(empty, speck) == wrong | {"warping_error": 1 / 48, "num_split": 0, "num_merger": 0}
    assert mask_scores(empty, speck, objects=0 * speck) == nothing | {"v_rand": 0, "v_info": 0, "warping_error": 1 / 48}
    half = np.arange(48).reshape(6, 8) % 2 == 1  # every second pixel
    assert mask_scores(empty, half)["v_rand"] == mask_scores(empty, half)["v_info"] == 0
    outside = np.ones((6, 8), bool)
    outside[2] = False  # the speck is not annotated
    assert mask_scores(empty, speck, valid=outside) == nothing
    assert mask_scores(speck, empty, valid=outside) == nothing
    scores = challenge_scores(empty, np.where(speck, 0.45, 0.0))
    expected = [0.0] * 4 + [np.nan] * 5
    for name in ("v_rand", "v_info"):
        assert np.array_equal(scores[name], expected, equal_nan=True)
    assert scores["pixel_error"].tolist() == [1 / 48] * 4 + [0.0] * 5 and not scores["rand_counts"].any()
    assert np.isnan(rand_error(scores["rand_counts"]))


def test_object_scores_match_objects_by_half_or_more():
    truth = np.array([[1, 1, 1, 0, 2, 2, 2, 0, 3, 3]])
    proposal = np.array([[7, 7, 0, 0, 9, 9, 9, 9, 0, 0]])
    scores = object_scores(truth, proposal)  # 2 of 3 and 3 of 4 pixels; object 3 is missed
    assert scores["object_f1"] == pytest.approx(2 * 2 / (3 + 2))
    assert scores["matched_iou"] == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert object_scores(truth, truth) == PERFECT
    assert object_scores(truth, 0 * truth) == dict.fromkeys(PERFECT, 0.0)
    assert object_scores(truth.clip(1), truth.clip(1))["object_f1"] == 1.0  # no background at all


def test_object_scores_match_at_the_limit_as_in_stardist_and_cellpose():
    truth = np.repeat([1, 0, 2], [20, 3, 20])[None]
    half = np.repeat([1, 0, 2], [10, 13, 20])[None]
    assert object_scores(truth, half)["object_f1"] == 1.0 and object_scores(truth, half)["matched_iou"] == 0.75
    for pixels in range(10, 20):  # each limit from 0.5 to 0.95 is reached exactly
        part = np.repeat([1, 0, 2], [pixels, 23 - pixels, 20])[None]
        assert object_scores(truth, part)["ap"] == pytest.approx(((pixels - 9) + (19 - pixels) / 3) / 10)


def test_object_scores_match_one_of_two_halves():
    whole, halves = np.repeat([1, 0, 4], [6, 2, 5])[None], np.repeat([1, 2, 0, 3], [3, 3, 2, 5])[None]
    expected = {"object_f1": 4 / 5, "matched_iou": 0.75, "ap": (2 / 3 + 9 * 1 / 4) / 10, "ap_50": 2 / 3, "ap_75": 1 / 4}
    assert object_scores(whole, halves) == pytest.approx(expected) == object_scores(halves, whole)


def test_object_scores_average_precision_by_hand():
    truth = np.repeat([1, 2, 3], 20)[None]
    found = np.repeat([1, 0, 2, 0, 4], [19, 1, 14, 6, 20])[None]  # overlaps of 0.95, 0.7 and 1
    scores = object_scores(truth, found)
    assert scores["ap_50"] == 1 and scores["ap_75"] == 2 / 4  # one is missed, and one found that is none
    assert scores["ap"] == pytest.approx((5 * 1 + 5 * 2 / 4) / 10)  # up to 0.7 all, up to 0.95 two of them
    assert object_scores(0 * truth, found)["ap"] == object_scores(truth, 0 * truth)["ap"] == 0
    assert object_scores(0 * truth, 0 * truth) == {}


def test_object_scores_average_precision_is_that_of_an_assignment():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, proposal = (np.repeat(rng.integers(0, 6, (12, 12)), 2, 1) for _ in range(2))
        proposal = np.where(rng.random(truth.shape) < 0.75, (truth + 2) % 6, proposal)
        overlap = np.array([[np.sum((truth == i) & (proposal == j)) for j in range(1, 6)] for i in range(1, 6)])
        area, other = (np.array([np.sum(image == i) for i in range(1, 6)]) for image in (truth, proposal))
        ious, expected = overlap / (area[:, None] + other - overlap), []
        for limit in np.arange(50, 100, 5) / 100:  # as StarDist and Cellpose count
            rows, columns = linear_sum_assignment(-((ious >= limit) + ious))
            hits = np.sum(ious[rows, columns] >= limit)
            expected.append(hits / (10 - hits))
        assert 0 < object_scores(truth, proposal)["ap"] == pytest.approx(np.mean(expected))


def test_mask_scores_of_random_masks_lie_in_their_ranges():
    rng = np.random.default_rng(0)
    for density in (0.1, 0.5, 0.9):
        label, mask = rng.random((2, 24, 24)) < density
        scores = mask_scores(label, mask, rng.integers(0, 9, (24, 24)))
        counts = {name: scores.pop(name) for name in ("num_split", "num_merger")}
        assert all(0 <= value <= 1 for value in scores.values()) and all(count >= 0 for count in counts.values())


def test_object_scores_need_no_table_of_all_pairs():
    numbers = np.arange(1, 250_001).reshape(500, 500)  # all pairs would be 500 GB
    assert object_scores(numbers, numbers + 7) == PERFECT


def grid(*rows):
    """Array of rows of digits; a dot is -1."""
    return np.array([[-1 if digit == "." else int(digit) for digit in row] for row in rows])


def test_challenge_scores_count_annotated_pixels_only():
    label = np.ones((6, 6), bool)
    label[:, 2] = False
    valid = np.zeros((6, 6), bool)
    valid[:4] = True
    probability = np.where(label, 0.9, 0.1)
    probability[4:] = 1 - probability[4:]  # as wrong as can be where nothing is annotated
    scores = challenge_scores(label, probability, (0.5,), valid)
    assert scores["v_rand"] == scores["v_info"] == 1 and scores["pixel_error"] == 0
    probability[0, 2] = 0.9  # the border is open in one of 24 annotated pixels
    scores = challenge_scores(label, probability, (0.5,), valid)
    assert scores["v_rand"] == pytest.approx(2 * (8**2 + 12**2) / (8**2 + 12**2 + 20**2))  # cells of 8 and 12 px
    assert scores["v_info"] == 0 and scores["pixel_error"] == 1 / 24
    assert scores["rand_counts"].tolist() == [[8**2 + 12**2, 8**2 + 12**2, 20**2]]


def test_contingency_counts_unassigned_among_annotated_pixels():
    table = contingency(grid("1110.."), grid("110010"))
    assert (table.num_unassigned, table.num_pixel) == (1, 4)
    assert v_rand(table) == pytest.approx(2 * (4 + 1 / 4) / (9 + 4 + 1 / 4))


def test_challenge_scores_of_a_window_are_those_of_the_crop():
    labels, probabilities = load_case(GOLDEN / "voronoi_a_blurred.npz")
    window = np.s_[12:76, 20:90]  # of even offset: borders are flooded by the fields of a chessboard
    valid = np.zeros(labels[0].shape, bool)
    valid[window] = True
    for label, probability in zip(labels, probabilities, strict=True):
        inside = challenge_scores(label, probability, valid=valid)
        cut = challenge_scores(label[window], probability[window])
        assert cut["v_info"].max() > cut["v_info"].min()
        for name, values in cut.items():
            np.testing.assert_allclose(inside[name], values, rtol=1e-12)


def test_object_scores_ignore_objects_that_the_annotation_cuts():
    truth = grid("0000..", "0110..", "0110..", "0000..", "0022..", "0022..")  # 1 is whole, 2 is cut
    whole = grid("000000", "011000", "011000", "000000", "000000", "000000")
    found = whole + grid("000000", "000000", "000000", "000000", "002222", "002222")
    assert object_scores(truth, whole) == object_scores(truth, found) == PERFECT
    halves = whole + grid("000000", "000000", "000000", "000000", "002220", "003330")
    assert object_scores(truth, halves) == PERFECT  # both lie at 2


def test_object_scores_count_objects_annotated_by_half():
    truth = grid("0000..", "0110..", "0110..", "0000..", "0000..", "0000..")
    whole = truth.clip(0)
    for row, counts in (("000555", False), ("005555", True), ("005550", True), ("000055", False), ("050000", True)):
        found = whole + grid("000000", "000000", "000000", "000000", "000000", row)
        assert object_scores(truth, found)["object_f1"] == (2 / 3 if counts else 1), row
    overflowing = whole | grid("000000", "000111", "000111", "000111", "000000", "000000")
    scores = object_scores(truth, overflowing)  # 7 of 13 px are annotated
    assert (scores["object_f1"], scores["matched_iou"], scores["ap"]) == (1.0, 4 / 7, 0.2)  # at 0.5 and 0.55
    assert object_scores(truth, overflowing * (np.arange(6) > 1)) == dict.fromkeys(PERFECT, 0.0)
    mostly_outside = whole | grid("000011", "000111", "000011", "000011", "000011", "000011")
    scores = object_scores(truth, mostly_outside)
    assert (scores["object_f1"], scores["matched_iou"]) == (1.0, 4 / 5)  # a match counts,
    assert (scores["ap_50"], scores["ap_75"], scores["ap"]) == (1.0, 1.0, 0.7)  # and above 0.8 it is a miss


def test_object_scores_are_empty_where_none_can_be_judged():
    stroke = grid("......", ".1111.", "......", ".0000.", "......", "......")
    assert object_scores(stroke, stroke.clip(0)) == {}
    assert object_scores(stroke, grid(*["000000"] * 6)) == {}
    empty = grid("000...", "000...", "000...", "000...", "000...", "000...")
    assert object_scores(empty, grid("001111", *["000000"] * 5)) == {}
    assert object_scores(empty, grid("011111", "010000", *["000000"] * 4))["object_f1"] == 0  # half of it is annotated


def test_valid_hides_what_the_label_holds_elsewhere():
    rng = np.random.default_rng(0)
    label, other, mask, valid = rng.random((4, 24, 24)) < 0.6
    other[valid] = label[valid]
    objects, probability = rng.integers(0, 9, (24, 24)), np.where(mask, 0.85, 0.35)
    assert mask_scores(label, mask, objects, valid) == mask_scores(other, mask, objects, valid)
    first, second = (challenge_scores(truth, probability, valid=valid) for truth in (label, other))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert mask_scores(label, mask, objects, valid) != mask_scores(label, mask, objects)


def test_valid_everywhere_scores_as_none():
    rng = np.random.default_rng(0)
    label, mask, everywhere = rng.random((24, 24)) < 0.7, rng.random((24, 24)) < 0.7, np.ones((24, 24), bool)
    assert mask_scores(label, mask, None, everywhere) == mask_scores(label, mask)
    first, second = (challenge_scores(label, np.where(mask, 0.9, 0.2), valid=valid) for valid in (None, everywhere))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_valid_strokes_that_are_right_have_no_error():
    rng = np.random.default_rng(1)
    label = number_segments(rng.random((40, 40)) < 0.8) > 0
    strokes = np.zeros((40, 40), bool)
    strokes[::8] = strokes[:, 3::16] = True
    strokes[::8, ::5] = False
    scores = mask_scores(label, label, None, strokes)
    assert scores["v_rand"] == scores["v_info"] == 1 and scores["warping_error"] == 0
