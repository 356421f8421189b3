import csv
import json
from html.parser import HTMLParser

import numpy as np

from evaluation.page import format_confusion, write_index, write_metrics
from evaluation.pictures import save_images


class Outline(HTMLParser):
    """Collects tags and images, and checks that tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_escaped_and_names_only_pictures_that_are_there(tmp_path):
    save_images(tmp_path / "images", 0, {"input": np.zeros((2, 2), np.uint8), "output": np.zeros((2, 2), np.uint8)})
    rows = [{"image": "0000", "sample": "<b>&.npy", "loss": 0.5}, {"image": "mean", "sample": "", "loss": 0.5}]
    for _ in range(2):  # a second run writes the page anew
        write_index(tmp_path, "a <i> & b", rows, {"command": "python main.py '<x>'"})
    text = (tmp_path / "index.html").read_text()
    page = Outline()
    page.feed(text)
    assert page.open == []
    assert page.images == ["images/0000-input.png", "images/0000-output.png"]
    assert text.startswith("<!DOCTYPE html>") and text.count("</html>") == 1
    assert "<b>&.npy" in page.text and "a <i> & b" in page.text and "'<x>'" in page.text


def test_metrics_are_written_as_json_and_csv(tmp_path):
    rows = [{"image": "0000", "sample": "a", "dice_cell": 0.5}, {"image": "0001", "sample": "b"}]
    write_metrics(tmp_path, {"mean": {"dice_cell": 0.5}}, rows)
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == rows
    table = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [(row["image"], row["dice_cell"]) for row in table] == [("0000", "0.5"), ("0001", ""), ("mean", "0.5")]


def test_the_first_image_may_lack_scores_that_others_have(tmp_path):
    rows = [{"image": "0000", "sample": "a"}, {"image": "0001", "sample": "b", "loss": 0.25}]
    write_metrics(tmp_path, {"mean": {"loss": 0.25}}, rows)
    write_index(tmp_path, "title", rows, {})
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "image,sample,loss",
        "0000,a,",
        "0001,b,0.25",
        "mean,,0.25",
    ]
    assert "<th>loss</th>" in (tmp_path / "index.html").read_text()


def test_a_confusion_matrix_is_printed_in_at_most_100_columns():
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
