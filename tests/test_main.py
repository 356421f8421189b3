import csv
import html
import json
import re
import resource
import shlex
import shutil

import numpy as np
import pytest
import tifffile
import torch
from conftest import SHARED, SMALL, needs_golden, write_stacks
from PIL import Image

import display_result
import main
import run_make_database
from arguments import parse
from config import Config
from model import UNet
from predict import load, predict_array
from samples import IGNORE, write_sample

TEST = ["--mode", "test", "--gpu_ids", "-1"]


def snapshot(work):
    """Every file but the log, which a training may open before it meets a bad sample."""
    files = (path for path in work.rglob("*") if path.is_file() and "log" not in path.parts)
    return {path: path.read_bytes() for path in files}


def test_commands_run_end_to_end(trained, work, capsys):
    assert main.main(TEST) == 0
    assert display_result.main(["--num", "5"]) == 0
    folder = work / "results" / "unet" / "em"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    pictures = [f"images/0000-{kind}.png" for kind in ("input", "label", "objects", "output")]
    assert names == ["figure.png", *pictures, "index.html", "metrics.csv", "metrics.json"]
    sample = np.load(trained / "test" / "00000.npy")
    with Image.open(folder / "images" / "0000-input.png") as picture:
        assert np.array_equal(np.asarray(picture), sample["input"][..., 0])
    with Image.open(folder / "images" / "0000-label.png") as picture:
        assert np.array_equal(np.asarray(picture), sample["label"] * 255)
    scores = json.loads((folder / "metrics.json").read_text())
    assert scores["foreground"] == "cell" and scores["classes"] == {"membrane": 0, "cell": 255}
    share = (sample["label"] == 1).mean()
    assert scores["majority"]["dice_cell"] == pytest.approx(2 * share / (1 + share))
    assert scores["mean"]["dice_cell"] == scores["images"][0]["dice_cell"]
    assert (scores["images"][0]["sample"], scores["images"][0]["source"]) == ("00000.npy", "train-volume.tif, page 8")
    assert ">train-volume.tif, page 8</h3>" in (folder / "index.html").read_text()
    out = capsys.readouterr().out
    otsu = next(line for line in out.splitlines() if line.startswith("otsu"))
    assert f" {scores['baseline_otsu']['pixel_error']:.4f} " in otsu and "percentage" not in out
    assert "dice_membrane" in out and "all cell" in out and "foreground is cell" in out


def test_pictures_fit_the_scores(trained, work):
    assert main.main(TEST) == 0
    folder = work / "results" / "unet" / "em"
    label, output = (np.asarray(Image.open(folder / "images" / f"0000-{kind}.png")) for kind in ("label", "output"))
    scores = json.loads((folder / "metrics.json").read_text())
    error = np.mean((output > 255 * scores["pixel_threshold"]) != (label > 0))
    assert error == pytest.approx(scores["mean"]["pixel_error"], abs=0.02)
    assert scores["challenge"]["min_pixel_error"] <= scores["mean"]["pixel_error"] + 1e-9


@pytest.mark.parametrize(("supported", "computed"), [(True, "bf16"), (False, "off")])
def test_amp_of_test_and_predict_is_16_bits_where_the_processor_can(trained, work, monkeypatch, supported, computed):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": supported})
    found = {}
    for flags in ([], ["--amp", computed], ["--amp", "off"]):
        assert main.main([*TEST, *flags]) == 0
        scores = json.loads((work / "results" / "unet" / "em" / "metrics.json").read_text())
        found[tuple(flags)] = scores["precision"], scores["mean"]["loss"]
    precision = "bfloat16" if supported else "float32"
    assert found[()] == found["--amp", computed] and found[()][0] == precision
    assert (found[()] == found["--amp", "off"]) != supported
    assert found[()][1] == pytest.approx(found["--amp", "off"][1], abs=0.01)
    image = np.load(trained / "test" / "00000.npy")["input"][..., 0]
    np.save("in.npy", image)
    predict = ["--mode", "predict", "--gpu_ids", "-1", "--input", "in.npy", "--output", "out.npy", "--dtype", "float32"]
    assert main.main(predict) == 0
    path = work / "checkpoints" / "unet" / "em" / "model_epoch0001.pth"
    results = {amp: predict_array(load(path, amp=amp), image) for amp in ("auto", "bf16", "off")}
    assert np.array_equal(np.load("out.npy"), results["auto"]) and np.array_equal(results["auto"], results[computed])
    assert not np.array_equal(results["bf16"], results["off"])


def test_architecture_comes_from_the_checkpoint_of_the_epoch_flag(trained, work, capsys):
    assert main.main([*SMALL, "--num_epoch", "3", "--num_freq_save", "1", "--train_continue", "on"]) == 0
    capsys.readouterr()
    for flags, epoch in ((["--nch_ker", "64", "--norm", "inorm", "--epoch", "2"], 2), ([], 3)):
        assert main.main([*TEST, *flags]) == 0
        scores = json.loads((work / "results" / "unet" / "em" / "metrics.json").read_text())
        assert scores["epoch"] == epoch and scores["checkpoint"].endswith(f"model_epoch000{epoch}.pth")
        assert f"epoch {epoch};" in capsys.readouterr().out
        page = (work / "results" / "unet" / "em" / "index.html").read_text()
        assert f"model_epoch000{epoch}.pth" in page and "loss train" in page  # the curves of the log


def test_page_names_the_flags_of_the_training_as_they_are_typed(trained, work):
    assert main.main(TEST) == 0
    page = (work / "results" / "unet" / "em" / "index.html").read_text()
    facts = dict(re.findall(r'<tr><th scope="row">(--\w+)</th><td>(.*?)</td></tr>', page))
    typed = [html.unescape(part) for fact in facts.items() for part in fact]
    assert parse(Config, typed, None) == parse(Config, [*SMALL, "--num_epoch", "1"], None)
    command = next(line for line in re.findall(r"<pre.*?>(.*?)</pre>", page) if "--nch_ker" in line)
    assert command.startswith("python main.py ") and len(command.split()) == 2 + len(SMALL) + 2
    assert parse(Config, shlex.split(html.unescape(command))[2:], None) == parse(Config, typed, None)


def test_names_in_files_and_of_files_do_not_steer_the_terminal(trained, work, capfd):
    info = json.loads((trained / "dataset.json").read_text()) | {"class_names": ["membrane", "ce\x1b[31mll"]}
    (trained / "dataset.json").write_text(json.dumps(info))
    assert main.main([*SMALL, "--num_epoch", "1"]) == 1
    (work / "a\x1b[31m.png").write_text("no image")
    predict = ["--mode", "predict", "--gpu_ids", "-1"]
    assert main.main([*predict, "--input", "a\x1b[31m.png", "--output", "b.npy"]) == 1
    assert main.main([*predict, "--input", "none\x9b\n.png", "--output", "b.npy"]) == 1
    texts = capfd.readouterr()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", texts.out + texts.err)
    assert r"ce\x1b[31mll" in texts.out + texts.err and r"a\x1b[31m.png" in texts.err


def test_mode_test_leaves_nothing_of_an_earlier_test(trained, work):
    assert main.main(TEST) == 0
    stale = work / "results" / "unet" / "em" / "images" / "0007-output.png"
    stale.touch()
    assert main.main(TEST) == 0
    assert not stale.exists()


def test_mode_test_of_samples_without_a_label_gives_input_and_output(trained, work, capsys):
    sample = np.load(trained / "test" / "00000.npy")
    write_sample(trained / "test" / "00001.npy", sample["input"][:33, :40].copy(), None)
    assert main.main(TEST) == 0
    names = {path.name for path in (work / "results" / "unet" / "em" / "images").iterdir()}
    assert "0001-output.png" in names and "0001-label.png" not in names
    assert run_make_database.main(["--label", "none", "--overwrite"]) == 0
    shutil.rmtree(work / "log")  # without curves, too
    assert main.main(TEST) == 0
    assert "No image has a label" in (work / "results" / "unet" / "em" / "index.html").read_text()
    assert "mean" in (work / "results" / "unet" / "em" / "metrics.csv").read_text()


def test_database_without_labels_is_tested_and_not_trained_on(trained, work, fails):
    shutil.copytree("checkpoints/unet/em", "checkpoints/unet/new")
    argv = ["--name_data", "new", "--input", "datasets/em/train-volume.tif", "--label", "none"]
    assert run_make_database.main(argv) == 0
    assert main.main([*TEST, "--name_data", "new"]) == 0
    assert len(list((work / "results" / "unet" / "new" / "images").glob("*-output.png"))) == 8
    assert "make one with --label" in fails(main.main, [*SMALL, "--name_data", "new"])
    assert "made with --label none" in fails(main.main, [*SMALL, "--name_data", "new", "--train_continue", "off"])


def test_partial_labels_are_tested_where_they_are_annotated(trained, work, capsys):
    assert main.main(TEST) == 0
    folder = work / "results" / "unet" / "em"
    full = json.loads((folder / "metrics.json").read_text())["images"][0]
    assert "annotated" not in full and "veil on what is not annotated" not in (folder / "index.html").read_text()
    info = json.loads((trained / "dataset.json").read_text()) | {"ignore": 128}
    (trained / "dataset.json").write_text(json.dumps(info))
    sample = np.load(trained / "test" / "00000.npy")
    left = np.broadcast_to(np.arange(48) < 18, (48, 48))
    labels = [np.full((48, 48), IGNORE), *(np.where(known, sample["label"], IGNORE) for known in (left, ~left))]
    for number, label in enumerate(labels):
        write_sample(trained / "test" / f"{number:05d}.npy", sample["input"], label)
    assert main.main(TEST) == 0
    nothing, first, second = json.loads((folder / "metrics.json").read_text())["images"]
    assert "loss" not in nothing and first["annotated"] == 18 / 48
    for score in ("loss", "pixel_error"):
        mean = first[score] * 18 / 48 + second[score] * 30 / 48
        assert mean == pytest.approx(full[score], abs=1e-12)
    with Image.open(folder / "images" / "0001-label.png") as picture:
        assert np.array_equal(np.asarray(picture), np.where(left, sample["label"] * 255, 128))
    assert (
        "veil on what is not annotated" in (folder / "index.html").read_text()
        and "not annotated" in capsys.readouterr().out
    )
    header, *rows = csv.reader((folder / "metrics.csv").read_text().splitlines())
    assert len(rows) == 4 and {len(row) for row in rows} == {len(header)}
    assert display_result.main([]) == 0


def test_output_of_one_class_is_warned_of(trained, work, capsys):
    path = work / "checkpoints" / "unet" / "em" / "model_epoch0001.pth"
    saved = torch.load(path)
    saved["average"]["net"]["fc.weight"].zero_()
    saved["average"]["net"]["fc.bias"].fill_(9.0)
    torch.save(saved, path)
    assert main.main(TEST) == 0
    assert "hint: all pixels are predicted as one class: " in capsys.readouterr().out


def test_partial_labels_are_validated_where_they_are_annotated(database, work, fails):
    info = json.loads((database / "dataset.json").read_text()) | {"ignore": 128}
    (database / "dataset.json").write_text(json.dumps(info))
    path = database / "val" / "00000.npy"
    sample = np.load(path)
    sample["label"][:, 20:] = IGNORE
    np.save(path, sample)
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    saved = torch.load(work / "checkpoints" / "unet" / "em" / "model_epoch0001.pth")
    assert saved["data"]["ignore"] == 128
    sample["label"] = IGNORE
    np.save(path, sample)
    message = fails(main.main, [*SMALL, "--num_epoch", "2", "--train_continue", "on"])
    assert "00000.npy: no pixel is annotated" in message


@needs_golden
def test_pytorch_unet_checkpoint_and_layout_are_tested_and_trained_on(work):
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        (work / "datasets" / "em" / split).mkdir(parents=True)
        np.save(work / "datasets" / "em" / split / "input_000.npy", rng.integers(0, 256, (32, 32), np.uint8))
        np.save(work / "datasets" / "em" / split / "label_000.npy", rng.integers(0, 2, (32, 32), np.uint8) * 255)
    folder = work / "checkpoints" / "unet" / "em"
    folder.mkdir(parents=True)
    shutil.copy(SHARED / "golden" / "upstream" / "inorm_model_epoch0003.pth", folder / "model_epoch0003.pth")
    assert main.main(TEST) == 0
    shutil.copytree(folder, folder.parent / "new")
    argv = ["--name_data", "new", "--input", "datasets/em/test/input_000.npy", "--label", "none"]
    assert run_make_database.main(argv) == main.main([*TEST, "--name_data", "new"]) == 0
    flags = [*SMALL, "--num_level", "4", "--num_crop", "1", "--norm", "inorm", "--num_epoch", "4"]
    assert main.main([*flags, "--train_continue", "on"]) == 0
    saved = torch.load(folder / "model_epoch0004.pth")
    assert saved["optim"]["state"][0]["step"] == 4  # three of the original's and one of ours
    assert main.main(TEST) == 0


def _other_channels(data, _):
    shutil.rmtree(data)
    assert run_make_database.main(["--synthetic", "5", "--size", "48"]) == 0
    for file in data.glob("*/[0-9][0-9][0-9][0-9][0-9].npy"):
        sample = np.load(file)
        write_sample(file, np.repeat(sample["input"], 3, -1), sample["label"])
    info = json.loads((data / "dataset.json").read_text())
    info |= {"nch_in": 3, "mean": [0.0] * 3, "std": [1.0] * 3, "profile": None}
    (data / "dataset.json").write_text(json.dumps(info))


def _other_classes(data, _):
    info = json.loads((data / "dataset.json").read_text()) | {"class_values": [0, 1]}
    (data / "dataset.json").write_text(json.dumps(info))


def _truncated(_, checkpoints):
    for path in checkpoints.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:5000])


def _foreign(_, checkpoints):
    torch.save({"state_dict": {}}, checkpoints / "model_epoch0001.pth")


def _other_network(_, checkpoints):
    torch.save({"netG": {"enc1_1.weight": torch.zeros(3)}, "optimG": {}}, checkpoints / "model_epoch0001.pth")


def _other_weights(_, checkpoints):
    saved = torch.load(checkpoints / "model_epoch0001.pth")
    saved["arch"]["nch_out"] = 3
    torch.save(saved | {"average": None}, checkpoints / "model_epoch0001.pth")


def _broken_down(_, checkpoints):
    saved = torch.load(checkpoints / "model_epoch0001.pth")
    next(iter(saved["average"]["net"].values()))[0] = float("nan")
    torch.save(saved, checkpoints / "model_epoch0001.pth")


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def _evil(_, checkpoints):
    torch.save({"net": Evil()}, checkpoints / "model_epoch0001.pth")


def _truncated_sample(data, _):
    for file in data.glob("*/00000.npy"):
        file.write_bytes(file.read_bytes()[:-100])


def _class_beyond(data, _):
    for file in data.glob("*/00000.npy"):
        sample = np.load(file)
        sample["label"][0, 0] = 2
        np.save(file, sample)


TRAIN = [*SMALL, "--train_continue", "on", "--num_epoch", "2"]


@pytest.mark.parametrize("argv", [TEST, TRAIN, [*TRAIN, "--cache_gb", "0"]], ids=["test", "train", "stream"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data, _: shutil.rmtree(data), "run_make_database.py"),
        (lambda data, _: [file.unlink() for file in data.glob("*/*.npy")], "is empty"),
        (_other_channels, "nch_in 3"),
        (_other_classes, "class_values [0, 1]"),
        (_truncated_sample, "00000.npy"),
        (_class_beyond, "class index 2"),
        (_truncated, "truncated"),
        (_foreign, "another program"),
        (_other_network, "not those of this network"),
        (_other_weights, "not those of this network"),
        (_broken_down, "NaN or infinite weights"),
        (_evil, "could run code"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_lost(trained, work, fails, argv, spoil, words):
    main.main(TEST)
    checkpoints = work / "checkpoints" / "unet" / "em"
    spoil(trained, checkpoints)
    before = snapshot(work)
    assert words in fails(main.main, argv)
    assert snapshot(work) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--train_continue", "off", "--nch_in", "3"],
            "--nch_in 3: the images of the database have 1 channel(s): leave",
        ),
        (["--train_continue", "off", "--nch_out", "3"], "--nch_out 3: 2 classes need 1 or 2: leave it out"),
        (["--nch_ker", "8"], "--nch_ker 2: leave it out to resume that, or add --train_continue off"),
        (["--norm", "inorm"], "--norm bnorm: leave it out to resume that, or add --train_continue off"),
        (["--epoch", "7"], "no checkpoint of epoch 7"),
    ],
)
def test_flags_that_do_not_fit_the_database_or_checkpoint_are_refused(trained, fails, argv, words):
    assert words in fails(main.main, [*SMALL, "--num_epoch", "2", *argv])


def test_architecture_of_a_resumed_run_is_that_of_its_checkpoint(trained, work, capsys):
    flags = ["--gpu_ids", "-1", "--num_crop", "2", "--num_epoch", "2", "--train_continue", "on"]
    assert main.main(flags) == 0
    assert "note: --num_level 2 --nch_ker 2, as in the checkpoint" in capsys.readouterr().out
    saved = torch.load(work / "checkpoints" / "unet" / "em" / "model_epoch0002.pth")
    assert (saved["config"]["nch_ker"], saved["config"]["num_level"], saved["arch"]["nch_ker"]) == (2, 2, 2)


def test_crop_is_no_larger_than_the_largest_image(database, capsys):
    argv = ["--gpu_ids", "-1", "--nch_ker", "2", "--ny_load", "40", "--nx_load", "80", "--num_epoch", "1"]
    assert main.main(argv) == 0
    output = capsys.readouterr()
    assert "crops are 40 x 48 px" in output.out and "smaller" not in output.err


@pytest.mark.parametrize(
    ("shape", "crop", "is_small"),
    [
        ((32, 40), "32 x 32", False),
        ((12, 40), "12 x 40", False),
        ((40, 12), "40 x 12", False),
        ((9, 9), "12 x 12", True),
    ],
)
def test_crop_is_no_higher_and_no_wider_than_the_images(work, capsys, shape, crop, is_small):
    write_stacks(work / "datasets" / "em", shape=shape)
    assert run_make_database.main([]) == 0
    assert main.main([*SMALL, "--ny_load", "256", "--nx_load", "256", "--num_epoch", "1"]) == 0
    output = capsys.readouterr()
    assert f"crops are {crop} px" in output.out and ("smaller than the crop" in output.err) == is_small


def test_crop_larger_than_some_images_is_a_warning(work, capsys):
    argv = ["--name_data", "n", "--synthetic", "6", "--size", "48", "--phantom", "nuclei"]
    assert run_make_database.main(argv) == 0
    assert main.main([*SMALL, "--name_data", "n", "--ny_load", "256", "--nx_load", "256", "--num_epoch", "1"]) == 0
    assert "images are smaller than the crop of " in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--dir_log", "--dir_checkpoint"])
def test_dir_log_and_dir_checkpoint_are_tried_before_a_training_begins(database, work, fails, flag, monkeypatch):
    (work / "file").touch()
    monkeypatch.setattr(UNet, "forward", None)  # no step is taken
    assert "file" in fails(main.main, [*SMALL, "--num_epoch", "1", flag, str(work / "file")])


def test_dir_result_that_cannot_be_written_is_named(trained, work, fails):
    (work / "file").touch()
    assert "cannot write" in fails(main.main, [*TEST, "--dir_result", str(work / "file")])


def test_disk_that_fills_up_leaves_the_old_results(trained, work, fails):
    assert main.main(TEST) == 0
    before = snapshot(work)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        assert "cannot write" in fails(main.main, TEST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(work) == before


def test_next_steps_lead_from_images_to_a_segmentation(work, capsys):
    write_stacks(work / "raw", num=4)
    volume = tifffile.imread("raw/train-volume.tif")
    (work / "more").mkdir()
    for name, pixels in (("known", volume[0]), ("new", 255 - volume[0])):
        tifffile.imwrite(f"more/{name}.tif", pixels)
    raw = ["--input", "raw/train-volume.tif", "--label", "raw/train-labels.tif"]
    assert run_make_database.main(["--name_data", "my cells", "--dir_data", "data", *raw]) == 0
    more = {"train": [*SMALL, "--max_minutes", "0", "--num_epoch", "1", "--scope", "a"], "test": [], "predict": []}
    for mode, flags in more.items():
        line = capsys.readouterr().out.splitlines()[-1]
        words = shlex.split(line.removeprefix("next: python main.py "))
        assert words[:4] == ["--mode", mode, "--name_data", "my cells"]
        assert ("data" in words, "--gpu_ids -1" in line, "--scope a" in line) == (
            True,
            mode != "train",
            mode != "train",
        )
        words = ["more" if word == "IMAGES" else word for word in words]
        assert main.main([*words, *flags]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "note: data/my cells: left out: 1 file(s), whose images are in the database" in printed
    assert [path.name for path in (work / "segmented").glob("*.png")] == ["new-overlay.png"]
    label = work / "segmented/labels/new.png"
    Image.fromarray(np.asarray(Image.open(label))).save(label)  # as an editor does
    words = shlex.split(printed[-1].removeprefix("next: python run_make_database.py "))
    assert run_make_database.main(words) == 0
    assert "3 train (1 more), 1 val, 1 test" in capsys.readouterr().out
