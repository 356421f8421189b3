import pytest

from evaluation.curves import charts, read_curves, ticks


def test_charts_hold_the_curves_of_a_training():
    found = charts({"loss/train": [(1, 1.0), (2, 0.5), (3, 0.25)], "loss/val": [(1, 0.9), (3, 0.3)], "lr": [(1, 1)]}, 3)
    assert [chart.title for chart in found] == ["loss"]
    train, validation = found[0].lines
    assert (train.name, train.last, validation.last) == ("loss train", 0.25, 0.3)
    assert train.points == "44.0,8.0 195.0,113.3 346.0,166.0" and found[0].marked == 346.0
    assert [text for _, text in found[0].x_ticks] == ["1", "2", "3"]


def test_charts_are_not_flattened_by_a_few_outliers():
    usual = [(step, 1 / step) for step in range(1, 31)]
    begins_high = charts({"loss/train": usual, "loss/val": [(1, 6.0), (2, 7.7), *usual[2:]]})[0]
    plain = charts({"loss/train": usual, "loss/val": usual})[0]
    assert begins_high.lines[0] == plain.lines[0] and begins_high.y_ticks == plain.y_ticks
    assert (begins_high.cut, plain.cut) == (7.7, None)
    level = charts({"loss/train": [(step, float(step == 5)) for step in range(30)]})[0]
    assert level.cut is None


def test_charts_of_level_short_or_infinite_curves():
    nan = float("nan")
    assert charts({"loss/train": [(1, 1.0)], "loss/val": [(1, nan), (2, nan)]}) == []
    assert charts({}) == []
    level = charts({"loss/train": [(1, 0.5), (2, 0.5), (3, nan)]}, 9)[0]
    assert level.marked is None and level.lines[0].points == "44.0,87.0 346.0,87.0"


def test_read_curves_of_a_folder_without_a_readable_log(tmp_path, capsys):
    assert read_curves(tmp_path) == {} and read_curves(tmp_path / "none") == {}
    (tmp_path / "events.out.tfevents.1").write_bytes(b"damaged")
    (tmp_path / "events.out.tfevents.0").write_bytes(b"\xff" * 99)  # an event of exabytes
    assert read_curves(tmp_path) == {} and capsys.readouterr().err == ""
    (tmp_path / "events.out.tfevents.2").mkdir()
    assert read_curves(tmp_path) == {} and "no training curves" in capsys.readouterr().err


@pytest.mark.parametrize("low,high", [(0, 1e-6), (1, 3), (-2.5, 1e6), (0.999, 1.001), (1, 10_000)])
def test_ticks_are_distinct_and_in_range(low, high):
    numbers, texts = zip(*ticks(low, high), strict=True)
    assert 3 <= len(numbers) <= 8 and len({*texts}) == len(texts)
    assert all(low - 1e-9 <= number <= high + 1e-9 for number in numbers)
