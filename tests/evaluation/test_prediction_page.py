import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import finish
from PIL import Image
from test_ensemble import INFO, write_network

import main
from images.drawing import outlines
from prediction.digits import ObjectNumbers
from prediction.preview import BLACK, WHITE, PreviewMaker, uncertainty

PREDICT = ["--mode", "predict", "--gpu_ids", "-1", "--tta", "off", "--amp", "off", "--input", "raw", "--output"]


@pytest.fixture
def raw(work):
    """A network, and a folder of three images."""
    write_network("unet", {"nch_ker": 2}, INFO)
    (work / "raw").mkdir()
    for k, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (3, 160, 80)).astype(np.uint8)):
        tifffile.imwrite(f"raw/image_{k}.tif", pixels if k else np.kron(pixels, np.ones((8, 8), np.uint8))[:160, :80])
    return work


def page_of(folder):
    """Text of a page, and its data."""
    text = Path(folder, "index.html").read_text("utf-8")
    return text, json.loads(re.search(r'id="data">(.*?)</script>', text)[1])


def test_prediction_page_shows_the_most_uncertain_image_first_and_all_objects(raw, capsys):
    assert main.main([*PREDICT, "out", "--what", "probability,cells"]) == 0
    text, data = page_of("out")
    order = re.findall(r'data-image="(\d+)"', text)
    values = [data["images"][image]["scores"]["uncertainty"] for image in order]
    assert values == sorted(values, reverse=True) and len(order) == 3
    p = np.asarray(Image.open(f"out/image_{int(order[0])}-probability.png")) / 255
    assert values[0] == pytest.approx(uncertainty(p[None]).mean(), abs=0.01)
    num = [len(np.unique(np.asarray(Image.open(f"out/image_{k}-cells.png")))) - 1 for k in range(3)]
    assert [data["images"][f"{k:04d}"]["scores"]["objects"] for k in range(3)] == num
    assert f"3 images; {sum(num)} cell." in " ".join(text.split()) and "Sizes of the objects" in text
    assert text.count("data:image/png") == 6
    capsys.readouterr()
    assert main.main([*PREDICT, "out", "--what", "probability"]) == 0  # whose pictures have other names
    assert "replaced 1 older" in capsys.readouterr().out
    assert "Sizes of the objects" not in page_of("out")[0]


def test_prediction_page_is_only_for_a_folder_and_replaces_no_other_file(raw, fails):
    assert main.main([*PREDICT, "off", "--page", "off"]) == main.main([*PREDICT, "out.npy"]) == 0
    assert not [*raw.rglob("index.html")]
    (raw / "off" / "index.html").write_text("mine")
    line = fails(main.main, [*PREDICT, "off"])
    assert "index.html: not a page of predict, and not replaced" in line
    assert (raw / "off" / "index.html").read_text() == "mine"


def test_prediction_page_of_two_processes_is_that_of_one(raw, together):
    assert main.main([*PREDICT, "one", "--what", "cells"]) == 0
    finish(together(2, *PREDICT, "two", "--what", "cells"))
    assert page_of("one")[1] == page_of("two")[1]


def test_prediction_page_shows_a_large_image_small(monkeypatch, raw):
    monkeypatch.setattr("prediction.preview.SIDE", 30)
    made = []
    monkeypatch.setattr(
        PreviewMaker, "finish", lambda self, old=PreviewMaker.finish: made.append(old(self)) or made[-1]
    )
    assert main.main([*PREDICT, "out", "--tile", "64"]) == 0
    for preview in made:
        whole = tifffile.imread(f"raw/image_{preview.frame}.tif")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(preview.picture))), whole[::6, ::6])
        assert Image.open(io.BytesIO(preview.outlines)).size == (14, 27) and preview.shape == (160, 80)


def test_numbers_of_objects_are_drawn_in_the_colours_of_a_palette():
    objects = np.zeros((40, 60), np.uint32)
    objects[5:25, 5:30] = 7
    drawn = outlines(objects).astype(np.uint8)
    ObjectNumbers().draw(drawn, objects, BLACK, WHITE)
    inside = drawn[8:22, 8:27]
    assert {*np.unique(inside)} == {0, BLACK, WHITE} and {*np.unique(drawn[26:])} == {0}


def test_uncertainty_is_one_where_all_classes_are_as_likely():
    assert uncertainty(np.full((3, 1, 2), 1 / 3)) == pytest.approx(np.ones((1, 2)))
    assert uncertainty(np.array([[[1.0]], [[0.0]], [[0.0]]])).tolist() == [[0.0]]
    assert uncertainty(np.array([[[0.11]]]))[0, 0] == pytest.approx(0.4999, abs=1e-3)  # entropy in bit
