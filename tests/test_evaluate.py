import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import metrics
from dataset import DataInfo, SampleFile
from evaluate import Challenge, TestScorer, Threads, ValidationScorer

GOLDEN = Path(__file__).parent / "golden"
INFO = DataInfo(1, [0, 255], ["membrane", "cell"], [0.3, 0.7], [0.0], [1.0], [0.0, 255.0])

SCALE = {"mean": torch.zeros(1, 1), "std": torch.ones(1, 1)}


def batch_of(label, probability, index=0):
    """A batch of one image, and the logits of a probability."""
    label = torch.as_tensor(label)[None]
    logits = torch.logit(torch.as_tensor(probability, dtype=torch.float64))[None, None]
    return (
        {"input": torch.zeros(1, 1, *label.shape[1:]), "label": label, "index": torch.tensor([index])} | SCALE,
        logits,
        torch.tensor(0.5),
    )


def test_a_stacks_challenge_scores_are_the_golden_maxima():
    expected = json.loads((GOLDEN / "expected.json").read_text())["voronoi_b_blurred"]
    threads = Threads()
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
    threads, waits = Threads(), [0.03, 0.02, 0.01, 0.02, 0.0]
    for wait in waits:
        threads.add(lambda wait: time.sleep(wait) or wait, wait)
    assert threads.results() == waits == threads.results()
    threads.add(int, "x")
    with pytest.raises(ValueError, match="invalid literal"):
        threads.results()


def test_validation_scores_are_means_over_images_and_keep_the_first_pictures():
    rng = np.random.default_rng(0)
    scorer = ValidationScorer(INFO, pictures=True, challenge=True)
    labels, masks = rng.integers(0, 2, (2, 2, 16, 16))
    for index in (0, 1):
        scorer(*batch_of(labels[index], np.where(masks[index], 0.9, 0.1), index))
    scorer.finish()
    scores = scorer.scores()
    by_hand = [2 * np.sum(a & b) / (a.sum() + b.sum()) for a, b in zip(labels, masks, strict=True)]
    assert scores["dice/cell"] == pytest.approx(np.mean(by_hand))
    assert scores["pixel_error"] == pytest.approx(np.mean(labels != masks))
    assert {"max/v_rand", "max/v_info", "rand_error"} <= scores.keys()
    assert np.array_equal(scorer.pictures["label"], labels[0] * 255)
    plain = ValidationScorer(INFO, pictures=False, challenge=False)
    plain(*batch_of(labels[0], masks[0] * 0.5 + 0.25))
    plain.finish()
    assert plain.pictures is None and "max/v_rand" not in plain.scores()


def test_segments_are_scored_at_their_threshold_and_pixels_at_a_half(tmp_path):
    label = np.ones((16, 16), int)
    label[:, 7:9] = 0
    probability = np.where(label, 0.8, 0.6)
    for threshold, v_rand in ((0.5, 2 / 3), (0.7, 1.0)):  # the gap between the two cells is closed at 0.5
        scorer = TestScorer(tmp_path, [SampleFile(Path("a.npy"))], INFO, threshold)
        scorer(*batch_of(label, probability))
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
    label = torch.randint(0, 3, (1, 16, 16))
    batch = {"input": torch.zeros(1, 1, 16, 16), "label": label, "index": torch.tensor([0])} | SCALE
    logits = 9.0 * torch.nn.functional.one_hot(label, 3).movedim(-1, 1)
    scorer = TestScorer(tmp_path, [SampleFile(Path("a.npy"))], info, 0.5)
    scorer(batch, logits, torch.tensor(0.1))
    scorer.finish()
    summary = scorer.summary()
    assert summary["mean"]["dice_c"] == 1 and summary["challenge"] is None and summary["segment_threshold"] is None
    assert metrics.THRESHOLDS[0] == 0.1
