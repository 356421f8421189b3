"""A power cut before each file operation of each program, and after its end: the old or the new is left, whole.

By a model of a disk that loses whatever was not synced, and where root may mount also on ext4 on a loop device.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import partial
from pathlib import Path
from random import Random

from .cases import Case, Fault, Part, Start, check_end, left_behind
from .crashpoints import Tripwire
from .disk import cannot_mount
from .powercut import Cut, Recorder, cuts, recorded, tree_of, write_tree
from .processes import run
from .targets import TARGETS, Reference, Training

EPOCHS = 2
SHARES = 8  # cases of one program, each with a part of its cuts
ROUNDS = 4  # cuts of one program on ext4
ARGUMENTS = "log/unet/em/arg.txt"


def cases(start: Start) -> list[Case]:
    """Cuts of each program, in several cases; then some on ext4."""
    made = []
    for share in range(SHARES):
        made += [Case(name, partial(cut_target, start, name, share), 600.0) for name in TARGETS]
        made.append(Case("training", partial(cut_training, start, share), 600.0))
    if not cannot_mount():
        made += [Case(f"{name} on ext4", partial(cut_ext4, start, name, n)) for n in range(ROUNDS) for name in TARGETS]
    return made


def _record(program: str, argv: list[str], folder: Path, rng: Random) -> list[Cut]:
    """Run a program, and say what power cuts may leave."""
    before, note = tree_of(folder), folder.with_name(f"{folder.name}.operations")
    ended = run(program, argv, folder, Recorder(folder, note).install)
    if ended.status != 0:
        raise RuntimeError(f"{ended.command} ended with status {ended.status}: {ended.err[-2000:]}")
    found = cuts(before, recorded(note), rng)
    note.unlink()
    return found


def cut_target(start: Start, name: str, share: int, folder: Path, rng: Random) -> list[Fault]:
    """Cut a program off, look at what is left, and run it again."""
    reference = _before(start, name, folder)
    done = folder / "done"
    reference.copy(done)
    found = _record(reference.target.program, reference.target.argv, done, rng)
    reference.new = reference.target.digest(done)
    faults = []
    for cut in found[share::SHARES]:
        trial = folder / "trial"
        write_tree(trial, cut.tree)
        now = reference.target.digest(trial)
        some = reference.check_cut(trial)
        if cut.last and now != reference.new and not some:
            some.append(Fault("lost", "the program had ended, but what it has made is not there"))
        some += reference.check_again(trial)
        faults += [Fault(fault.kind, f"cut {cut.operation}: {fault.text}") for fault in some]
        shutil.rmtree(trial)
    return faults


def _before(start: Start, name: str, folder: Path) -> Reference:
    """What lies there before a target."""
    target, before = TARGETS[name], folder / "before"
    before.mkdir()
    target.prepare(before, start)
    return Reference(target, before, target.digest(before), {}, 0.0)


def cut_training(start: Start, share: int, folder: Path, rng: Random) -> list[Fault]:
    """Cut a training off, and resume it; its curves, which are written continuously, may lack what was not synced."""
    done = folder / "done"
    training = Training.unbroken(start, folder / "unbroken", EPOCHS)
    done.mkdir()
    start.copy(done, "datasets")
    found = _record("main", training.argv, done, rng)
    faults = []
    for cut in found[share::SHARES]:
        trial = folder / "trial"
        write_tree(trial, cut.tree)
        some = training.check_cut(trial)
        if cut.last:
            missing = [name for name in (ARGUMENTS, *training.made()) if not (trial / name).exists()]
            some += [Fault("lost", f"the training had ended, but {name} is not there") for name in missing]
        ended = run("main", training.next_argv(trial), trial)
        some += check_end(ended, (0,)) + training.check_cut(trial) + left_behind(trial)
        faults += [Fault(fault.kind, f"cut {cut.operation}: {fault.text}") for fault in some]
        shutil.rmtree(trial)
    return faults


def cut_ext4(start: Start, name: str, number: int, folder: Path, rng: Random) -> list[Fault]:
    """Cut a program off on ext4, at its end or before: what is on the disk then is in the file behind its device."""
    reference, image, disk = _before(start, name, folder), folder / "image", folder / "disk"
    _make_ext4(image)
    _mount(image, disk)
    try:
        reference.copy(disk / "work")
        _sync(disk)
        target, operation = reference.target, -1 if number % 2 else rng.randrange(120)
        ended = run(target.program, target.argv, disk / "work", Tripwire(disk / "work", operation, "kill").install)
        if rng.random() < 0.7:
            _write_journal(disk)
        subprocess.run(["cp", "--sparse=always", image, folder / "cut"], check=True)
        reference.copy(folder / "done")
        start.must(target.program, target.argv, folder / "done")
        reference.new = target.digest(folder / "done")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=False)
    _mount(folder / "cut", disk)
    try:
        now = target.digest(disk / "work")
        faults = reference.check_cut(disk / "work")
        if ended.status == 0 and now != reference.new and not faults:
            faults.append(Fault("lost", "the program had ended, but what it has made is not there"))
        return faults + reference.check_again(disk / "work")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=False)


def _make_ext4(image: Path) -> None:
    with image.open("wb") as file:
        file.truncate(96 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, capture_output=True)


def _mount(image: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True, capture_output=True)


def _sync(folder: Path) -> None:
    subprocess.run(["sync", "--file-system", folder], check=True)


def _write_journal(folder: Path) -> None:
    """Have the names on the disk, as ext4 does every five seconds; the content of files follows later."""
    descriptor = os.open(folder / "unrelated", os.O_CREAT | os.O_WRONLY)
    os.fsync(descriptor)
    os.close(descriptor)


PART = Part("power", cases, quick=6, without=lambda: cannot_mount() and f"ext4: {cannot_mount()}")
