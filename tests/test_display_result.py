import numpy as np
import pytest
from PIL import Image

from display_result import find_images, main
from report import save_images


@pytest.fixture
def results(work):
    """Three results of different size, the second without a label."""
    folder = work / "results" / "unet" / "em"
    folder.mkdir(parents=True)
    for number, size in ((0, 30), (1, 40), (10, 30)):
        pictures = {kind: np.full((size, size), 200, np.uint8) for kind in ("input", "label", "output")}
        if number == 1:
            del pictures["label"]
        save_images(folder / "images", number, pictures)
    return folder


def test_the_figure_is_written_beside_the_page(results, capsys):
    assert main(["--dir_result", "./results", "--scope", "unet", "--name_data", "em", "--num", "5"]) == 0
    with Image.open(results / "figure.png") as figure:
        assert min(figure.size) > 500
        assert len(np.unique(np.asarray(figure))) > 2
    assert "figure of 3 images" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.pdf", "b.svg", "new/c.jpg"])
def test_other_types_are_written(results, name, tmp_path):
    assert main(["--save", str(tmp_path / name), "--num", "1"]) == 0
    assert (tmp_path / name).stat().st_size > 1000


def test_columns_are_in_the_order_of_their_numbers(results):
    columns = find_images(results / "images", 5)
    assert [column["output"].name[:4] for column in columns] == ["0000", "0001", "0010"]
    assert ["label" in column for column in columns] == [True, False, True]


def test_bad_input_is_one_line(results, fails):
    assert "main.py --mode test" in fails(main, ["--name_data", "none"])
    assert "no such type" in fails(main, ["--save", "a.xyz"])
    assert "no such type" in fails(main, ["--save", "a"])
    assert "--scope" in fails(main, ["--scope", "../x"])
    (results / "images" / "0000-output.png").write_bytes(b"")
    assert "0000-output.png" in fails(main, [])
