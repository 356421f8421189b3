"""What a database shows of itself: each warning on data made to deserve it, and none on data that are right."""

import numpy as np
import pytest

from description import Origin, describe
from evaluation.database_page import write_database_page
from evaluation.review import review
from samples import IGNORE, write_sample

RNG = np.random.default_rng(0)
VALUES = (0, 255)
EMPTY = np.zeros((48, 48), np.uint8)


def sample(bright=True, size=6, num=25):
    """Image and label of 48 px with squares, brighter or darker than what is around them."""
    label = np.zeros((48, 48), np.uint8)
    for number in range(num):
        top, left = 2 + 9 * (number // 5), 2 + 9 * (number % 5)
        label[top : top + size, left : left + size] = 1
    image = 100 + RNG.normal(0, 5, label.shape) + label * (60.0 if bright else -60.0)
    return image.clip(0, 255).astype(np.uint8), label


def made(tmp_path, splits, values=VALUES, change=lambda info: info):
    """Review of a database with these samples."""
    files = {}
    for split, samples in splits.items():
        (tmp_path / split).mkdir(exist_ok=True)
        files[split] = [tmp_path / split / f"{number:05d}.npy" for number in range(len(samples))]
        for path, (image, label) in zip(files[split], samples, strict=True):
            write_sample(path, image, label)
    info = describe(((image[..., None], label) for image, label in splits["train"]), list(values))
    return review(info, files, lambda split: {f"{n:05d}.npy": Origin(f"{split}-{n}.tif") for n in range(99)})


def test_review_of_right_data_warns_of_nothing(tmp_path):
    found = made(tmp_path, {"train": [sample() for _ in range(4)], "val": [sample()], "test": [sample()]})
    assert found.warnings == []
    assert found.shares("train") == pytest.approx([1 - 900 / 48**2, 900 / 48**2]) and found.annotated("train") == 1
    assert found.areas(1).tolist() == [36] * 150
    edges, lines = found.histogram()
    middle = (edges[1:] + edges[:-1]) / 2
    assert [round(float((middle * line).sum()), -1) for line in lines] == [100, 160]


WRONG = {
    "val lacks a class": (
        {"val": [(sample()[0], np.zeros((48, 48), np.uint8))]},
        "no validation sample has class 1 (255)",
    ),
    "one training image": ({"train": [sample()]}, "one training image"),
    "few objects": ({"train": [sample(num=9), sample(num=10)]}, "fewer than 20 objects to learn from: annotate"),
    "turned label": (
        {"train": [sample(), sample(), sample(), sample(), sample(bright=False)]},
        "but not in train-4.tif",
    ),
    "thin objects": ({"train": [sample(size=1), sample()]}, "25 of 75 objects are narrower than 2 px"),
}


@pytest.mark.parametrize("name", WRONG)
def test_review_warns_in_words(tmp_path, name):
    splits, words = WRONG[name]
    warnings = made(tmp_path, {"train": [sample(), sample()], "val": [sample()]} | splits).warnings
    assert [words in line for line in warnings] == [True], warnings


def test_review_names_copies_between_splits(tmp_path):
    one = sample()
    warnings = made(tmp_path, {"train": [one, sample()], "test": [sample(), one]}).warnings
    assert len(warnings) == 1 and "1 image(s) of test lie in train, too (test-1.tif)" in warnings[0]


def test_review_names_classes_of_hardly_a_pixel(tmp_path):
    splits = {"train": [sample(), sample()], "val": [sample()]}
    splits["train"][0][1][0, 0] = 2
    splits["val"][0][1][0, 0] = 2
    rare = made(tmp_path, splits, (0, 128, 255)).warnings
    assert not rare  # 2 of 6912 pixels are more than one of 10,000
    large = [tuple(np.tile(array, (4, 4)) for array in sample()) for _ in range(2)]
    large[0][1][0, 0] = 2
    warnings = made(tmp_path, {"train": large}, (0, 128, 255)).warnings
    assert len(warnings) == 1 and "classes 255 (1 px) have hardly a pixel" in warnings[0]


def test_review_counts_what_is_annotated(tmp_path):
    image, label = sample()
    label[24:] = IGNORE
    found = made(tmp_path, {"train": [(image, label), sample()]})
    assert found.annotated("train") == 0.75 and found.shares("train")[1] == pytest.approx(1380 / (1.5 * 48**2))


def test_database_page_shows_what_is_wrong_and_the_pairs(tmp_path):
    found = made(tmp_path, {"train": [sample(), sample()], "val": [(sample()[0], np.zeros((48, 48), np.uint8))]})
    write_database_page(tmp_path, found, {"type": "<uint8>"})
    page = (tmp_path / "index.html").read_text("utf-8")
    assert "&lt;uint8&gt;" in page and "no validation sample has class 1 (255)" in page
    assert page.count('class="flat"') == 3 and page.count("data:image/png;base64,") == 6
    assert "http" not in page.replace("http://www.w3.org", "")
