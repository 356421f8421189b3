import csv
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from description import DataInfo, describe
from distributed import World
from evaluation import metrics, tables
from evaluation.report import Report
from evaluation.scorers import Challenge, PixelScores, TestScorer, object_counts, scoring_threads, segment_scores
from evaluation.segment import Segmented, checked_samples, segment
from model import UNet
from prediction.objects import KEEP_ALL, ObjectFilter, separate_objects
from prediction.predictor import Member, Predictor
from samples import IGNORE, SampleFile, write_sample
from utils import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
INFO = DataInfo(1, [0, 255], ["membrane", "cell"], [0.3, 0.7], [0.0], [1.0], [0.0, 255.0])


def segmented(label, probability, index=0, num_class=2, valid=None):
    """An image as a network would segment it: `probability` is of class 1, or (K, H, W)."""
    label = np.asarray(label, np.uint8)
    seen = np.s_[:] if valid is None else valid
    each = np.stack([1 - probability, probability]) if probability.ndim == 2 else probability
    classes = each.argmax(0).astype(np.uint8)
    kept = each[1] if num_class == 2 else each.max(0)
    matrix = metrics.confusion_matrix(label[seen], classes[seen], num_class)
    image = np.zeros((*label.shape, 1), np.uint8)
    return Segmented(index, image, label, kept.astype(np.float32), classes, 0.5, matrix, valid)


def predictor(info=INFO, threshold=0.5, background=0):
    return Predictor((Member(torch.nn.Identity(), info),), threshold, torch.device("cpu"), background=background)


def report_on(folder, network, *images, files=None, object_filter=KEEP_ALL):
    """What a test says of some images."""
    scorer = TestScorer(folder, network, object_filter)
    for image in images:
        scorer(image)
    files = files or [SampleFile(Path(f"{number:05d}.npy")) for number in range(len(images))]
    return Report(scorer.finish(), files, network, {}, object_filter)


@pytest.mark.parametrize(
    ("highs", "context", "legend"),
    [
        ([300, 60000], 0, "; channel 1 of 2 of the input shown with"),  # highest grey value of each channel
        ([300, 9, 60000, 9], 0, "; channel 1 of 4 of the input shown with"),
        ([40000, 300, 60000], 0, "; input shown with"),
        ([40000, 30000, 60000], 0, "; input shown with"),  # none is faint: one range keeps the colours
        ([60000, 300, 60000], 1, "; input shown with"),
        ([9, 60000, 300, 60000, 9, 60000], 1, "; channel 1 of 2 of the input shown with"),
    ],
)
def test_pictures_have_the_contrast_of_the_channels_that_they_show(highs, context, legend, tmp_path):
    pixels = (np.linspace(-0.1, 1.1, 4096).clip(0, 1).reshape(64, 64, 1) * highs).astype(np.uint16)
    info = describe([(pixels, np.zeros((64, 64), np.uint8))], [0, 255], context=context)
    info = DataInfo.from_dict(json.loads(json.dumps(asdict(info))), tmp_path)
    image = replace(segmented(np.zeros((64, 64)), np.zeros((64, 64))), image=pixels)
    picture = image.pictures(info)["input"]
    assert (picture.reshape(4096, -1).max(0) > 120).all() and picture.min() == 0
    dim = replace(image, image=pixels // 4).pictures(info)["input"]  # has a contrast of its own
    assert np.abs(dim.astype(int) - picture).max() <= 4
    assert legend in Report([], [], predictor(info), {}).legend


def test_challenge_of_a_stack_has_the_golden_maxima():
    expected = json.loads((GOLDEN / "expected.json").read_text())["voronoi_b_blurred"]
    scores = []
    with np.load(GOLDEN / "voronoi_b_blurred.npz") as case, ThreadPoolExecutor(3) as threads:
        for label, levels in zip(case["label"], case["prob"], strict=True):
            probability = (levels.astype(np.float32) / np.float32(255)).astype(np.float64)
            scores.append(metrics.challenge_scores(label, probability, mapped=threads.map))
    challenge = Challenge(scores)
    summary = challenge.summary()
    assert summary["max_v_rand"] == pytest.approx(expected["max_v_rand_thin"], abs=1e-3)
    assert summary["max_v_info"] == pytest.approx(expected["max_v_info_thin"], abs=1e-3)
    assert summary["rand_error"] == pytest.approx(expected["rand_error"], abs=1e-6)
    assert challenge.best_threshold == 0.6


@pytest.mark.parametrize(("side", "cores", "expected"), [(512, 16, 16), (2048, 16, 2), (2048, 1, 1), (2897, 16, 1)])
def test_scoring_threads_are_fewer_for_a_large_image(side, cores, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    with scoring_threads(side**2) as threads:
        assert threads._max_workers == expected


def test_scoring_threads_drop_waiting_calls_after_an_error(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    begun, done = threading.Event(), []
    with pytest.raises(KeyboardInterrupt), scoring_threads(1) as threads:
        threads.submit(lambda: begun.set() or time.sleep(0.2))
        threads.submit(done.append, 1)
        begun.wait()
        raise KeyboardInterrupt
    assert not done


def test_test_scorer_fails_if_pictures_cannot_be_written(tmp_path):
    scorer = TestScorer(tmp_path / "none" / "none", predictor())
    with pytest.raises(FileNotFoundError):
        scorer(segmented(np.eye(8), np.eye(8)))


def test_test_scorer_returns_images_in_their_order(tmp_path):
    report = report_on(tmp_path, predictor(), *(segmented(np.eye(8), np.eye(8), index) for index in (2, 0, 1)))
    assert [image.index for image in report.images] == [0, 1, 2]
    assert {path.name for path in tmp_path.iterdir()} >= {"0000-output.png", "0002-label.png"}


def test_pixel_scores_are_means_over_images():
    rng = np.random.default_rng(0)
    labels, masks = rng.integers(0, 2, (2, 2, 16, 16))
    images = [segmented(label, np.where(mask, 0.9, 0.1)) for label, mask in zip(labels, masks, strict=True)]
    pixels = PixelScores(INFO, [image.loss for image in images], [image.matrix for image in images], None)
    scores = pixels.scores(Challenge([segment_scores(image, 0) for image in images]))
    by_hand = [2 * np.sum(a & b) / (a.sum() + b.sum()) for a, b in zip(labels, masks, strict=True)]
    assert scores["dice/cell"] == pytest.approx(np.mean(by_hand)) and scores["loss/val"] == 0.5
    assert scores["pixel_error"] == pytest.approx(np.mean(labels != masks))
    assert {"max/v_rand", "max/v_info", "rand_error"} <= scores.keys()
    assert "max/v_rand" not in pixels.scores()


def discs(threshold, sharp=2.0):
    """Label and probability of separate discs, whose mask is right at a threshold."""
    y, x = np.mgrid[:64, :64]
    distance = np.min([np.hypot(y - cy, x - cx) for cy in (16, 48) for cx in (16, 48)], axis=0)
    return distance < 9, 1 / (1 + np.exp((distance - 9) * sharp) * threshold / (1 - threshold)) * 1.0


def best_threshold(*pairs, background=0, valid=None):
    images = [segmented(*pair, valid=valid) for pair in pairs]
    return Challenge([segment_scores(image, background) for image in images]).best_threshold


def test_best_threshold_of_separate_objects_has_the_least_pixel_error():
    label, probability = discs(0.5)
    assert best_threshold((label, probability)) == 0.5
    fat = np.where(np.roll(label, 2, 0) | label, np.maximum(probability, 0.65), probability)
    assert best_threshold((label, fat)) == 0.7
    empty = np.zeros((64, 64), bool)
    assert best_threshold((label, fat), (empty, np.zeros((64, 64)))) == 0.7


def test_best_threshold_of_touching_cells_has_the_best_segments():
    label = np.ones((32, 32), bool)
    label[:, 15:17] = False
    probability = np.where(label, 0.95, 0.75)
    probability[:, :5] = 0.3  # pixels that a low threshold gets right
    assert best_threshold((label, probability)) == 0.8


def test_best_threshold_is_a_half_where_nothing_decides():
    noise = np.random.default_rng(0).random((32, 32))
    assert best_threshold((np.zeros((32, 32)), noise)) == 0.5
    assert best_threshold((np.eye(32, dtype=int), np.eye(32))) == 0.5


def test_challenge_of_a_stack_leaves_out_blank_images_where_nothing_is_predicted():
    label = np.ones((4, 8), bool)
    label[:, 4] = False  # cells of 16 and 12 px, which are joined where the probability is above a threshold below 0.6
    right = segment_scores(segmented(label, np.where(label, 0.95, 0.55)), 0)
    blank = segment_scores(segmented(0 * label, np.where(label, 0.35, 0.25)), 0)
    assert right["v_info"].tolist() == [0.0] * 5 + [1.0] * 4
    challenge = Challenge([blank, right])
    joined = right["v_rand"][0]
    assert challenge.means("v_rand") == pytest.approx([joined / 2] * 3 + [joined] * 2 + [1.0] * 4)
    summary = {"max_v_rand": 1.0, "max_v_info": 1.0, "min_pixel_error": 0.0, "rand_error": 0.0}
    assert challenge.summary() == summary == Challenge([right]).summary()
    assert challenge.fewer_images() == {"max_v_rand": 1, "max_v_info": 1} and Challenge([right]).fewer_images() == {}
    full = segment_scores(segmented(0 * label, np.full(label.shape, 0.95)), 0)
    assert Challenge([full, right]).summary()["max_v_info"] == 0.5 and not Challenge([full, right]).fewer_images()
    for alone in ([blank], [full], [blank, full]):
        assert Challenge(alone).summary().keys() == {"min_pixel_error"} and not Challenge(alone).fewer_images()
    pixels = PixelScores(INFO, [0.5], [np.eye(2)], None)
    assert "max/v_info" not in pixels.scores(Challenge([full]))


def test_report_counts_the_images_of_each_mean(tmp_path):
    label = np.zeros((16, 16), int)
    label[2:8, 2:8] = 1
    empty, right = 0 * label, np.where(label, 0.9, 0.1)
    info = replace(INFO, class_share=[0.8, 0.2], class_mean=[10.0, 90.0])
    bright = [np.uint8(90 * mask)[..., None] for mask in (empty, label, label)]
    images = [segmented(empty, 0.1 + 0.0 * empty, 0), segmented(label, right, 1), segmented(empty, right, 2)]
    images = [replace(image, image=pixels) for image, pixels in zip(images, bright, strict=True)]
    report = report_on(tmp_path, predictor(info), *images)
    blank, perfect, wrong = report.rows
    segments = ("v_rand", "v_info", "object_f1", "matched_iou", "ap", "ap_50", "ap_75")
    assert not {*segments} & {*blank} and blank["pixel_error"] == blank["warping_error"] == 0
    assert [perfect[name] for name in segments] == [1.0] * 7 and [wrong[name] for name in segments] == [0.0] * 7
    summary = report.summary()
    assert [summary["mean"][name] for name in segments] == [0.5] * 7 and summary["num_labelled"] == 3
    two, one = (dict.fromkeys(("dice_cell", "iou_cell", *segments), num) for num in (2, 1))
    fewer = {"mean": two, "majority": one, "baseline_otsu": two, "challenge": {"max_v_rand": 2, "max_v_info": 2}}
    assert summary["scored_images"] == fewer  # all pixels are background for the majority, and right in the blank ones
    table = report.table()
    assert [row["image"] for row in table[3:]] == ["mean", "  images", "all membrane", "  images", "otsu", "  images"]
    assert [table[k]["v_rand"] for k in (4, 6, 8)] == ["2 of 3", "1 of 3", "2 of 3"]
    tables.write_metrics(tmp_path, summary, report.rows)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [(row["image"], row["loss"], row["v_rand"]) for row in rows[2:]] == [
        ("0002", "0.5", "0.0"),
        ("mean", "0.5", "0.5"),
        ("images", "", "2"),
    ]
    assert list(rows[0])[-10:] == [*segments, "warping_error", "num_split", "num_merger"]


def test_report_without_blank_images_counts_none(tmp_path):
    report = report_on(tmp_path, predictor(), segmented(np.eye(8), np.eye(8)))
    assert report.summary()["scored_images"] == {}
    assert [row["image"] for row in report.table()] == ["0000", "mean", "all cell"]


def test_foreground_may_be_class_0():
    label, probability = discs(0.5)
    assert best_threshold((~label, 1 - probability), background=1) == 0.5
    network = predictor(threshold=0.3, background=1)
    assert TestScorer(Path(), network).threshold == 0.7
    legend = Report([], [], network, {}).legend
    assert "foreground is membrane" in legend and "segments at 0.7" in legend


def test_segments_are_scored_at_their_threshold_and_pixels_at_a_half(tmp_path):
    label = np.ones((16, 16), int)
    label[:, 7:9] = 0
    probability = np.where(label, 0.8, 0.6)
    for threshold, v_rand in ((0.5, 2 / 3), (0.7, 1.0)):  # the gap between the two cells is closed at 0.5
        report = report_on(tmp_path, predictor(threshold=threshold), segmented(label, probability))
        summary = report.summary()
        assert summary["mean"]["v_rand"] == pytest.approx(v_rand)
        assert summary["mean"]["pixel_error"] == summary["majority"]["pixel_error"] == 2 / 16
        assert summary["challenge"]["max_v_rand"] == 1 and summary["challenge"]["min_pixel_error"] == 0
        assert f"segments at {threshold}" in report.legend
    assert summary["mean"]["object_f1"] == 1 and summary["majority"]["object_f1"] < 1
    assert report.images[0].predicted == {1}


def test_report_on_three_classes_has_no_challenge_scores(tmp_path):
    info = DataInfo(1, [0, 1, 2], ["a", "b", "c"], [0.5, 0.3, 0.2], [0.0], [1.0], [0.0, 255.0])
    label = np.random.default_rng(0).integers(0, 3, (16, 16))
    image = segmented(label, np.moveaxis(np.eye(3)[label], -1, 0), num_class=3)
    report = report_on(tmp_path, predictor(info), image)
    summary = report.summary()
    assert summary["mean"]["dice_c"] == summary["mean"]["object_f1"] == 1
    assert summary["challenge"] is None and summary["segment_threshold"] is None and summary["background"] == "a"
    counts = [int(np.sum(label == k)) for k in range(3)]
    assert summary["confusion_matrix"] == {"names": ["a", "b", "c"], "counts": np.diag(counts).tolist()}
    assert summary["baseline_otsu"] is None
    assert "background is a" in report.legend


def test_object_filter_fills_holes_and_drops_debris_of_classes(tmp_path):
    info = DataInfo(1, [0, 1, 2], ["a", "b", "c"], [0.5, 0.3, 0.2], [0.0], [1.0], [0.0, 255.0])
    label = np.zeros((20, 30), int)
    label[2:12, 2:12], label[2:12, 15:25] = 1, 2
    output = label.copy()
    output[3:11, 3:11], output[6, 6], output[15, 15] = 0, 2, 1  # a ring around a speck of the other class, and a speck
    image, scores = segmented(label, np.moveaxis(np.eye(3)[output], -1, 0), num_class=3), []
    for object_filter in (ObjectFilter(), ObjectFilter(5), ObjectFilter(5, True)):
        report = report_on(tmp_path, predictor(info), image, object_filter=object_filter)
        scores.append(report.summary()["mean"]["object_f1"])
    assert scores[0] < scores[1] == 0.5 and scores[2] == 1


def test_object_filter_that_changes_an_image_shows_both_numbers_of_all(tmp_path):
    label, speck = np.zeros((20, 20), int), np.zeros((20, 20), int)
    label[2:12, 2:12], speck[16, 16] = 1, 1
    outputs = [(label, label), (label, label | speck), (0 * label, speck)]  # right, with a speck, and nothing but it
    images = [segmented(truth, np.where(found, 0.9, 0.1), k) for k, (truth, found) in enumerate(outputs)]
    report = report_on(tmp_path, predictor(), *images, object_filter=ObjectFilter(5))
    both = [(row.get("object_f1"), row["object_f1_unfiltered"]) for row in report.rows]
    assert both == [(1.0, 1.0), (1.0, pytest.approx(2 / 3)), (None, 0.0)]
    summary = report.summary()
    assert summary["mean"]["object_f1"] == 1 and summary["mean"]["object_f1_unfiltered"] == pytest.approx(5 / 9)
    assert "object_f1_unfiltered" not in summary["majority"] and summary["scored_images"]["mean"]["object_f1"] == 2
    report = report_on(tmp_path, predictor(), images[0], object_filter=ObjectFilter(5))
    assert "object_f1_unfiltered" not in report.rows[0] and report.rows[0]["object_f1"] == 1


def test_objects_are_scored_as_predict_writes_them(tmp_path):
    y, x = np.mgrid[:30, :50]
    left, right = np.hypot(y - 15, x - 15), np.hypot(y - 15, x - 33)
    label = (np.minimum(left, right) < 10) & (x != 24)  # parted by a line in the label,
    probability = 1 / (1 + np.exp(np.minimum(left, right) - 10))  # and joined in the mask
    report = report_on(tmp_path, predictor(), segmented(label, probability))
    assert metrics.mask_scores(label, probability > 0.5)["object_f1"] < 1
    assert report.summary()["mean"]["object_f1"] == 1


PARTIAL = replace(INFO, ignore=128)
UNKNOWN = np.arange(24 * 24).reshape(24, 24) % 24 > 9  # right of a window of 10 columns


def report_on_right_output(folder, info, image, label, background=0, valid=None):
    """What a test says of an image whose output is its label."""
    label = np.asarray(label, np.uint8)
    sample = segmented(label, np.where(label == 1, 0.9, 0.1), valid=valid)
    return report_on(folder, predictor(info, background=background), replace(sample, image=image))


@pytest.mark.parametrize("background", [0, 1])
@pytest.mark.parametrize("means", [[50.0, 150.0], [150.0, 50.0]])
def test_otsu_scores_take_the_side_of_the_foreground_in_training(tmp_path, means, background):
    label, rng = np.zeros((32, 32), int), np.random.default_rng(0)
    label[4:14, 4:14] = label[18:28, 18:28] = 1
    image = np.uint8(np.take(means, label)[..., None] + rng.normal(0, 5, (32, 32, 1)))
    info = replace(INFO, class_mean=means)
    scores = report_on_right_output(tmp_path, info, image, label, background).summary()["baseline_otsu"]
    assert scores["pixel_error"] == 0 and scores["dice_membrane"] == scores["dice_cell"] == 1
    assert scores["object_f1"] == scores["v_rand"] == scores["ap"] == 1 and "loss" not in scores
    inverted = report_on_right_output(tmp_path, info, 200 - image, label, background).summary()["baseline_otsu"]
    assert inverted["pixel_error"] == 1  # no label of the test chooses the side
    image[:16, :16] = np.take(means, 1 - label[:16, :16])[..., None]
    scores = report_on_right_output(tmp_path, info, image, label, background).summary()["baseline_otsu"]
    assert scores["pixel_error"] == 1 / 4
    assert scores["dice_cell"] == pytest.approx(2 * 100 / (200 + 100 + 156))
    valid = np.arange(32)[:, None] + np.zeros(32) >= 16
    partial, seen = replace(info, ignore=128), np.where(valid, label, IGNORE)
    assert (
        report_on_right_output(tmp_path, partial, image, seen, background, valid).summary()["baseline_otsu"][
            "pixel_error"
        ]
        == 0
    )


def test_otsu_scores_are_of_the_section_itself(tmp_path):
    label = np.eye(32)
    image = np.stack([1 - label, 0 * label, label, label, 1 - label, 0 * label], -1)  # a neighbour, itself, a neighbour
    numbers = [0.0] * 6
    info = DataInfo(
        6, [0, 255], ["a", "b"], [0.5, 0.5], numbers, [1.0] * 6, [0.0, 1.0], "data", 1, class_mean=[0.2, 0.8]
    )
    report = report_on_right_output(tmp_path, info, image, label)
    assert report.summary()["baseline_otsu"]["pixel_error"] == 0
    assert [row["image"] for row in report.table()] == ["0000", "mean", "all a", "otsu"]


@pytest.mark.parametrize("means", [None, [7.0, 7.0]])
def test_otsu_scores_are_missing_where_no_side_is_known(tmp_path, means):
    report = report_on_right_output(tmp_path, replace(INFO, class_mean=means), np.eye(24)[..., None], np.eye(24))
    assert report.summary()["baseline_otsu"] is None
    assert [row["image"] for row in report.table()] == ["0000", "mean", "all cell"]


@pytest.fixture
def parts(tmp_path):
    """Samples of one image: its label, the label in a window, the label outside of it, and no label at all."""
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (24, 24, 1), np.uint8), rng.integers(0, 2, (24, 24), np.uint8)
    labels = [label, np.where(UNKNOWN, IGNORE, label), np.where(UNKNOWN, label, IGNORE), np.full_like(label, IGNORE)]
    files = [SampleFile(tmp_path / f"{number:05d}.npy") for number in range(4)]
    for file, part in zip(files, labels, strict=True):
        write_sample(file.input, image, part)
    torch.manual_seed(0)
    net = UNet(1, 1, 2, "bnorm").eval()
    return files, Predictor((Member(net, PARTIAL),), 0.5, torch.device("cpu"))


def test_segment_counts_annotated_pixels_only(parts):
    files, network = parts
    whole, inside, outside, nothing = segment(network, files, World(), tta=False, tile=0)
    num_inside, num_outside = 24 * 10, 24 * 14
    assert np.array_equal(inside.matrix + outside.matrix, whole.matrix) and inside.matrix.sum() == num_inside
    mean = (inside.loss * num_inside + outside.loss * num_outside) / 24**2
    assert mean == pytest.approx(whole.loss, rel=1e-12) and abs(inside.loss - outside.loss) > 1e-6
    window = np.s_[:, :10]
    of_label = np.where(whole.label, whole.probability, 1 - whole.probability)[window]
    assert inside.loss == pytest.approx(-np.log(of_label.astype(np.float64)).mean(), rel=1e-6)
    cut = metrics.confusion_matrix(whole.label[window], whole.classes[window], 2)
    assert np.array_equal(inside.matrix, cut)
    assert whole.valid is None and nothing.label is None and nothing.valid is None and nothing.loss == 0
    full = replace(network, members=(replace(network.members[0], info=INFO),))
    again = next(segment(full, files[:1], World(), tta=False, tile=0))
    assert again.loss == whole.loss and np.array_equal(again.matrix, whole.matrix)


def test_checked_samples_without_annotation_are_tested_without_scores(parts, tmp_path):
    files, network = parts
    assert checked_samples(files, PARTIAL, labelled=False) == files
    with pytest.raises(UserError, match="no pixel is annotated"):
        checked_samples(files, PARTIAL, labelled=True)
    report = report_on(tmp_path, network, *segment(network, files, World(), tta=False, tile=0), files=files)
    *scored, last = report.rows
    assert last == {"image": "0003", "sample": "00003.npy"} and not (tmp_path / "0003-label.png").exists()
    assert [row["annotated"] for row in scored] == [1.0, 10 / 24, 14 / 24]
    assert report.summary()["mean"]["loss"] == np.mean([row["loss"] for row in scored])
    assert "not annotated" in report.legend


def test_majority_baseline_counts_annotated_pixels_only(tmp_path):
    label = np.zeros((24, 24), np.uint8)
    label[:, :4] = 1
    label[UNKNOWN] = IGNORE
    image = segmented(label, np.where(label == 1, 0.9, 0.1), valid=~UNKNOWN)
    summary = report_on(tmp_path, predictor(PARTIAL), image).summary()
    assert summary["majority"]["pixel_error"] == pytest.approx(6 / 10) and summary["mean"]["pixel_error"] == 0
    assert summary["majority"]["v_rand"] == 1  # a single cell is annotated
    assert summary["mean"]["v_rand"] == summary["mean"]["object_f1"] == 1
    assert summary["challenge"]["min_pixel_error"] == 0


def test_object_scores_of_classes_count_annotated_pixels_only(tmp_path):
    info = DataInfo(1, [0, 1, 2], ["a", "b", "c"], [0.5, 0.3, 0.2], [0.0], [1.0], [0.0, 255.0], ignore=9)
    label = np.zeros((24, 24), np.uint8)
    label[2:8, 2:6], label[12:18, 2:6] = 1, 2
    output = label.copy()
    output[:, 12:] = 1  # anything at all where nothing is annotated
    label[UNKNOWN] = IGNORE
    image = segmented(label, np.moveaxis(np.eye(3)[output], -1, 0), num_class=3, valid=~UNKNOWN)
    mean = report_on(tmp_path, predictor(info), image).summary()["mean"]
    assert mean["dice_b"] == mean["dice_c"] == mean["object_f1"] == 1 and mean["pixel_error"] == 0


def test_best_threshold_counts_annotated_pixels_only():
    label, probability = discs(0.5)
    fat = np.where(np.roll(label, 2, 0) | label, np.maximum(probability, 0.65), probability)
    left = np.arange(64) < 32
    mixed, valid = np.where(left, fat, probability), np.broadcast_to(left, (64, 64))
    assert best_threshold((label, mixed), valid=valid) == best_threshold((label, fat)) == 0.7
    assert best_threshold((np.where(valid, label, IGNORE), mixed), valid=valid) == 0.7
    assert best_threshold((label, mixed), valid=~valid) == 0.5
    empty = np.where(valid, 0, IGNORE)  # no foreground is annotated, so it says nothing of the segments
    assert best_threshold((empty, np.random.default_rng(0).random((64, 64))), valid=valid) == 0.5


def test_pictures_and_pixel_scores_of_a_partial_label():
    label = np.where(UNKNOWN, IGNORE, np.eye(24, dtype=np.uint8))
    image = segmented(label, np.zeros((24, 24)), valid=~UNKNOWN)
    assert np.array_equal(image.pictures(PARTIAL)["label"], np.where(UNKNOWN, 128, np.eye(24) * 255))
    scores = PixelScores(PARTIAL, [image.loss], [image.matrix], None).scores()
    assert scores["pixel_error"] == pytest.approx(10 / 240)


def test_threshold_of_numbered_objects_is_that_of_their_average_precision():
    """Two discs that the network draws too large below 0.7; V_Info and pixels alone would not see the objects."""
    y, x = np.mgrid[:60, :120]
    distance = np.minimum(np.hypot(y - 30, x - 30), np.hypot(y - 30, x - 90))
    label, probability = (distance < 10).astype(int), np.interp(distance, [0, 10, 11, 28, 29], [1, 0.71, 0.64, 0.55, 0])
    info = DataInfo(1, ["background", "object"], ["a", "b"], [0.9, 0.1], [0.0], [1.0], [0.0, 1.0])
    image = segmented(label, probability.astype(np.float32))
    scores = segment_scores(image, 0) | object_counts(image, predictor(info))
    assert info.numbers_objects and scores["object_counts"].shape == (9, 4, 10, 2)
    assert scores["object_counts"][6, 0, :9].tolist() == [[2, 4]] * 9  # at 0.7 all match, up to IoU 0.9
    assert Challenge([scores]).best_threshold == 0.7
    assert Challenge([scores, scores]).chosen_on == [2, 4]


def test_certainty_of_numbered_objects_is_that_of_their_average_precision(tmp_path):
    """Two discs, and two faint ones that are none: only how certain they are tells them apart."""
    y, x = np.mgrid[:60, :120]
    inside = [np.hypot(y - 15 - 30 * (k > 1), x - 30 - 60 * (k % 2)) < 10 for k in range(4)]
    label = (inside[0] | inside[3]).astype(int)
    probability = np.select(inside, [0.97, 0.78, 0.78, 0.97], 0).astype(np.float32)
    info = DataInfo(1, ["background", "object"], ["a", "b"], [0.9, 0.1], [0.0], [1.0], [0.0, 1.0])
    image = segmented(label, probability)
    scores = segment_scores(image, 0) | object_counts(image, predictor(info))
    assert scores["object_counts"][3, :, 0].tolist() == [[2, 6], [2, 6], [2, 4], [2, 4]]  # at 0.4
    assert Challenge([scores]).best_certainty == 0.8
    certain = replace(predictor(info), certainty=0.8)
    assert certain.object_filter.certainty == 0.8
    found = separate_objects(probability, 0.4, certainty=0.8)
    assert np.array_equal(found > 0, label)
    means = [
        report_on(tmp_path, predictor(info), image, object_filter=each.object_filter).summary()["mean"]
        for each in (predictor(info), certain)
    ]
    assert [each["object_f1"] for each in means] == [pytest.approx(2 / 3), 1] and "object_f1_unfiltered" in means[1]


def test_certainty_of_masks_is_none():
    image = segmented(np.eye(24, dtype=int), np.eye(24, dtype=np.float32))
    assert Challenge([segment_scores(image, 0)]).best_certainty == 0
