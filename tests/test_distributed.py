"""Several processes on the CPU, over gloo."""

import os
import signal
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed.run
from conftest import ROOT, SMALL, annotate_partly, checkpoint_of, events, finish, wait_for
from forks import launch_two

import checkpoint
import distributed
import main
from checkpoint import Checkpoint
from config import Config
from device import pick_device, pick_precision
from distributed import World, joined, num_gpu
from samples import IGNORE, list_samples, write_sample
from train import Trainer
from utils import FlagError, UserError

FLAGS = [*SMALL, "--norm", "inorm", "--amp", "off", "--dist_timeout", "20"]
ENDLESS = [*FLAGS, "--num_epoch", "9999", "--num_freq_save", "5"]


def weights(work, scope, epoch):
    return Checkpoint.load(work / "checkpoints" / scope / "em" / f"model_epoch{epoch:04d}.pth").net


def test_world_of_one_process_has_only_itself():
    world = World()
    assert (
        world.is_main and world.gather([1, 2]) == [1, 2] and world.broadcast("a") == "a" and world.max(1, 2) == [1, 2]
    )
    assert num_gpu("-1") == 0 and num_gpu("98,99") == 0


@pytest.mark.slow
def test_processes_train_the_weights_of_one_and_are_resumed_by_one(database, work, together):
    # six images in batches of four and two: 10 steps in five epochs; a third process has no image of the last batch
    flags = [*FLAGS, "--batch_size", "4", "--schedule", "constant", "--optim", "sgd", "--lr", "0.01"]
    out = finish(together(3, *flags, "--scope", "three", "--num_epoch", "5"))
    assert out.count("epoch 5/5") == 1
    assert main.main([*flags, "--scope", "one", "--num_epoch", "5"]) == 0
    one, three = weights(work, "one", 5), weights(work, "three", 5)
    assert list(one) == list(three)  # no prefix
    for name, value in one.items():
        torch.testing.assert_close(three[name], value, atol=1e-5, rtol=0)
    for scope in ("one", "three"):
        assert main.main([*flags, "--scope", scope, "--train_continue", "on", "--num_epoch", "7"]) == 0
    one, three = weights(work, "one", 7), weights(work, "three", 7)
    assert all(torch.allclose(three[name], value, atol=1e-4) for name, value in one.items())


@pytest.mark.slow
def test_processes_train_and_log_the_weights_of_one_on_partial_labels(database, work, together):
    annotate_partly(database, 1)
    image, label = (np.array(array) for array in list_samples(database / "val")[0].open())
    for number in range(2):
        known = np.arange(label.size).reshape(label.shape) % 2 == number
        write_sample(database / "val" / f"{number:05d}.npy", image, np.where(known, label, IGNORE).astype(np.uint8))
    flags = [*FLAGS, "--batch_size", "4", "--schedule", "constant", "--optim", "sgd", "--lr", "0.01", "--loss", "bce"]
    finish(together(3, *flags, "--scope", "three", "--num_epoch", "4"))
    assert main.main([*flags, "--scope", "one", "--num_epoch", "4"]) == 0
    for name, value in weights(work, "one", 4).items():
        torch.testing.assert_close(weights(work, "three", 4)[name], value, atol=1e-5, rtol=0)
    one, three = (Checkpoint.load(work / "checkpoints" / s / "em" / "model_epoch0004.pth") for s in ("one", "three"))
    assert three.losses == pytest.approx(one.losses, abs=1e-5)
    one, three = (events(work, scope) for scope in ("one", "three"))
    counts = [np.reshape(log.Tensors("foreground")[-1].tensor_proto.float_val, (6, 127)) for log in (one, three)]
    np.testing.assert_allclose(*counts, atol=3)  # pixels whose probability is rounded to another bin
    assert all((count[:4].sum(0) == label.size).all() for count in counts)  # the annotated ones, each once
    for name in ("_hparams_/experiment", "_hparams_/session_start_info"):
        assert hparams(one, name) == hparams(three, name)
    assert len([*(work / "log" / "three" / "em").glob("events*")]) == 1


def hparams(log, name):
    """What TensorBoard's HPARAMS reads, without when the run started and its name."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = HParamsPluginData.FromString(log.summary_metadata[name].plugin_data.content)
    found.session_start_info.start_time_secs = 0
    return found


@pytest.mark.slow
def test_processes_end_together_by_their_patience_with_one_best_epoch(database, work, together):
    flags = [*FLAGS, "--norm", "none", "--lr", "1e-30", "--num_epoch", "30", "--patience", "3"]
    out = finish(together(2, *flags))
    assert out.count("trained to epoch 4 (3 epochs without a better loss)") == 1
    assert [checkpoint_of(work, epoch).epoch for epoch in (0, "best")] == [4, 1]
    out = finish(together(2, *flags, "--patience", "4", "--train_continue", "on"))
    assert "trained to epoch 5 (4 epochs" in out


def test_processes_write_the_test_results_of_one(database, work, together, monkeypatch):
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    flags = ["--mode", "test", "--gpu_ids", "-1", "--split", "train", "--tta", "off"]
    folder = work / "results" / "unet" / "em"
    assert finish(together(2, *flags)).count("index.html") == 1
    two = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", [str(ROOT / "main.py"), *flags])  # the page names the command
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two had: sums round otherwise
    assert main.main(flags) == 0
    torch.set_num_threads(threads)
    assert len(two) > 18 and two == {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_processes_export_once(trained, work, together):
    flags = ["--mode", "export", "--gpu_ids", "-1", "--format", "torchscript", "--output", "net.pt"]
    assert finish(together(2, *flags)).count("exported to net.pt") == 1
    assert zipfile.is_zipfile(work / "net.pt")


def test_process_that_is_killed_ends_the_other_with_one_line(database, work, together):
    first, second = together(2, *FLAGS, "--num_epoch", "400", "--num_freq_save", "5")
    wait_for(work / "checkpoints" / "unet" / "em" / "model_epoch0005.pth", first)
    second.kill()
    _, err = first.communicate(timeout=60)
    assert first.returncode == 1 and err.count("\n") == 1 and "another process of this run has died" in err


@pytest.mark.slow
def test_launch_that_is_ended_ends_its_processes(database, work, start):
    process = start(partial(distributed.launch, 1), str(ROOT / "main.py"), *ENDLESS)
    wait_for(work / "checkpoints" / "unet" / "em" / "model_epoch0005.pth", process)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and err.count("stopped in epoch") == 1
    assert Checkpoint.load(checkpoint.find(work / "checkpoints" / "unet" / "em")).epoch >= 5


def test_launcher_that_is_killed_makes_its_processes_save_and_stop(database, work, start, free_port):
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
    launcher = start(launch_two, *ENDLESS, **world)
    wait_for(work / "checkpoints" / "unet" / "em" / "model_epoch0005.pth", launcher)
    launcher.kill()
    _, err = launcher.communicate(timeout=30)
    assert err.count("stopped in epoch") == 1
    assert Checkpoint.load(checkpoint.find(work / "checkpoints" / "unet" / "em")).epoch >= 5


def test_num_gpu_refuses_a_list_if_some_are_missing(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "no GPU 5 here, there are 2" in fails(main.main, ["--gpu_ids", "5,0,1"], status=2)


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=here MASTER_PORT=9", "but not LOCAL_RANK, LOCAL_WORLD_SIZE: start the"),
        ("RANK=0 WORLD_SIZE=2", "RANK=0, WORLD_SIZE=2, but not LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ("LOCAL_RANK=1", "LOCAL_RANK=1, but not RANK, WORLD_SIZE, "),
        ("RANK=x WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=a MASTER_PORT=9", "RANK=x, which must be"),
        ("RANK=2 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=a MASTER_PORT=9", "below WORLD_SIZE=2"),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=a MASTER_PORT=web", "MASTER_PORT=web, which"),
    ],
)
def test_is_worker_refuses_a_half_set_environment_in_one_line(work, fails, monkeypatch, environment, text):
    for name, value in (pair.split("=") for pair in environment.split()):
        monkeypatch.setenv(name, value)
    for mode in ("train", "test", "predict", "export"):
        line = fails(main.main, ["--mode", mode, "--gpu_ids", "0"])
        assert text in line and "torchrun, or unset them" in line
    with pytest.raises(UserError, match="torchrun, or unset them"):
        pick_device("0")


def test_is_worker_ignores_the_address_of_another_job(trained, work, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    assert main.main(["--mode", "test", "--gpu_ids", "-1", "--tta", "off"]) == 0


def test_process_without_an_image_is_refused():
    trainer = Trainer(Config(batch_size=2, gpu_ids="-1"), torch.device("cpu"), World(0, 3))
    with pytest.raises(FlagError, match="--batch_size 2: 3 processes"):
        trainer.train()


def test_joined_makes_the_gpu_the_current_one_that_is_asked_for_bf16(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(current.append(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: current[-1].index == 1)
    with joined(torch.device("cuda", 2), 1.0):
        assert current == [torch.device("cuda", 2)]
    assert pick_precision("auto", torch.device("cuda", 1)) is torch.bfloat16
    assert pick_precision("auto", torch.device("cuda", 0)) is None


@pytest.mark.slow
def test_torchrun_continues_after_a_kill_and_a_stop_of_one_is_a_stop_of_all(database, work, start):
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    options += ["--start-method=fork", "--run-path"]  # in forks of the launcher, which start faster
    process = start(torch.distributed.run.main, *options, str(ROOT / "main.py"), *ENDLESS)
    folder = work / "checkpoints" / "unet" / "em"
    for signum in (signal.SIGKILL, signal.SIGTERM):
        last = max(checkpoint.list_epochs(folder), default=0)
        wait_for(folder / f"model_epoch{last + 5:04d}.pth", process)
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
        os.kill(max(map(int, listed.split())), signum)
    out, err = process.communicate(timeout=60)
    assert "resuming from" in out and err.count("stopped in epoch") == 1
    newest = Checkpoint.load(checkpoint.find(folder, 0))
    assert not newest.epoch_complete and 10 <= newest.epoch < 9999
