import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import DataInfo, SampleFile
from evaluation import metrics
from evaluation.scorers import Challenge, ScoringPool, Segmented, SegmentScorer, TestScorer, ValidationScorer
from prediction.predictor import Member, Predictor

GOLDEN = Path(__file__).parents[1] / "golden"
INFO = DataInfo(1, [0, 255], ["membrane", "cell"], [0.3, 0.7], [0.0], [1.0], [0.0, 255.0])


def segmented(label, probability, index=0, num_class=2):
    """An image as a network would segment it: `probability` is of class 1, or (K, H, W)."""
    label = np.asarray(label, np.uint8)
    each = np.stack([1 - probability, probability]) if probability.ndim == 2 else probability
    classes = each.argmax(0).astype(np.uint8)
    kept = each[1] if num_class == 2 else each.max(0)
    matrix = metrics.confusion_matrix(label[None], classes[None], num_class)[0].numpy()
    image = np.zeros((*label.shape, 1), np.uint8)
    return Segmented(index, image, label, kept.astype(np.float32), classes, 0.5, matrix)


def predictor(info=INFO, threshold=0.5, background=0):
    return Predictor((Member(torch.nn.Identity(), info),), threshold, torch.device("cpu"), background=background)


def test_a_stacks_challenge_scores_are_the_golden_maxima():
    expected = json.loads((GOLDEN / "expected.json").read_text())["voronoi_b_blurred"]
    threads = ScoringPool()
    with np.load(GOLDEN / "voronoi_b_blurred.npz") as case:
        for label, levels in zip(case["label"], case["prob"], strict=True):
            probability = (levels.astype(np.float32) / np.float32(255)).astype(np.float64)
            threads.add(metrics.challenge_scores, label, probability)
    challenge = Challenge(threads.results())
    summary = challenge.summary()
    assert summary["max_v_rand"] == pytest.approx(expected["max_v_rand_thin"], abs=1e-3)
    assert summary["max_v_info"] == pytest.approx(expected["max_v_info_thin"], abs=1e-3)
    assert summary["rand_error"] == pytest.approx(expected["rand_error"], abs=1e-6)
    assert challenge.best_threshold == 0.6


def test_calls_of_threads_come_back_in_their_order_and_raise_their_errors(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    threads, waits = ScoringPool(), [0.03, 0.02, 0.01, 0.02, 0.0]
    for wait in waits:
        threads.add(lambda wait: time.sleep(wait) or wait, wait)
    assert threads.results() == waits == threads.results()
    threads.add(int, "x")
    with pytest.raises(ValueError, match="invalid literal"):
        threads.results()


def test_validation_scores_are_means_over_images_and_keep_the_first_pictures():
    rng = np.random.default_rng(0)
    scorer, segments = ValidationScorer(INFO, pictures=True), SegmentScorer(0)
    labels, masks = rng.integers(0, 2, (2, 2, 16, 16))
    for index in (0, 1):
        for take in (scorer, segments):
            take(segmented(labels[index], np.where(masks[index], 0.9, 0.1), index))
    scorer.finish()
    scores = scorer.scores(segments.finish())
    by_hand = [2 * np.sum(a & b) / (a.sum() + b.sum()) for a, b in zip(labels, masks, strict=True)]
    assert scores["dice/cell"] == pytest.approx(np.mean(by_hand))
    assert scores["pixel_error"] == pytest.approx(np.mean(labels != masks))
    assert {"max/v_rand", "max/v_info", "rand_error"} <= scores.keys()
    assert np.array_equal(scorer.pictures["label"], labels[0] * 255)
    assert "max/v_rand" not in scorer.scores()


def discs(threshold, sharp=2.0):
    """Label and probability of separate discs, whose mask is right at a threshold."""
    y, x = np.mgrid[:64, :64]
    distance = np.min([np.hypot(y - cy, x - cx) for cy in (16, 48) for cx in (16, 48)], axis=0)
    return distance < 9, 1 / (1 + np.exp((distance - 9) * sharp) * threshold / (1 - threshold)) * 1.0


def best_threshold(*pairs, background=0):
    scorer = SegmentScorer(background)
    for index, (label, probability) in enumerate(pairs):
        scorer(segmented(label, probability, index))
    return scorer.finish().best_threshold


def test_the_threshold_of_objects_that_lie_apart_is_that_of_the_least_pixel_error():
    label, probability = discs(0.5)
    assert best_threshold((label, probability)) == 0.5
    fat = np.where(np.roll(label, 2, 0) | label, np.maximum(probability, 0.65), probability)
    assert best_threshold((label, fat)) == 0.7
    empty = np.zeros((64, 64), bool)
    assert best_threshold((label, fat), (empty, np.zeros((64, 64)))) == 0.7


def test_the_threshold_of_cells_that_touch_is_that_of_the_best_segments():
    label = np.ones((32, 32), bool)
    label[:, 15:17] = False
    probability = np.where(label, 0.95, 0.75)
    probability[:, :5] = 0.3  # pixels that a low threshold gets right
    assert best_threshold((label, probability)) == 0.8


def test_the_threshold_is_a_half_where_nothing_decides():
    noise = np.random.default_rng(0).random((32, 32))
    assert best_threshold((np.zeros((32, 32)), noise)) == 0.5
    assert best_threshold((np.eye(32, dtype=int), np.eye(32))) == 0.5


def test_the_foreground_may_be_class_0():
    label, probability = discs(0.5)
    assert best_threshold((~label, 1 - probability), background=1) == 0.5
    scorer = TestScorer(Path(), [SampleFile(Path("a.npy"))], predictor(threshold=0.3, background=1))
    assert scorer.threshold == 0.7 and "foreground is membrane" in scorer.legend


def test_segments_are_scored_at_their_threshold_and_pixels_at_a_half(tmp_path):
    label = np.ones((16, 16), int)
    label[:, 7:9] = 0
    probability = np.where(label, 0.8, 0.6)
    for threshold, v_rand in ((0.5, 2 / 3), (0.7, 1.0)):  # the gap between the two cells is closed at 0.5
        scorer = TestScorer(tmp_path, [SampleFile(Path("a.npy"))], predictor(threshold=threshold))
        scorer(segmented(label, probability))
        scorer.finish()
        summary = scorer.summary()
        assert summary["mean"]["v_rand"] == pytest.approx(v_rand)
        assert summary["mean"]["pixel_error"] == summary["majority"]["pixel_error"] == 2 / 16
        assert summary["challenge"]["max_v_rand"] == 1 and summary["challenge"]["min_pixel_error"] == 0
        assert f"segments at {threshold}" in scorer.legend
    assert summary["mean"]["object_f1"] == 1 and summary["majority"]["object_f1"] < 1
    assert scorer.predicted == {1}


def test_three_classes_have_no_challenge_scores(tmp_path):
    info = DataInfo(1, [0, 1, 2], ["a", "b", "c"], [0.5, 0.3, 0.2], [0.0], [1.0], [0.0, 255.0])
    label = np.random.default_rng(0).integers(0, 3, (16, 16))
    scorer = TestScorer(tmp_path, [SampleFile(Path("a.npy"))], predictor(info))
    scorer(segmented(label, np.moveaxis(np.eye(3)[label], -1, 0), num_class=3))
    scorer.finish()
    summary = scorer.summary()
    assert summary["mean"]["dice_c"] == summary["mean"]["object_f1"] == 1
    assert summary["challenge"] is None and summary["segment_threshold"] is None and summary["background"] == "a"
    assert "background is a" in scorer.legend


def test_touching_objects_that_the_watershed_parts_are_scored_as_predict_writes_them(tmp_path):
    y, x = np.mgrid[:30, :50]
    left, right = np.hypot(y - 15, x - 15), np.hypot(y - 15, x - 33)
    label = (np.minimum(left, right) < 10) & (x != 24)  # parted by a line in the label,
    probability = 1 / (1 + np.exp(np.minimum(left, right) - 10))  # and joined in the mask
    scorer = TestScorer(tmp_path, [SampleFile(Path("a.npy"))], predictor())
    scorer(segmented(label, probability))
    scorer.finish()
    assert metrics.mask_scores(label, probability > 0.5)["object_f1"] < 1
    assert scorer.summary()["mean"]["object_f1"] == 1
