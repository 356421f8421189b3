import csv
import json
import re

import numpy as np
import pytest
from conftest import ROOT

from evaluation.tables import LOW_IS_GOOD, MEANINGS, format_confusion, meaning_of, write_metrics


def test_write_metrics_writes_json_and_csv(tmp_path):
    rows = [{"image": "0000", "sample": "a", "dice_cell": 0.5}, {"image": "0001", "sample": "b"}]
    write_metrics(tmp_path, {"mean": {"dice_cell": 0.5}}, rows)
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == rows
    table = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [(row["image"], row["dice_cell"]) for row in table] == [("0000", "0.5"), ("0001", ""), ("mean", "0.5")]


def test_write_metrics_of_a_first_image_without_scores(tmp_path):
    rows = [{"image": "0000", "sample": "a"}, {"image": "0001", "sample": "b", "loss": 0.25}]
    write_metrics(tmp_path, {"mean": {"loss": 0.25}}, rows)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "image,sample,loss",
        "0000,a,",
        "0001,b,0.25",
        "mean,,0.25",
    ]


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\uff1d"])
def test_write_metrics_writes_formulas_as_text_and_numbers_as_numbers(tmp_path, begin):
    name = f"{begin}HYPERLINK(1)"
    rows = [{"image": "0000", "source": name, name: -1.5}, {"image": "-7", "source": "a" + name, name: -1e-9}]
    write_metrics(tmp_path, {"mean": {name: -2.0}}, rows)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        cells = list(csv.reader(file))
    assert cells[0] == ["image", "source", f"'{name}"]
    assert cells[1:] == [["0000", f"'{name}", "-1.5"], ["-7", f"a{name}", "-1e-09"], ["mean", "", "-2.0"]]
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == rows


@pytest.mark.parametrize("begin", ["\t", "\r", "\n", "a\r", "a\r\n"])
def test_write_metrics_escapes_tabs_and_line_breaks(tmp_path, begin):
    write_metrics(tmp_path, {"mean": {}}, [{"image": f"{begin}=1+1", "loss": 1}])
    lines = (tmp_path / "metrics.csv").read_bytes().splitlines()
    assert lines[1:] == [repr(begin)[1:-1].encode() + b"=1+1,1", b"mean,"]


def test_format_confusion_fits_100_columns():
    counts = np.diag(np.arange(12))
    counts[1, 0] = 3
    names = ["background", *(f"class {k}" for k in range(1, 12))]
    head, first, second, *_ = format_confusion(counts[:4, :4], names[:4]).splitlines()
    assert head.split() == ["label", "background", "class", "1", "class", "2", "class", "3"]
    assert first == "background" and second.split() == ["class", "1", "75.0", "25.0", "0.0", "0.0"]
    head, _, second, *_, last = format_confusion(counts, names).splitlines()
    assert head.split() == ["label", *map(str, range(12))] and len(head) <= 100
    assert second.startswith("1 class 1 ") and last.split()[-1] == "100.0"
    assert format_confusion(np.eye(30), [str(k) for k in range(30)]) == ""


def test_meanings_of_scores_are_those_of_the_docs():
    text = (ROOT / "docs" / "test-and-scores.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([01]) \| (.+) \|$", text, re.MULTILINE)
    assert {name: (int(best), meaning) for name, best, meaning in rows} == MEANINGS
    assert meaning_of("dice_my_class") == MEANINGS["dice_NAME"][1] and LOW_IS_GOOD[0] == "loss"
