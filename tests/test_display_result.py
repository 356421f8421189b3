import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from display_result import find_images, main, read_metrics
from evaluation.pictures import COLOURS, COLOURS_OF_SEVERAL, label_picture, save_images
from evaluation.tables import RESULTS
from exchange import atomic_folder

GREYS = {"input": 60, "label": 130, "output": 220}


@pytest.fixture
def results(work):
    """Three results of different size, the second without a label."""
    folder = work / "results" / "unet" / "em"
    folder.mkdir(parents=True)
    for number, size in ((0, 30), (1, 40), (10, 30)):
        pictures = {kind: np.full((size, size), grey, np.uint8) for kind, grey in GREYS.items()}
        if number == 1:
            del pictures["label"]
        save_images(folder / "images", number, pictures)
    return folder


def counts(path):
    """How many pixels of a figure have the grey value of each kind."""
    with Image.open(path) as figure:
        pixels = np.asarray(figure.convert("L"))
    return {kind: int((pixels == grey).sum()) for kind, grey in GREYS.items()}


def test_figure_is_written_next_to_the_page(results, capsys):
    assert main(["--dir_result", "./results", "--scope", "unet", "--name_data", "em", "--num", "5"]) == 0
    shown = counts(results / "figure.png")
    assert shown["input"] == pytest.approx(shown["output"], rel=0.01) and shown["input"] > 3 * 200 * 200
    assert shown["label"] == pytest.approx(shown["input"] * 2 / 3, rel=0.01)
    assert "figure of 3 images" in capsys.readouterr().out
    assert not (results / ".lock").exists()


def test_show_without_a_display_says_where_the_figure_is(results, capsys):
    matplotlib.use("Agg")  # which matplotlib chooses there
    assert main(["--num", "1", "--show"]) == 0
    error = capsys.readouterr().err
    assert "no window" in error and "figure.png" in error and error.count("\n") == 1


def test_num_images_are_shown(results, fails):
    assert main(["--num", "1", "--save", "one.png"]) == 0
    assert main(["--num", "40", "--save", "all.png"]) == 0
    assert counts("all.png")["input"] == pytest.approx(3 * counts("one.png")["input"], rel=0.02)
    for num in ("0", "41", "1000000000"):
        assert "must lie in [1, 40]" in fails(main, ["--num", num], status=2)


@pytest.mark.parametrize(("name", "begin"), [("a.pdf", b"%PDF"), ("b.svg", b"<?xml"), ("new/c.jpg", b"\xff\xd8\xff")])
def test_save_writes_other_types(results, name, begin, tmp_path):
    assert main(["--save", str(tmp_path / name), "--num", "1"]) == 0
    assert (tmp_path / name).read_bytes().startswith(begin)


def test_find_images_sorts_by_number(results):
    columns = find_images(results / "images", 5)
    assert list(columns) == ["0000", "0001", "0010"]
    assert ["label" in files for files in columns.values()] == [True, False, True]


def test_title_is_not_typeset_by_matplotlib(results):
    shutil.move(results.parent, results.parent.with_name("$a^$\u4e00"))
    assert main(["--scope", "$a^$\u4e00"]) == 0


def test_pictures_that_are_large_or_of_other_modes_are_shown(results):
    Image.new("RGB", (3000, 20), (60, 60, 60)).save(results / "images" / "0000-input.png")
    for mode in ("LA", "1", "P", "I;16"):
        Image.new(mode, (20, 20)).save(results / "images" / "0000-label.png")
        assert main(["--num", "1"]) == 0
    assert counts(results / "figure.png")["input"] > 0


def replace_killed(argv):
    """Replace results, and end the process before the old pictures are moved away."""
    rename = Path.rename
    Path.rename = lambda path, target: os._exit(9) if path.name == "images" else rename(path, target)
    with atomic_folder(argv[0], RESULTS, "") as folder:
        save_images(folder / "images", 7, {"output": np.full((20, 20), 100, np.uint8)})


def test_exchange_that_was_cut_off_is_completed_first(results, work, start):
    process = start(replace_killed, str(results))
    process.communicate()
    assert process.returncode == 9
    assert main([]) == 0
    assert [path.name for path in (results / "images").iterdir()] == ["0007-output.png"]


def png(*chunks):
    """Bytes of a PNG file."""
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def head(width, height):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        png((b"IHDR", b"\0\0")),  # ValueError: Truncated IHDR chunk
        png(head(4, 4), (b"abcd", b""))[:-12] + b"\0\0\0\1\1\2\3\4" * 3,  # SyntaxError: broken PNG file
        png(head(60000, 60000), (b"IDAT", zlib.compress(b"0" * 99)), (b"IEND", b"")),  # DecompressionBombError
        png(head(40, 40), (b"IDAT", zlib.compress(b"0" * 99)[:9]), (b"IEND", b"")),
    ],
    ids=["empty", "short head", "no chunk", "bomb", "cut off"],
)
def test_picture_that_is_damaged_is_one_line(results, fails, content):
    (results / "images" / "0000-output.png").write_bytes(content)
    assert "0000-output.png: can't be read" in fails(main, [])


def test_picture_that_is_no_file_is_one_line(results, fails):
    path = results / "images" / "0000-output.png"
    path.unlink()
    os.mkfifo(path)
    assert "0000-output.png: not a file" in fails(main, [])


def test_picture_that_is_a_link_to_nothing_is_left_out(results):
    path = results / "images" / "0000-output.png"
    path.unlink()
    path.symlink_to("nothing")
    assert main([]) == 0


def test_flags_that_are_bad_are_one_line_and_overwrite_no_result(results, fails):
    assert "main.py --mode test" in fails(main, ["--name_data", "none"])
    for name in ("a.xyz", "a", "a.pgf"):
        assert "can't write this type" in fails(main, ["--save", name])
    assert "--scope" in fails(main, ["--scope", "../x"], status=2)
    target = results / "images" / "0000-input.png"
    before = target.read_bytes()
    assert "one of the results" in fails(main, ["--save", str(target)])
    (results / "link.png").symlink_to(results / "link.png")
    assert "cannot write" in fails(main, ["--save", str(results / "link.png" / "a.png")])
    assert target.read_bytes() == before


def write_metrics(folder, classes=("a", "b"), foreground="b", **errors):
    """A metrics.json of a test with a pixel error for each image."""
    dice = {f"dice_{name}": 0.5 / (k or 2) for k, name in enumerate(classes)}
    rows = [{"image": f"{int(name[1:]):04d}", "pixel_error": error} | dice for name, error in errors.items()]
    rows.append({"image": "0001", "sample": "00001.npy"})  # without a label
    classes = {name: k for k, name in enumerate(classes)}
    summary = {"classes": classes, "foreground": foreground, "background": "a"}
    (folder / "metrics.json").write_text(json.dumps(summary | {"images": rows}))


def pixels_of(path, colour):
    """How many pixels of a figure have a colour."""
    with Image.open(path) as figure:
        return int((np.asarray(figure.convert("RGB")) == colour).all(-1).sum())


def test_overlay_shows_missed_and_added_pixels(results):
    label, output = np.zeros((2, 30, 30), np.uint8)
    label[:10], output[20:] = 255, 255  # a third is missed, another added
    save_images(results / "images", 0, {"label": label, "output": output})
    assert main(["--num", "1", "--save", "plain.png"]) == main(["--num", "1", "--overlay", "on"]) == 0
    assert not any(pixels_of("plain.png", colour) for colour in COLOURS.values())
    missed, added = (pixels_of(results / "figure.png", colour) for colour in COLOURS.values())
    assert missed == pytest.approx(added, rel=0.1) and missed > 330 * 330 / 3


def test_overlay_of_several_classes_has_the_colours_of_the_page(results):
    label, output = np.zeros((2, 30, 30), np.uint8)
    label[:20], output[10:20], output[20:] = 1, 2, 1  # a third each is missed, of another class, and added
    save_images(results / "images", 0, {"label": label_picture(label, 3), "output": label_picture(output, 3)})
    assert main(["--num", "1", "--overlay", "on"]) == 0
    sizes = {name: pixels_of(results / "figure.png", colour) for name, colour in COLOURS_OF_SEVERAL.items()}
    assert sizes["confused"] == pytest.approx(sizes["output"], rel=0.1) and sizes["output"] > 330 * 330 / 3


def test_legend_names_classes_and_not_annotated(results):
    label = label_picture(np.zeros((30, 30), np.uint8), 4)
    save_images(results / "images", 0, {"label": label, "output": label})
    write_metrics(results, classes=["a", "_b", "$c", "d" * 50], foreground=None)

    def filled(colour):
        return f"fill: {colour}; stroke: #000000" in Path("a.svg").read_text()  # patches alone have both

    assert main(["--num", "1", "--save", "a.svg"]) == 0
    assert filled("#e69f00") and filled("#009e73") and not filled("#808080")  # classes that no picture shows
    label[:5] = 128
    save_images(results / "images", 0, {"label": label})
    assert main(["--num", "1", "--save", "a.svg"]) == 0
    assert filled("#808080") and not filled("#ffffff")
    assert main(["--num", "1", "--save", "a.svg", "--overlay", "on"]) == 0
    assert filled("#808080") and filled("#ffffff")


def test_overlay_does_without_scores_label_and_input(results, fails):
    (results / "images" / "0010-input.png").unlink()
    assert main(["--overlay", "on"]) == 0
    for number in ("0000", "0010"):
        (results / "images" / f"{number}-label.png").rename(f"{number}.png")
    assert main(["--overlay", "on", "--save", "short.png"]) == 0
    with Image.open(results / "figure.png") as whole, Image.open("short.png") as short:
        assert short.height < 0.7 * whole.height  # three rows, not five
    Image.new("L", (20, 20)).save(results / "images" / "0000-label.png")
    assert "image 0000: its pictures differ in size" in fails(main, ["--overlay", "on"])
    assert main([]) == 0


def test_worst_images_have_the_highest_pixel_error(results, fails):
    assert "no scores in" in fails(main, ["--worst"])
    write_metrics(results, i0=0.1, i10=0.2)
    save_images(results / "images", 10, {"output": np.full((30, 30), 99, np.uint8)})
    assert main(["--worst", "--num", "1", "--save", "worst.png"]) == 0
    assert main(["--num", "1", "--save", "first.png"]) == 0
    assert pixels_of("worst.png", (99,) * 3) > 300 * 300 > 99 > pixels_of("first.png", (99,) * 3)
    metrics = read_metrics(results)
    assert metrics.worst(results) == ["0010", "0000"]
    assert metrics.title("0010") == "0010\npixel error 0.2000, Dice 0.500" and metrics.title("0001") == "0001"


def test_title_is_the_short_unique_name_of_the_file(results):
    sources = ["cell.tif", "d" * 40 + ".tif", "d" * 41 + ".tif", ""]
    rows = [{"image": f"{k:04d}", "sample": "", "source": source} for k, source in enumerate(sources)]
    (results / "metrics.json").write_text(json.dumps({"images": rows}))
    short = "d" * 12 + "\u2026" + "d" * 7 + ".tif"
    titles = [read_metrics(results).file(row["image"]) for row in rows]
    assert titles == ["cell.tif", f"0001 {short}", f"0002 {short}", "0003"]
    assert main([]) == 0


@pytest.mark.parametrize(
    ("classes", "foreground", "dice"), [(("cell_border", "cell"), "cell", 0.5), (("a", "b", "c"), None, 1 / 3)]
)
def test_title_has_the_dice_of_the_foreground_or_the_mean(results, classes, foreground, dice):
    write_metrics(results, classes, foreground, i0=0.1)
    assert read_metrics(results).title("0000").endswith(f"Dice {dice:.3f}")


@pytest.mark.parametrize("text", ["{", "[]", '{"images": [1]}', '{"images": null}'])
def test_read_metrics_of_damaged_scores_is_one_line(results, fails, text):
    (results / "metrics.json").write_text(text)
    for flags in ([], ["--worst"]):
        assert "metrics.json: can't be read" in fails(main, flags)
