"""Several processes on the CPU, over gloo, as torchrun starts them."""

import os
import signal
import subprocess
import sys
import time

import torch
from conftest import ROOT, SMALL

import checkpoint
import main
from parallel import World, num_gpu

FLAGS = [*SMALL, "--norm", "inorm", "--amp", "off", "--dist_timeout", "20"]


def torchrun(work, num_process, *argv, options=(), **kwargs):
    """Start main.py in several processes of one thread each."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_process}", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*run, ROOT / "main.py", *argv], cwd=work, env=environment, stdout=pipe, stderr=pipe, text=True, **kwargs
    )


def finish(process):
    """Exit status, output and errors of a process."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def weights(work, scope, epoch):
    return checkpoint.load(work / "checkpoints" / scope / "em" / f"model_epoch{epoch:04d}.pth")


def test_alone_a_process_is_its_own_world():
    world = World()
    assert world.first and world.gather([1, 2]) == [1, 2] and world.same("a") == "a" and world.most(1, 2) == [1, 2]
    assert num_gpu("-1") == 0 and num_gpu("98,99") == 0


def test_two_processes_train_the_weights_of_one_and_resume_on_one_and_three(database, work):
    # 6 images in batches of 4: 4 steps; the second of an epoch has two images
    flags = [*FLAGS, "--batch_size", "4", "--schedule", "constant", "--optim", "sgd", "--lr", "0.01"]
    status, out, err = finish(torchrun(work, 2, *flags, "--scope", "two", "--num_epoch", "5"))
    assert status == 0, err
    assert out.count("epoch 5/5") == 1
    assert main.main([*flags, "--scope", "one", "--num_epoch", "5"]) == 0
    one, two = weights(work, "one", 5), weights(work, "two", 5)
    assert list(one["net"]) == list(two["net"])  # no prefix
    for name, value in one["net"].items():
        torch.testing.assert_close(two["net"][name], value, atol=1e-5, rtol=0)
    more = [*flags, "--scope", "two", "--num_epoch", "7", "--train_continue", "on"]
    status, _, err = finish(torchrun(work, 3, *more))
    assert status == 0, err
    assert main.main([*more, "--num_epoch", "8"]) == 0
    assert main.main([*flags, "--scope", "one", "--num_epoch", "8"]) == 0
    one, two = weights(work, "one", 8), weights(work, "two", 8)
    assert all(torch.allclose(two["net"][name], value, atol=1e-4) for name, value in one["net"].items())


def test_a_test_by_two_processes_writes_the_bytes_of_one(database, work, monkeypatch):
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    flags = ["--mode", "test", "--gpu_ids", "-1", "--split", "train", "--tta", "off"]
    folder = work / "results" / "unet" / "em"
    status, out, err = finish(torchrun(work, 2, *flags))
    assert status == 0, err
    assert out.count("index.html") == 1
    two = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", [str(ROOT / "main.py"), *flags])  # the page names the command
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two had: sums round otherwise
    assert main.main(flags) == 0
    torch.set_num_threads(threads)
    assert len(two) > 18 and two == {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def worker_pids(process):
    """Numbers of the processes that a torchrun has started, in the order of their ranks."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return sorted(int(pid) for pid in listed.split())


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_torchrun_goes_on_from_the_last_checkpoint_when_a_process_is_killed(database, work):
    process = torchrun(work, 2, *FLAGS, "--num_epoch", "30", "--num_freq_save", "5", options=["--max-restarts=3"])
    wait_for(work / "checkpoints" / "unet" / "em" / "model_epoch0005.pth", process)
    os.kill(worker_pids(process)[-1], signal.SIGKILL)
    status, out, err = finish(process)
    assert status == 0, err
    assert (work / "checkpoints" / "unet" / "em" / "model_epoch0030.pth").exists() and "going on from" in out


def test_a_killed_process_ends_the_other_with_one_line(database, work):
    port = str(29500 + os.getpid() % 1000)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "main.py", *FLAGS, "--num_epoch", "400", "--num_freq_save", "5"],
            cwd=work,
            env=os.environ | world | {"RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    wait_for(work / "checkpoints" / "unet" / "em" / "model_epoch0005.pth", processes[0])
    processes[1].kill()
    processes[1].communicate()
    status, _, err = finish(processes[0])
    assert status == 1 and err.count("\n") == 1 and "another process of this run has died" in err


def test_a_stop_is_heard_by_all_and_saved_once(database, work):
    flags = [*FLAGS, "--num_epoch", "400", "--num_freq_save", "5"]
    process = torchrun(work, 2, *flags)
    folder = work / "checkpoints" / "unet" / "em"
    wait_for(folder / "model_epoch0005.pth", process)
    os.kill(worker_pids(process)[-1], signal.SIGTERM)  # one process alone
    status, _, err = finish(process)
    assert status != 0 and err.count("stopped in epoch") == 1
    newest = checkpoint.load(checkpoint.find(folder, 0))
    assert not newest["whole"] and newest["epoch"] < 400
