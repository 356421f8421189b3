"""Several processes on the CPU, over gloo."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, SMALL, checkpoint_of

import checkpoint
import main
from checkpoint import Checkpoint
from config import Config
from distributed import World, joined, num_gpu
from train import Trainer
from utils import FlagError, pick_precision

FLAGS = [*SMALL, "--norm", "inorm", "--amp", "off", "--dist_timeout", "20"]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture
def start(work):
    """Starts a command with one thread, and kills what is left of it in the end."""
    processes = []

    def run(*command, **environment):
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        processes.append(subprocess.Popen([sys.executable, *command], cwd=work, env=environment, **PIPES))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def free_port():
    """Number of a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def together(start, free_port):
    """Starts main.py in several processes that know of each other, as torchrun does."""

    def run(num_process, *argv):
        world = {"WORLD_SIZE": str(num_process), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
        return [start(ROOT / "main.py", *argv, RANK=str(rank), **world) for rank in range(num_process)]

    return run


def finish(processes):
    """Output of processes that must succeed."""
    texts = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), texts
    return "".join(out for out, _ in texts)


def weights(work, scope, epoch):
    return Checkpoint.load(work / "checkpoints" / scope / "em" / f"model_epoch{epoch:04d}.pth").net


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_alone_a_process_is_its_own_world():
    world = World()
    assert (
        world.is_main and world.gather([1, 2]) == [1, 2] and world.broadcast("a") == "a" and world.max(1, 2) == [1, 2]
    )
    assert num_gpu("-1") == 0 and num_gpu("98,99") == 0


def test_several_processes_train_the_weights_of_one_and_are_resumed_by_one(database, work, together):
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


def test_several_processes_end_together_by_their_patience_with_one_best_epoch(database, work, together):
    flags = [*FLAGS, "--norm", "none", "--lr", "1e-30", "--num_epoch", "30", "--patience", "3"]
    out = finish(together(2, *flags))
    assert out.count("trained to epoch 4 (3 epochs without a better loss)") == 1
    assert [checkpoint_of(work, epoch).epoch for epoch in (0, "best")] == [4, 1]
    out = finish(together(2, *flags, "--patience", "4", "--train_continue", "on"))
    assert "trained to epoch 5 (4 epochs" in out


def test_a_test_by_two_processes_writes_the_bytes_of_one(database, work, together, monkeypatch):
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


def test_one_of_two_processes_exports(trained, work, together):
    flags = ["--mode", "export", "--gpu_ids", "-1", "--format", "torchscript", "--output", "net.pt"]
    assert finish(together(2, *flags)).count("exported to net.pt") == 1
    assert zipfile.is_zipfile(work / "net.pt")


def test_a_killed_process_ends_the_other_with_one_line(database, work, together):
    first, second = together(2, *FLAGS, "--num_epoch", "400", "--num_freq_save", "5")
    wait_for(work / "checkpoints" / "unet" / "em" / "model_epoch0005.pth", first)
    second.kill()
    _, err = first.communicate(timeout=60)
    assert first.returncode == 1 and err.count("\n") == 1 and "another process of this run has died" in err


ENDED = """
import distributed, sys
from pathlib import Path
Path("script.py").write_text('''
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: (open("ended", "w").close(), os._exit(0)))
open("started", "w").close()
time.sleep(60)
''')
sys.exit(distributed.launch(1, ["script.py"]))
"""


def test_a_launcher_that_is_ended_hands_that_on(work, start):
    process = start("-c", ENDED, PYTHONPATH=str(ROOT))
    wait_for(work / "started", process)
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert (work / "ended").exists()


def test_processes_whose_launcher_was_killed_save_and_stop(database, work, free_port):
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "main.py"), *FLAGS, "--num_epoch", "9999", "--num_freq_save", "5"]
    script = f"for rank in 0 1; do RANK=$rank {shlex.join(command)} & done; wait"
    with subprocess.Popen(["sh", "-c", script], env=os.environ | world, **PIPES) as launcher:
        wait_for(work / "checkpoints" / "unet" / "em" / "model_epoch0005.pth", launcher)
        launcher.kill()
        _, err = launcher.communicate(timeout=30)  # ends when nobody has the pipes open any more
    assert err.count("stopped in epoch") == 1
    assert not Checkpoint.load(checkpoint.find(work / "checkpoints" / "unet" / "em")).whole


def test_a_list_of_gpus_of_which_some_are_missing_is_refused(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "no GPU 5 here, there are 2" in fails(main.main, ["--gpu_ids", "5,0,1"], status=2)


def test_a_process_without_an_image_is_refused():
    trainer = Trainer(Config(batch_size=2, gpu_ids="-1"), torch.device("cpu"), World(0, 3))
    with pytest.raises(FlagError, match="--batch_size 2: 3 processes"):
        trainer.train()


def test_the_chosen_gpu_is_the_current_one_and_asked_for_bf16(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(current.append(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: current[-1].index == 1)
    with joined(torch.device("cuda", 2), 1.0):
        assert current == [torch.device("cuda", 2)]
    assert pick_precision("auto", torch.device("cuda", 1)) is torch.bfloat16
    assert pick_precision("auto", torch.device("cuda", 0)) is None


def test_torchrun_goes_on_after_a_kill_and_a_stop_of_one_is_a_stop_of_all(database, work, start):
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    flags = [*FLAGS, "--num_epoch", "1000", "--num_freq_save", "5"]
    process = start("-m", "torch.distributed.run", *options, str(ROOT / "main.py"), *flags)
    folder = work / "checkpoints" / "unet" / "em"
    for signum in (signal.SIGKILL, signal.SIGTERM):
        last = max(checkpoint.list_epochs(folder), default=0)
        wait_for(folder / f"model_epoch{last + 5:04d}.pth", process)
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
        os.kill(max(map(int, listed.split())), signum)
    out, err = process.communicate(timeout=60)
    assert "resuming from" in out and err.count("stopped in epoch") == 1
    newest = Checkpoint.load(checkpoint.find(folder, 0))
    assert not newest.whole and 10 <= newest.epoch < 1000
