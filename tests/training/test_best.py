import json
import shutil
import signal

import numpy as np
import pytest
from conftest import SMALL, Killed, checkpoint_of, curves, same, write_info

import checkpoint
import main
from checkpoint import Checkpoint
from prediction import predictor
from samples import write_sample

# the scores go up and down; of seven epochs the sixth is the best, on any processor
FLAGS = [*SMALL, "--lr", "0.3", "--seed", "31", "--schedule", "constant", "--batch_size", "2", "--amp", "off"]
SEVEN = [*FLAGS, "--num_epoch", "7", "--num_freq_save", "4"]
STILL = [*SMALL, "--lr", "1e-30", "--norm", "none", "--num_epoch", "30"]  # the first epoch stays the best
CHECKPOINTS = "checkpoints/unet/em"


def same_epoch(one, other):
    """Whether two checkpoints hold the same training, wherever and however fast it ran."""
    left_out = {"seconds", "config"}
    return all(same(value, getattr(other, name)) for name, value in vars(one).items() if name not in left_out)


def score_curve(work, score, scope):
    """Points of a score on the validation set, and whether it is better the lower it is."""
    lines = curves(work, scope, every_epoch=False)
    if score == "dice":
        pairs = zip(lines["dice/membrane"], lines["dice/cell"], strict=True)
        return [(epoch, (value + other) / 2) for (epoch, value), (_, other) in pairs], False
    name = {"loss": "loss/val", "pixel_error": "pixel_error", "v_info": "max/v_info"}[score]
    return lines[name], score in ("loss", "pixel_error")


@pytest.mark.slow
def test_best_epoch_by_each_score_has_the_threshold_of_its_weights(database, work):
    assert main.main([*FLAGS, "--scope", "all", "--num_epoch", "7", "--num_freq_save", "1"]) == 0
    best_epochs = []
    for score in ("loss", "pixel_error", "dice", "v_info"):
        flags = ["--scope", score, "--num_epoch", "7", "--num_freq_save", "5", "--num_freq_score", "2"]
        assert main.main([*FLAGS, *flags, "--best_score", score]) == 0
        points, falling = score_curve(work, score, score)
        assert len(points) == (5 if score == "v_info" else 7)
        expected, value = (min if falling else max)(points, key=lambda point: point[1])
        best = checkpoint_of(work, "best", score)
        assert (best.epoch, best.best_epoch, best.best_score) == (expected, expected, pytest.approx(value))
        whole = checkpoint_of(work, expected, "all")
        assert same(best.average, whole.average) and same(best.optim, whole.optim)
        assert best.threshold == whole.threshold
        last = checkpoint_of(work, 7, score)
        assert (last.best_epoch, last.best_score) == (expected, best.best_score)
        best_epochs.append(expected)
    assert set(best_epochs) - {5, 7}  # not all of them are saved under their numbers anyway


@pytest.fixture(scope="module")
def unbroken(made, tmp_path_factory):
    """Checkpoints of a run of seven epochs, by epoch."""
    folder = tmp_path_factory.mktemp("unbroken")
    shutil.copytree(made[0], folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main.main(SEVEN) == 0
    return {epoch: checkpoint_of(folder, epoch) for epoch in (4, 7, "best")}


# an epoch calls the network three times to train, once to validate, and eight times to choose a threshold
@pytest.mark.parametrize("calls", [[14], [16], [20], [6, 9], [14, 18]])
def test_best_epoch_of_a_resumed_run_is_that_of_the_unbroken_one(database, work, unbroken, stop_at_forward, calls):
    for call in calls:  # a second Ctrl-C ends the choice of a threshold
        stop_at_forward(signal.SIGINT, call)
    assert main.main(SEVEN) == 130
    assert main.main([*SEVEN, "--train_continue", "on"]) == 0
    for epoch in (7, "best"):
        assert same_epoch(checkpoint_of(work, epoch), unbroken[epoch])


def test_best_epoch_is_there_when_a_run_whose_validation_fails_resumes(database, work, unbroken, monkeypatch, fails):
    forward, calls = predictor.forward_tile, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError
        return forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(predictor, "forward_tile", failing)
        assert "out of memory" in fails(main.main, SEVEN)
    assert (
        not checkpoint_of(work, 3).epoch_complete
        and checkpoint_of(work, "best").epoch == checkpoint_of(work, 3).best_epoch
    )
    assert main.main([*SEVEN, "--train_continue", "on"]) == 0
    for epoch in (7, "best"):
        assert same_epoch(checkpoint_of(work, epoch), unbroken[epoch])


@pytest.mark.parametrize("name", ["model_epoch0004.pth", "model_best.pth"])
def test_best_epoch_is_there_when_a_run_killed_before_a_write_resumes(database, work, unbroken, monkeypatch, name):
    flags = [*SEVEN, "--num_freq_save", "2"]
    save, written = Checkpoint.save, []

    def killing(self, path, before_rename):
        if path.name == name and "model_epoch0002.pth" in written:
            raise Killed
        save(self, path, before_rename)
        written.append(path.name)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoint, "save", killing)
        main.main(flags)
    assert checkpoint_of(work, "best").epoch_complete
    assert main.main([*flags, "--train_continue", "on"]) == 0
    for epoch in (4, 7, "best"):
        assert same_epoch(checkpoint_of(work, epoch), unbroken[epoch])


def test_best_epoch_that_a_resumed_run_has_not_reached_is_moved_aside(database, work, capsys):
    flags = [*FLAGS, "--num_freq_save", "1"]
    assert main.main([*flags, "--num_epoch", "7"]) == 0
    whole, before = checkpoint_of(work, "best"), (work / CHECKPOINTS / "model_best.pth").read_bytes()
    assert whole.epoch > 2
    assert main.main([*flags, "--num_epoch", "3", "--epoch", "2", "--train_continue", "on"]) == 0
    assert (work / CHECKPOINTS / "earlier-1" / "model_best.pth").read_bytes() == before
    expected = min(curves(work)["loss/val"], key=lambda point: point[1])
    assert checkpoint_of(work, "best").epoch == expected[0] <= 3
    assert "sought again" not in capsys.readouterr().out  # the files of the epochs 1 and 2 are there
    assert main.main([*flags, "--num_epoch", "7", "--train_continue", "on"]) == 0
    assert same_epoch(checkpoint_of(work, "best"), whole)


@pytest.mark.parametrize("spoil", ["damaged", "missing", "another score"])
def test_best_epoch_that_can_not_be_loaded_is_sought_again(database, work, spoil, capsys):
    flags = [*FLAGS, "--num_freq_save", "4"]
    assert main.main([*flags, "--num_epoch", "7"]) == 0
    path, more = work / CHECKPOINTS / "model_best.pth", []
    assert checkpoint_of(work, "best").epoch < 7
    if spoil == "damaged":
        path.write_bytes(path.read_bytes()[:5000])
    elif spoil == "missing":
        path.unlink()
    else:
        more = ["--best_score", "pixel_error"]
    assert main.main([*flags, *more, "--num_epoch", "9", "--train_continue", "on"]) == 0
    assert "sought again, from epoch 8 on" in capsys.readouterr().out
    assert checkpoint_of(work, "best").epoch in (8, 9)
    assert (path.parent / "earlier-1" / path.name).exists() == (spoil != "missing")


def test_best_epoch_is_tested_used_to_predict_exported_and_resumed_from(database, work, capsys):
    assert main.main([*FLAGS, "--num_epoch", "7"]) == 0
    best = checkpoint_of(work, "best").epoch
    assert best < 7
    chosen = ["--gpu_ids", "-1", "--epoch", "best"]
    assert main.main(["--mode", "test", *chosen]) == 0
    scores = json.loads((work / "results" / "unet" / "em" / "metrics.json").read_text())
    assert scores["epoch"] == best and scores["checkpoint"].endswith("model_best.pth")
    np.save("in.npy", np.zeros((32, 32), np.uint8))
    assert main.main(["--mode", "predict", *chosen, "--input", "in.npy", "--output", "out.npy"]) == 0
    assert main.main(["--mode", "export", *chosen, "--format", "torchscript", "--output", "out.pt"]) == 0
    out = capsys.readouterr().out
    assert f"epoch {best}; " in out and out.count("model_best.pth") == 3  # of the training, predict and export
    assert main.main([*FLAGS, "--num_epoch", "7", "--train_continue", "on", "--epoch", "best"]) == 0
    assert f"epoch {best + 1}/7" in capsys.readouterr().out
    assert (work / CHECKPOINTS / "earlier-1" / "model_epoch0007.pth").is_file()
    assert checkpoint_of(work, "best").epoch == best


def test_best_epoch_and_patience_need_a_validation_set(database, work, fails):
    for file in (database / "val").iterdir():
        file.unlink()
    (database / "val").rmdir()
    assert "--patience 3" in fails(main.main, [*SMALL, "--num_epoch", "1", "--patience", "3"], status=2)
    assert not (work / "checkpoints").exists()
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    assert [path.name for path in (work / CHECKPOINTS).iterdir()] == ["model_epoch0001.pth"]
    assert "no model_best.pth" in fails(main.main, ["--mode", "test", "--gpu_ids", "-1", "--epoch", "best"])


def test_best_score_v_info_of_three_classes_is_refused(work, fails):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (work / "datasets" / "em" / split).mkdir(parents=True)
        label = rng.integers(0, 3, (4, 4), np.uint8).repeat(8, 0).repeat(8, 1)
        write_sample(work / "datasets" / "em" / split / "0.npy", (label * 60)[..., None], label)
    write_info(work / "datasets" / "em", 3)
    flags = [*SMALL, "--num_epoch", "2", "--best_score"]
    assert "--best_score v_info" in fails(main.main, [*flags, "v_info"], status=2)
    assert main.main([*flags, "dice"]) == 0
    assert main.main([*flags, "dice", "--train_continue", "on", "--num_epoch", "3"]) == 0
    assert checkpoint_of(work, "best").best_epoch == checkpoint_of(work, 3).best_epoch > 0


@pytest.mark.parametrize("flags", [[], ["--max_minutes", "9"], ["--best_score", "v_info", "--num_freq_score", "1"]])
def test_patience_ends_after_so_many_epochs_without_a_better_score(database, work, capsys, flags):
    assert main.main([*STILL, *flags, "--patience", "3"]) == 0
    assert "trained to epoch 4 (3 epochs without a better " in capsys.readouterr().out
    saved, lines = checkpoint_of(work, 0), curves(work, every_epoch=False)
    assert (saved.epoch, saved.epoch_complete, saved.best_epoch) == (4, True, 1)
    assert lines["max/v_info"][-1][0] == lines["loss/val"][-1][0] == 4
    assert checkpoint_of(work, "best").epoch == 1
    assert main.main([*STILL, *flags, "--patience", "3", "--train_continue", "on"]) == 0
    assert "trained to epoch 4 already (3 epochs" in capsys.readouterr().out
    assert main.main([*STILL, *flags, "--patience", "5", "--train_continue", "on"]) == 0
    assert checkpoint_of(work, 0).epoch == 6 and "--patience is" not in capsys.readouterr().out


def test_patience_scores_v_info_when_it_ends_and_begins_at_the_first_score(database, work):
    flags = ["--best_score", "v_info", "--num_freq_score", "4", "--patience", "2"]
    assert main.main([*STILL, *flags]) == 0
    assert (checkpoint_of(work, 0).epoch, checkpoint_of(work, 0).best_epoch) == (6, 4)


def test_patience_goes_on_counting_in_a_resumed_run(database, work, stop_at_forward):
    stop_at_forward(signal.SIGTERM, 2 + 1 + 2 + 1 + 1)  # in epoch 3; an epoch has two steps and one validation
    assert main.main([*STILL, "--patience", "4"]) == 143
    assert main.main([*STILL, "--patience", "4", "--train_continue", "on"]) == 0
    assert checkpoint.find(work / CHECKPOINTS).name == "model_epoch0005.pth"


def test_choose_threshold_is_done_by_the_resumed_run_if_it_was_left_out(database, work):
    assert main.main([*STILL, "--num_epoch", "1"]) == 0
    saved = checkpoint_of(work, "best")
    chosen, saved.threshold = saved.threshold, 0.123  # as where a second Ctrl-C left the choice out
    saved.save(work / CHECKPOINTS / "model_best.pth")
    assert main.main([*STILL, "--num_epoch", "2", "--train_continue", "on"]) == 0
    assert (checkpoint_of(work, "best").epoch, checkpoint_of(work, "best").threshold) == (1, chosen)


@pytest.mark.parametrize("score", ["dice", "v_info"])
def test_best_score_of_foreground_of_a_blank_validation_image_is_none(score, database, work, capsys):
    (sample,) = (database / "val").glob("*.npy")
    pixels = np.load(sample)["input"]
    write_sample(sample, pixels, np.zeros(pixels.shape[:2], np.uint8))
    flags = [*STILL, "--num_epoch", "4", "--best_score", score, "--num_freq_score", "1", "--patience", "2"]
    assert main.main(flags) == 0
    printed = capsys.readouterr()
    assert f"no validation sample has foreground, so no epoch can be the best by --best_score {score}" in printed.err
    assert "trained to epoch 4, saved" in printed.out and not (work / CHECKPOINTS / "model_best.pth").exists()
    assert checkpoint_of(work, 0).best_epoch == 0 and "max/v_info" not in curves(work, every_epoch=False)
    flags = ["--background", "cell", "--train_continue", "off", *flags]  # and then membrane is foreground everywhere
    assert main.main(flags) == 0
    assert "has foreground" not in capsys.readouterr().err and checkpoint_of(work, "best").best_epoch == 1
