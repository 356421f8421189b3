"""Small databases and stacks in temporary folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from forks import Fork

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
if hasattr(signal, "SIGHUP"):  # Windows has none
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup leaves it ignored

needs_golden = pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="needs ../shared/golden")
needs_isbi = pytest.mark.skipif(not (SHARED / "isbi2012").is_dir(), reason="needs ../shared/isbi2012")

# a network, a crop and an epoch that train in milliseconds
SMALL = ["--gpu_ids", "-1", "--nch_ker", "2", "--num_level", "2", "--ny_load", "32", "--nx_load", "32"]
SMALL += ["--elastic", "2", "--num_crop", "6"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty current folder, so that all default folders lie in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Two folders that are made once and copied: one with a database, one with a checkpoint, too."""
    import main
    import run_make_database

    folders = [tmp_path_factory.mktemp(name) for name in ("database", "trained")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folders[0])
        assert run_make_database.main(["--synthetic", "8", "--size", "48"]) == 0
        shutil.copytree(folders[0], folders[1], dirs_exist_ok=True)
        patch.chdir(folders[1])
        assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    return folders


@pytest.fixture
def database(made, work):
    """datasets/em: eight synthetic sections of 48 px, six to train on."""
    shutil.copytree(made[0], work, dirs_exist_ok=True)
    return work / "datasets" / "em"


@pytest.fixture
def trained(made, work):
    """The same with a checkpoint of epoch 1."""
    shutil.copytree(made[1], work, dirs_exist_ok=True)
    return work / "datasets" / "em"


@pytest.fixture
def stop_at_forward():
    """Raises a signal when a network is called for the n-th time."""
    import torch

    hooks = []

    def arm(signum, call):
        calls = []

        def hook(module, _):
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1):  # each network's last layer
                calls.append(module)
                if len(calls) == call:
                    signal.raise_signal(signum)

        hooks.append(torch.nn.modules.module.register_module_forward_pre_hook(hook))

    yield arm
    for hook in hooks:
        hook.remove()


@pytest.fixture
def fails(capfd):
    """Runs a program that must end with one line on stderr, and returns that line."""

    def run(program, argv, status=1):
        capfd.readouterr()
        assert program(argv) == status
        lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, lines
        assert "Traceback" not in lines[0]
        return lines[0]

    return run


@pytest.fixture
def start(work):
    """Starts a program in a process of its own, and kills what is left of it in the end."""
    processes = []

    def run(program, *argv, out=None, **environment):
        processes.append(Fork(program, list(argv), work, environment, out))
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
    import main

    def run(num_process, *argv):
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_process))
        world = sizes | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
        return [start(main.main, *argv, RANK=str(n), LOCAL_RANK=str(n), **world) for n in range(num_process)]

    return run


def finish(processes: list[Fork]) -> str:
    """Output of processes that must succeed."""
    texts = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), texts
    return "".join(out for out, _ in texts)


def wait_for(path: Path, process: Fork) -> None:
    """Wait until a file is there, while the process runs."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def checkpoint_of(work, epoch, scope="unet"):
    """Checkpoint of an epoch, or of the `best`."""
    import checkpoint

    return checkpoint.Checkpoint.load(checkpoint.find(work / "checkpoints" / scope / "em", epoch))


def events(work, scope="unet"):
    """What TensorBoard shows of a training, with all its tensors."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(work / "log" / scope / "em"), {"tensors": 0}).Reload()


def curves(work, scope="unet", *, every_epoch=True):
    """Points of each curve as (epoch, value), as TensorBoard shows them; those of every epoch that are no times."""
    other = {"max/v_rand", "max/v_info", "min_pixel_error", "rand_error"} if every_epoch else set()
    found = events(work, scope)
    names = {*found.Tags()["scalars"]} - other - {"images_per_second"}
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in names}


def same(a, b):
    """Whether two states hold the same bits."""
    if hasattr(a, "untyped_storage"):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_before(patch: pytest.MonkeyPatch, names: tuple[str, ...], number: int) -> None:
    """Raise `Killed` before a call of these functions of `os`, once there were so many others."""
    others = iter(range(number))

    def killing(function):
        def run(*arguments, **options):
            if next(others, None) is None:
                raise Killed
            return function(*arguments, **options)

        return run

    for name in names:
        patch.setattr(os, name, killing(getattr(os, name)))


def write_stacks(folder: Path, num: int = 5, shape=(32, 32), dtype=np.uint8, values=(0, 255), channels=0) -> Path:
    """Random `train-volume.tif` and `train-labels.tif` in a folder."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    size = (num, *shape, channels) if channels else (num, *shape)
    volume = rng.integers(0, 200, size).astype(dtype)
    labels = np.array(values, np.uint8)[rng.integers(0, len(values), (num, *shape))]
    photometric = "rgb" if channels in (3, 4) else "minisblack"
    tifffile.imwrite(folder / "train-volume.tif", volume, photometric=photometric)
    tifffile.imwrite(folder / "train-labels.tif", labels, photometric="minisblack")
    return folder


def write_info(folder: Path, num_class: int) -> None:
    """Describe a database whose samples were written one by one."""
    from description import describe
    from samples import list_samples

    info = describe((file.open() for file in list_samples(folder / "train")), list(range(num_class)))
    (folder / "dataset.json").write_text(json.dumps(asdict(info)))


def annotate_partly(database: Path, seed: int, change: int = 0) -> None:
    """Draw other classes for what is not annotated in a part of each training label, and, but for seed 0, ignore it."""
    from description import load_info
    from samples import IGNORE, list_samples, write_sample

    rng = np.random.default_rng(seed)
    for file in list_samples(database / "train"):
        image, label = (np.array(array) for array in file.open())
        known = np.zeros(label.shape, bool)
        known[8:24, 10:30] = True
        label = np.where(known, label ^ change, rng.integers(0, 2, label.shape, np.uint8))
        write_sample(file.input, image, np.where(known, label, IGNORE if seed else label).astype(np.uint8))
    info = replace(load_info(database), ignore=128 if seed else None)
    (database / "dataset.json").write_text(json.dumps(asdict(info)))
