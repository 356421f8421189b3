"""Progress on a terminal of 80 columns, and in a log file."""

import io
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import progress
from config import Config
from progress import Progress, tracked
from training import forecast
from training.forecast import Forecast
from training.log import TrainingLog


class Terminal(io.StringIO):
    """A terminal."""

    def isatty(self):
        return True


@pytest.fixture
def seconds(monkeypatch):
    """A clock that a test sets."""
    clock = SimpleNamespace(now=1000.0)
    for module in (progress.time, forecast.time):
        monkeypatch.setattr(module, "monotonic", lambda: clock.now)
        monkeypatch.setattr(module, "perf_counter", lambda: clock.now)
    return clock


def test_progress_prints_a_line_each_half_minute_without_a_terminal(seconds, capsys):
    for number, _ in enumerate(tracked(range(10), "segment")):
        seconds.now += 29 if number < 2 else 10
    assert capsys.readouterr().out.splitlines() == [
        "3:52 left, 0:58 done, segment 20%",
        "1:28 left, 1:28 done, segment 50%",
        "0:30 left, 1:58 done, segment 80%",
    ]


def test_progress_shows_the_time_left_first_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "FIRST", 0)
    with Progress(4, "score") as shown:
        shown.update(2.5)
        shown.bar.refresh()
        assert re.search(r"\r\d\d:\d\d left, 00:00 done, score \|.*\| 62%$", sys.stderr.getvalue())
    assert capsys.readouterr().out == ""


def test_progress_of_a_training_fits_80_columns_with_time_left_first(seconds, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", Terminal())
    log = TrainingLog(tmp_path, 100, 30000, 0.5)
    seconds.now += 10
    log.show(100, 0.5)
    scores = {"loss/train": 0.123456, "loss/val": 0.123456, "learning_rate": 1.0, "dice/foreground": 0.98765}
    seconds.now += 3600
    log.scalars(100, scores | {"pixel_error/val": 0.0123456, "images_per_second": 123.4}, 0.51)
    written = sys.stderr.getvalue()
    log.close()
    start, first, last = [line.strip() for line in written.split("\r") if "left" in line]
    assert start == "? left, 0:00 done, epoch 100/30000"
    assert first == "? left, 0:10 done, epoch 100/30000"
    assert last == "49:08:10 left, 1:00:10 done, epoch 100/30000  loss/train 0.1235"
    assert len(last) < 80


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "takes about 1:40:00 h by its first steps, .* add --nch_ker 16 --max_minutes 10 --train_continue off "),
        ({"nch_ker": 16}, "add --max_minutes 10 --train_continue off "),
        ({"max_minutes": 59.0}, None),
        ({"num_epoch": 100}, None),
    ],
)
def test_forecast_times_two_steps_and_names_the_flags_for_ten_minutes(seconds, flags, words):
    config, lines = Config(**flags), []
    timed = Forecast(6000 * config.num_epoch // 300, config, lines.append)
    for step in (9.0, 0.5, 1.5, 99.0):
        seconds.now += step
        timed.note(torch.tensor(0.5))
    assert len(lines) == (words is not None)
    assert not words or re.search(words, lines[0])
