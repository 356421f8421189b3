import csv
import json

from evaluation.page import write_metrics


def test_metrics_are_written_as_json_and_csv(tmp_path):
    rows = [{"image": "0000", "sample": "a", "dice_cell": 0.5}, {"image": "0001", "sample": "b"}]
    write_metrics(tmp_path, {"mean": {"dice_cell": 0.5}}, rows)
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == rows
    table = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [(row["image"], row["dice_cell"]) for row in table] == [("0000", "0.5"), ("0001", ""), ("mean", "0.5")]


def test_the_first_image_may_lack_scores_that_others_have(tmp_path):
    rows = [{"image": "0000", "sample": "a"}, {"image": "0001", "sample": "b", "loss": 0.25}]
    write_metrics(tmp_path, {"mean": {"loss": 0.25}}, rows)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "image,sample,loss",
        "0000,a,",
        "0001,b,0.25",
        "mean,,0.25",
    ]
