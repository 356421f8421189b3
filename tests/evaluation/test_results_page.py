import json
import re
from html.parser import HTMLParser

import numpy as np
import pages
import pytest

from evaluation.pictures import save_images, wrong_pixels
from evaluation.results_page import Card, link_to, write_index
from evaluation.tables import MEANINGS

VOID = {"meta", "link", "img", "input", "line"}


class Outline(HTMLParser):
    """Collects images, links, texts and order of the cards, and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.cards, self.text = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            self.images.append(attrs["src"])
        if tag == "a":
            self.links.append(attrs["href"])
        if tag == "article":
            self.cards.append(attrs["data-image"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def outline(folder):
    return Outline((folder / "index.html").read_text("utf-8"))


def table_of(folder):
    """Text of the page on one line, without what the scores mean."""
    text = " ".join(outline(folder).text.split())
    for _, meaning in MEANINGS.values():
        text = text.replace(f" ?{meaning}", "")
    return text


def data_of(folder):
    text = (folder / "index.html").read_text("utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])


def test_page_is_complete_escaped_and_names_existing_pictures(tmp_path):
    save_images(tmp_path / "images", 0, {"input": np.zeros((2, 2), np.uint8), "output": np.zeros((2, 2), np.uint8)})
    nasty = "</script>'\x1b\udcff.tif"
    card = Card("0000", "00000.npy", (2, 2), {"loss": 0.5}, nasty)
    run = pages.run_of("a <i> & b", facts={"command": "python main.py '<x>'", "split": "test"})
    for _ in range(2):  # a second run writes the page anew
        write_index(tmp_path, tmp_path, run, pages.summary_of(), [card])
    text, page = (tmp_path / "index.html").read_text("utf-8"), outline(tmp_path)
    assert page.open == [] and text.startswith("<!DOCTYPE html>") and text.count("</html>") == 1
    assert page.images == ["images/0000-input.png"]
    assert "--label:" not in text and "--output: url(images/0000-output.png)" in text
    shown = "</script>'\\x1b\\udcff.tif"
    assert shown in page.text and "a <i> & b" in page.text and "'<x>'" in page.text
    assert data_of(tmp_path)["images"]["0000"]["title"] == shown


def test_page_needs_no_network(tmp_path):
    pages.write_two_classes(tmp_path)
    text = (tmp_path / "index.html").read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert "//" not in re.sub(r"^ *//.*| // .*", "", text, flags=re.MULTILINE)


def test_page_shows_the_worst_image_first_and_one_without_scores_last(tmp_path):
    cards = [
        Card(f"{k:04d}", f"{k}.npy", (2, 2), scores)
        for k, scores in enumerate([{"pixel_error": 0.1}, {}, {"pixel_error": 0.3}, {"pixel_error": 0.2}])
    ]
    save_all = {"input": np.zeros((2, 2), np.uint8)}
    for k in range(4):
        save_images(tmp_path / "images", k, save_all)
    write_index(tmp_path, tmp_path, pages.run_of(), pages.summary_of(), cards)
    assert outline(tmp_path).cards == ["0002", "0003", "0000", "0001"]


@pytest.mark.parametrize("cards", [[], None])
def test_page_without_labels_has_no_scores_and_no_charts(tmp_path, cards):
    save_images(tmp_path / "images", 0, {"input": np.zeros((2, 2), np.uint8)})
    cards = [Card("0000", "0.npy", (2, 2), {})] if cards is None else cards
    write_index(tmp_path, tmp_path, pages.run_of(), pages.summary_of() | {"mean": {}, "majority": {}}, cards)
    assert "No image has a label" in outline(tmp_path).text and outline(tmp_path).open == []
    assert 'data-layer="errors"' not in (tmp_path / "index.html").read_text()


def test_page_shows_both_baselines_and_the_confusion_matrix(tmp_path):
    pages.write_three_classes(tmp_path)
    text = outline(tmp_path).text
    assert '<svg id="chart"' not in (tmp_path / "index.html").read_text()  # of a single image
    assert "all background" in text and "Otsu" not in text and "Percent of the pixels" in text
    assert re.search(r"nucleus\s+0\.0\s+50\.0\s+50\.0", text)
    write_index(tmp_path, tmp_path, pages.run_of(), pages.summary_of() | {"baseline_otsu": {"pixel_error": 0.07}}, [])
    assert re.search(r"pixel_error\s+0\.0500\s+0\.1000\s*0\.0700", table_of(tmp_path))


def test_page_says_over_how_many_images_a_mean_is(tmp_path):
    fewer = {"mean": {"v_rand": 3}, "baseline_otsu": {"v_rand": 2}}
    means = {"mean": {"ap": 0.5, "v_rand": 0.25}, "majority": {"ap": 0.5}, "baseline_otsu": {"v_rand": 0.125}}
    summary = pages.summary_of() | means | {"num_labelled": 4, "scored_images": fewer}
    write_index(tmp_path, tmp_path, pages.run_of(), summary, [])
    assert "v_rand 0.2500 (3 of 4 images) 0.1250 (2 of 4 images) ap 0.5000 0.5000 Images" in table_of(tmp_path)


def test_scale_bar_has_a_round_length_and_needs_a_pixel_size():
    assert Card("0000", "", (100, 400), {}, pixel_size=(0.1, 0.1)).scale_bar == (25.0, "10 µm")
    assert Card("0000", "", (100, 512), {}, pixel_size=(0.004, 0.004)).scale_bar[1] == "500 nm"
    assert Card("0000", "", (100, 400), {}).scale_bar is None


def test_link_to_checkpoints_of_any_name(tmp_path):
    assert link_to(tmp_path / "a b" / "ü#1.pth", tmp_path / "results" / "x") == "../../a%20b/%C3%BC%231.pth"


def test_wrong_pixels_are_counted_for_each_threshold():
    rng = np.random.default_rng(0)
    inside, output = rng.integers(0, 2, (40, 30)).astype(bool), rng.integers(0, 256, (40, 30)).astype(np.uint8)
    valid = rng.integers(0, 2, (40, 30)).astype(bool)
    for mask in (None, valid):
        chosen = np.ones_like(inside) if mask is None else mask
        expected = [int(((output > k) != inside)[chosen].sum()) for k in range(256)]
        assert wrong_pixels(inside, output, mask) == expected
