"""What ends a training, and what of it is there afterwards."""

import json
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
from conftest import SMALL, checkpoint_of, curves, same
from test_train import other_process
from torch.utils.data import _utils

import main
import run_make_database
import samples
from checkpoint import Checkpoint, load_epoch
from files import move_aside
from model import UNet
from training import budget
from utils import UserError

CHECKPOINTS = "checkpoints/unet/em"
LOG = "log/unet/em"
TRAIN = [*SMALL, "--batch_size", "2"]  # three steps an epoch
STREAMED = ["--cache_gb", "0", "--num_workers", "0"]
TEST = ["--mode", "test", "--gpu_ids", "-1", "--tta", "off"]


class Killed(BaseException):
    """Ends a program as a kill does: nothing is saved."""


@pytest.fixture
def at_training_step():
    """Calls a function before a step of the training: steps are counted over all epochs, from 1."""
    handles = []

    def arm(number, act):
        done = []

        def hook(module, _):
            if isinstance(module, UNet) and module.training:
                done.append(module)
                if len(done) == number:
                    act()

        handles.append(torch.nn.modules.module.register_module_forward_pre_hook(hook))

    yield arm
    for handle in handles:
        handle.remove()


def kill():
    raise Killed


def contents(work, pattern="*"):
    return {path: path.read_bytes() for path in work.rglob(pattern) if path.is_file()}


def unbroken(epochs, *flags):
    assert main.main([*TRAIN, *flags, "--num_epoch", str(epochs), "--scope", "unbroken"]) == 0


def check_same_as_unbroken(work, epochs):
    one, other = checkpoint_of(work, epochs, "unbroken"), checkpoint_of(work, epochs)
    assert same(one.net, other.net) and same(one.optim, other.optim) and one.losses == other.losses
    assert curves(work, "unbroken") == curves(work)


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("flags", [[], STREAMED], ids=["memory", "streamed"])
@pytest.mark.parametrize(
    ("path", "spoil"),
    [
        ("val/00000.npy", "remove"),
        ("val/00000.npy", "truncate"),
        ("train/00002.npy", "remove"),
        ("train/00002.npy", "truncate"),
        ("train/00003.distance.npy", "truncate"),
        ("", "remove"),
    ],
)
def test_train_saves_when_a_sample_is_lost(database, work, monkeypatch, fails, at_training_step, flags, path, spoil):
    if not flags and path.startswith("train"):
        pytest.skip("in memory")
    monkeypatch.setattr(samples, "PAUSES", (0.01,))
    shutil.copytree(database, work / "kept")
    unbroken(3, *flags)

    def act():
        if not path:
            shutil.rmtree(database)
        elif spoil == "remove":
            (database / path).unlink()
        else:
            truncate(database / path)

    at_training_step(4, act)
    line = fails(main.main, [*TRAIN, *flags, "--num_epoch", "3"])
    assert str(database.relative_to(work)) in line
    saved = load_epoch(work / CHECKPOINTS)[1]
    assert saved.epoch in (2, 3) and not saved.epoch_complete and len(saved.losses) >= 1
    shutil.rmtree(database, ignore_errors=True)
    shutil.copytree(work / "kept", database)
    assert main.main([*TRAIN, *flags, "--num_epoch", "3"]) == 0
    check_same_as_unbroken(work, 3)


def test_train_waits_for_a_folder_that_is_gone_for_a_moment(database, work, at_training_step):
    back = threading.Timer(0.4, lambda: (work / "away").rename(database))

    def act():
        database.rename(work / "away")
        back.start()

    at_training_step(2, act)
    assert main.main([*TRAIN, *STREAMED, "--num_epoch", "2"]) == 0
    back.join()


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 5, 9])
def test_train_saves_when_a_loader_process_is_killed(database, work, monkeypatch, fails, at_training_step, step):
    import multiprocessing

    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    flags = ["--cache_gb", "0", "--num_workers", "1", "--num_crop", "40"]
    at_training_step(step, lambda: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL))
    line = fails(main.main, [*TRAIN, *flags, "--num_epoch", "2"])
    assert "a process that reads samples was killed" in line and "lower --num_workers and --cache_gb" in line
    saved = checkpoint_of(work, 1)
    assert not saved.epoch_complete and len(saved.losses) >= step
    unbroken(2, *flags)
    assert main.main([*TRAIN, *flags, "--num_epoch", "2"]) == 0
    check_same_as_unbroken(work, 2)


def test_train_goes_on_when_its_log_is_removed(database, work, capsys, at_training_step):
    at_training_step(5, lambda: shutil.rmtree(work / "log"))
    assert main.main([*TRAIN, "--num_epoch", "4"]) == 0
    assert f"warning: the log in {LOG} was removed" in capsys.readouterr().err
    assert (work / LOG / "arg.txt").is_file()
    assert [epoch for epoch, _ in curves(work)["loss/train"]] == [2, 3, 4]


@pytest.mark.parametrize("step", [2, 4, 6])
def test_train_saves_every_ten_minutes_in_one_file(database, work, monkeypatch, at_training_step, step):
    unbroken(3)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(budget, "SAVE_SECONDS", 0.0)
        at_training_step(step, kill)
        main.main([*TRAIN, "--num_epoch", "3"])
    saved = Checkpoint.load(work / CHECKPOINTS / "model_latest.pth")
    done = {2: (1, 1), 4: (1, 3), 6: (2, 2)}[step]  # the epoch and its steps, of which all but the next are saved
    assert (saved.epoch, len(saved.losses)) == done and saved.epoch_complete == (step == 4)
    assert main.main([*TEST]) == 0
    assert main.main([*TRAIN, "--num_epoch", "3"]) == 0
    check_same_as_unbroken(work, 3)
    assert sorted(path.name for path in (work / CHECKPOINTS).iterdir()) == ["model_best.pth", "model_epoch0003.pth"]


def test_train_goes_on_when_a_checkpoint_cannot_be_written(database, work, monkeypatch, capsys):
    save, failed = Checkpoint.save, []

    def fail_once(self, path, before_rename):
        if path.name == "model_epoch0002.pth" and not failed:
            failed.append(path)
            raise UserError(f"cannot write {path}: No space left on device: make room")
        save(self, path, before_rename)

    monkeypatch.setattr(Checkpoint, "save", fail_once)
    assert main.main([*TRAIN, "--num_epoch", "4", "--num_freq_save", "2"]) == 0
    assert "No space left on device: make room; the training goes on" in capsys.readouterr().err
    assert not (work / CHECKPOINTS / "model_epoch0002.pth").exists() and checkpoint_of(work, 4).epoch_complete


@pytest.mark.parametrize("size", [0, 5000])
def test_load_epoch_passes_over_a_damaged_newest_checkpoint(trained, work, capsys, size):
    assert main.main([*TRAIN, "--num_epoch", "2"]) == 0
    newest = work / CHECKPOINTS / "model_epoch0002.pth"
    newest.write_bytes(newest.read_bytes()[:size])
    np.save("in.npy", np.zeros((32, 32), np.uint8))
    one = ["--gpu_ids", "-1", "--mode"]
    commands = [
        TEST,
        [*one, "predict", "--input", "in.npy", "--output", "out.npy"],
        [*one, "export", "--format", "torchscript", "--output", "out.pt"],
    ]
    for argv in [*commands, [*TRAIN, "--num_epoch", "3"]]:
        capsys.readouterr()
        assert main.main(argv) == 0
        out = capsys.readouterr().out
        assert "model_epoch0002.pth: truncated, damaged" in out and "now checkpoints/unet/em/model_epoch0001" in out
    assert (work / CHECKPOINTS / "earlier-1" / "model_epoch0002.pth").stat().st_size == size
    assert checkpoint_of(work, 3).epoch_complete


def test_load_epoch_uses_the_best_one_where_no_other_is(trained, work, capsys):
    (work / CHECKPOINTS / "model_epoch0001.pth").unlink()
    assert main.main(TEST) == 0
    assert "model_best.pth is used, the only checkpoint there" in capsys.readouterr().out


def test_train_goes_on_from_the_best_one_and_writes_its_numbered_one(database, work):
    argv = [*TRAIN, "--num_epoch", "2", "--num_freq_save", "1"]
    unbroken(2, "--num_freq_save", "1")
    assert main.main(argv) == 0
    (work / CHECKPOINTS / "model_epoch0002.pth").unlink()
    numbered = work / CHECKPOINTS / "model_epoch0001.pth"  # a kill within its writing leaves what follows
    numbered.rename(numbered.with_name(".model_epoch0001.pth.0123abcd.partial"))
    assert checkpoint_of(work, "best").epoch == 1
    assert main.main(argv) == 0
    check_same_as_unbroken(work, 2)
    names = sorted(path.name for path in (work / CHECKPOINTS).iterdir())
    assert names == ["model_best.pth", "model_epoch0001.pth", "model_epoch0002.pth"]


def test_load_epoch_names_the_folder_of_an_earlier_training(trained, work, fails):
    move_aside(work / CHECKPOINTS, [*(work / CHECKPOINTS).glob("*.pth")])
    assert f"earlier training lie in {CHECKPOINTS}/earlier-1" in fails(main.main, TEST)


@pytest.mark.parametrize("mode", [TEST, ["--mode", "predict", "--input", "in.npy", "--output", "out.npy"]])
def test_load_epoch_names_a_training_that_still_runs(trained, work, capsys, mode):
    np.save("in.npy", np.zeros((32, 32), np.uint8))
    with other_process(f"locked(Path({str(work / CHECKPOINTS)!r}), '')"):
        assert main.main([*mode, "--gpu_ids", "-1"]) == 0
    assert "model_epoch0001.pth: its training still runs (process " in capsys.readouterr().out


def test_train_typed_again_goes_on_where_it_was(trained, work, capsys):
    before = contents(work)
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    line = "already trained to epoch 1: raise --num_epoch or --max_minutes to train longer, or add --train_continue off"
    assert line in capsys.readouterr().out and contents(work) == before
    assert main.main(["--gpu_ids", "-1", "--num_epoch", "1"]) == 0  # none of the flags of the training
    assert contents(work) == before
    assert main.main([*SMALL, "--num_epoch", "2"]) == 0
    assert [epoch for epoch, _ in curves(work)["loss/train"]] == [1, 2]


@pytest.mark.parametrize("step", [1, 2])
def test_train_off_moves_nothing_aside_before_it_has_a_checkpoint(trained, work, at_training_step, step):
    before = contents(work)
    at_training_step(step, kill)
    with pytest.raises(Killed):
        main.main([*TRAIN, "--num_epoch", "9", "--train_continue", "off"])
    assert contents(work) == before


def test_train_off_says_at_its_stop_where_the_earlier_one_lies(trained, work, at_training_step, capsys):
    old = (work / CHECKPOINTS / "model_epoch0001.pth").read_bytes()
    at_training_step(2, lambda: signal.raise_signal(signal.SIGINT))
    assert main.main([*TRAIN, "--num_epoch", "9", "--train_continue", "off"]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"the earlier training lies in {CHECKPOINTS}/earlier-1 and {LOG}/earlier-1; to resume: python" in line
    assert line.endswith("--train_continue on")
    assert (work / CHECKPOINTS / "earlier-1" / "model_epoch0001.pth").read_bytes() == old


def test_train_stopped_before_its_first_step_leaves_all_as_it_was(trained, work, monkeypatch):
    before = contents(work, "*.pth")
    monkeypatch.setattr(os, "getppid", lambda: 1)  # the launcher has died
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    from distributed import World
    from train import Trainer

    config = main.parse(main.Config, [*SMALL, "--num_epoch", "5"], None)
    assert Trainer(config, torch.device("cpu"), World(0, 1, launcher=7)).train() == 128 + signal.SIGTERM
    assert contents(work, "*.pth") == before


def test_train_says_that_its_database_was_made_again(trained, work, capfd, fails):
    assert checkpoint_of(work, 1).best_epoch == 1
    assert run_make_database.main(["--synthetic", "9", "--size", "48", "--seed", "3", "--overwrite"]) == 0
    assert main.main([*SMALL, "--num_epoch", "2"]) == 0
    out = capfd.readouterr().out
    assert "note: datasets/em was made again since epoch 1" in out
    assert "sought again, from epoch 2 on: its score was of another validation set" in out
    share = json.loads((trained / "dataset.json").read_text())["class_share"]
    saved = checkpoint_of(work, 2)
    assert saved.best_epoch == 2 and saved.info.class_share == share
    assert main.main([*SMALL, "--num_epoch", "3"]) == 0
    assert "made again" not in capfd.readouterr().out
    argv = ["--synthetic", "9", "--size", "48", "--phantom", "rare", "--overwrite"]
    assert run_make_database.main(argv) == 0
    description = json.loads((trained / "dataset.json").read_text())
    (trained / "dataset.json").write_text(json.dumps(description | {"class_values": [0, 7]}))
    line = fails(main.main, [*SMALL, "--num_epoch", "4"])
    assert "class_values [0, 7]" in line and "use its database, or add --train_continue off for a new one" in line


@pytest.mark.parametrize("argv", [TEST, [*SMALL, "--num_epoch", "2"]])
def test_load_for_takes_the_class_names_of_the_database_and_says_so(trained, work, capsys, argv):
    description = json.loads((trained / "dataset.json").read_text())
    (trained / "dataset.json").write_text(json.dumps(description | {"class_names": ["edge", "inside"]}))
    assert main.main(argv) == 0
    out = capsys.readouterr().out
    assert "note: the classes are named edge, inside, as in datasets/em;" in out and "has membrane, cell" in out
    if argv is not TEST:
        assert checkpoint_of(work, 2).info.class_names == ["edge", "inside"]


def test_resume_names_the_flags_that_the_checkpoint_did_not_know(trained, work, capsys):
    path = work / CHECKPOINTS / "model_epoch0001.pth"
    saved = torch.load(path)
    del saved["config"]["average"], saved["config"]["contrast"]
    torch.save(saved, path)
    assert main.main([*SMALL, "--num_epoch", "2"]) == 0
    out = capsys.readouterr().out
    assert "note: --average 0.99 --contrast 0.2: the checkpoint is of an older version, which had no such flag" in out


def test_load_names_a_checkpoint_of_a_newer_version(trained, work, fails):
    path = work / CHECKPOINTS / "model_epoch0001.pth"
    saved = torch.load(path)
    saved["arch"]["attention"] = True
    torch.save(saved, path)
    assert "its network has attention, which this version" in fails(main.main, TEST)


def test_train_notes_the_time_between_two_saves(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run = budget.Budget(10, 0.0, budget.World())
    for seconds, due in ((599.0, False), (601.0, True), (700.0, True)):
        now[0] = seconds
        run.sync(1)
        assert run.is_save_due == due
    run.note_save()
    now[0] = 1299.0
    run.sync(1)
    assert not run.is_save_due


def test_train_takes_a_val_folder_with_the_users_files_alone_for_none(database, work):
    (database / "val" / "00000.npy").unlink()
    (database / "val" / "notes.txt").write_text("mine")
    assert main.main([*TRAIN, "--num_epoch", "1"]) == 0
    assert not checkpoint_of(work, 1).best_epoch
