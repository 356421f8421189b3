"""What is said about bad results, and where it is not."""

import pytest

from evaluation.hints import HINTS, hint, loss_hints, score_hints


@pytest.mark.parametrize(
    ("mean", "otsu", "symptoms"),
    [
        ({"pixel_error": 0.05, "dice_cell": 0.9, "object_f1": 0.85}, {"pixel_error": 0.1}, []),
        ({"pixel_error": 0.096, "dice_cell": 0.9, "object_f1": 0.85}, {"pixel_error": 0.1}, []),  # objects are parted
        ({"pixel_error": 0.096, "object_f1": 0.5}, {"pixel_error": 0.1, "object_f1": 0.6}, ["otsu"]),
        ({"pixel_error": 0.05, "dice_cell": 0.9, "object_f1": 0.55}, None, ["merged"]),
        ({"pixel_error": 0.3, "dice_cell": 0.4, "object_f1": 0.0}, None, []),
        ({"pixel_error": 0.05, "dice_a": 0.9}, None, []),  # of several classes
        ({}, None, []),  # without labels
    ],
)
def test_score_hints_name_what_is_seen(mean, otsu, symptoms):
    foreground = "cell" if "dice_cell" in mean else None
    summary = {"mean": mean, "baseline_otsu": otsu, "foreground": foreground, "num_labelled": 3}
    assert score_hints(summary, one_class=False) == [hint(symptom) for symptom in symptoms]
    assert score_hints(summary, one_class=True)[0] == hint("one class")
    seen = [score_hints(summary | {"num_labelled": num}, one_class=False) for num in (0, 2)]
    assert [hint("small test") in hints for hints in seen] == [False, True]


def test_loss_hints_name_losses_far_apart():
    assert loss_hints({"loss/train": 0.1, "loss/val": 0.19}) == loss_hints({"loss/train": 0.1}) == []
    assert loss_hints({"loss/train": 0.1, "loss/val": 0.21}) == [hint("apart")]


def test_hint_is_one_line_without_the_marks_of_the_readme():
    assert all("`" not in hint(name) and "\n" not in hint(name) for name in HINTS)
