"""Full disks: a limit of a file's size, and a small file system in memory."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from random import Random

import numpy as np

from .cases import PREDICT, TEST, TRAIN, Case, Fault, Part, Start, check_end, digest, is_hidden, left_behind
from .processes import run
from .project import is_refusal, read_checkpoint

PARTS = ("datasets", "checkpoints", "results", "log")
OLD = ("p.tif", "p.npy", "net.pt", "net.onnx")  # files of the user that may be replaced by whole ones only
BEST = "checkpoints/unet/em/model_best.pth"  # written again when a later epoch is better
ROUNDS = 4


def _predict(output: str, *more: str) -> tuple[str, list[str]]:
    return "main", [*PREDICT, "--input", "image.npy", "--output", output, *more]


def _export(kind: str, output: str) -> tuple[str, list[str]]:
    return "main", ["--mode", "export", "--gpu_ids", "-1", "--format", kind, "--output", output]


COMMANDS = {
    "training": ("main", [*TRAIN, "--num_epoch", "9", "--train_continue", "on"]),
    "new training": ("main", [*TRAIN, "--num_epoch", "2", "--seed", "7"]),
    "training with a long log": ("main", [*TRAIN, "--num_epoch", "9", "--num_freq_disp", "1", "--scope", "long"]),
    "database": ("run_make_database", ["--overwrite", "--num_val", "2", "--seed", "1"]),
    "synthetic database": ("run_make_database", ["--overwrite", "--synthetic", "20", "--seed", "1", "--size", "128"]),
    "test": ("main", [*TEST, "--tta", "off", "--split", "train"]),
    "tif": _predict("p.tif"),
    "npy": _predict("p.npy"),
    "zarr": _predict("p.zarr"),
    "png": _predict("png"),
    "cells": _predict("p.tif", "--what", "cells"),
    "torchscript": _export("torchscript", "net.pt"),
    "onnx": _export("onnx", "net.onnx"),
    "figure": ("display_result", []),
}


def cases(start: Start) -> list[Case]:
    """Each program with several sizes of what is free, by a limit and on a small disk."""
    np.save(start.folder / "image.npy", np.random.default_rng(0).integers(0, 255, (4, 128, 256), dtype=np.uint8))
    made = []
    for _ in range(ROUNDS):
        made += [Case(f"{name} limited", partial(limited, start, name)) for name in COMMANDS]
        made += [Case(f"{name} on a full disk", partial(full, start, name)) for name in COMMANDS if not cannot_mount()]
    return made


def limited(start: Start, name: str, folder: Path, rng: Random) -> list[Fault]:
    """Run a program that may write no file beyond some size."""
    _fill(start, folder)
    size = int(2 ** rng.uniform(9, 18))
    return _run_and_check(name, folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def full(start: Start, name: str, folder: Path, rng: Random) -> list[Fault]:
    """Run a program on a disk that is nearly full."""
    disk = folder / "disk"
    disk.mkdir()
    _mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk))
    try:
        _fill(start, disk)
        status = os.statvfs(disk)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        free = int(rng.choice([0, 4096, 2 ** rng.uniform(12, 20)]))
        _mount("-o", f"remount,size={used + free}", str(disk))
        return _run_and_check(name, disk)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)


def _fill(start: Start, folder: Path) -> None:
    """What the user has before."""
    start.copy(folder, *PARTS)
    (folder / "image.npy").write_bytes((start.folder / "image.npy").read_bytes())
    for name in OLD:
        (folder / name).write_bytes(b"of the user")


def _run_and_check(name: str, folder: Path, before: Callable[[], None] | None = None) -> list[Fault]:
    """Faults of a program that may find no room: one line, old files whole, nothing half under a final name."""
    old = digest(folder)
    ended = run(*COMMANDS[name], folder, before)
    new = digest(folder)
    faults = check_end(ended)
    if ended.status == 0:
        return faults + (left_behind(folder) if name != "zarr" else [])
    kept = "earlier-" if name == "new training" else ""  # there the old files go to a folder of that name
    contents = list(new.values())
    for file, content in old.items():
        moved = bool(kept) and content in contents
        rewritten = "training" in name and file.startswith(("log/", BEST))
        if new.get(file) != content and not moved and not rewritten:
            faults.append(Fault("lost", f"{file} is {'changed' if file in new else 'gone'}"))
    return faults + _check_new(folder, sorted((new.keys() - old.keys()) | (new.keys() & {BEST})))


def _check_new(folder: Path, names: list[str]) -> list[Fault]:
    """Faults in files that a failed program has made."""
    faults = []
    for name in names:
        if name.endswith(".pth") and not is_hidden(name):
            try:
                read_checkpoint(folder / name)
            except BaseException as error:
                faults.append(Fault("lost" if is_refusal(error) else "traceback", f"{name}: {error}"))
        elif not name.startswith(("log/", "png/", "datasets/em/train/", "checkpoints/")):
            faults.append(Fault("lost", f"{name} lies there, though the program failed"))
    return faults


@lru_cache
def cannot_mount() -> str:
    """Why there can be no small disk; empty if there can."""
    if os.geteuid():
        return "needs root"
    try:
        _leave_mounts()
        _mount("-t", "tmpfs", "-o", "size=100k", "tmpfs", "/mnt")
        subprocess.run(["umount", "/mnt"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"can't mount: {error}"
    return ""


def _leave_mounts() -> None:
    """Take mounts of one's own, which nobody else sees, and which end with this process."""
    new_mounts = 0x00020000  # CLONE_NEWNS
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_mounts):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    subprocess.run(["mount", "--make-rprivate", "/"], check=True, capture_output=True)


def _mount(*argv: str) -> None:
    subprocess.run(["mount", *argv], check=True, capture_output=True)


PART = Part("disk", cases, quick=14, without=lambda: cannot_mount() and f"full file systems: {cannot_mount()}")
