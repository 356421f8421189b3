"""SIGKILL at random moments: of a training, which is then resumed, and of everything else that writes."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from random import Random

from .cases import Case, Fault, Part, Start, check_end
from .processes import Child, run
from .targets import Reference, Training, measure

EPOCHS = 6
NUM_TRAINING = 100
NUM = {"database": 26, "test": 20, "tif": 18, "zarr": 14, "pyramid": 12, "png": 10}  # 200 with the trainings


def cases(start: Start) -> list[Case]:
    """All kills, in an order that mixes the programs."""
    folder = start.folder.with_name("kills-reference")
    training = Training.unbroken(start, folder / "training", EPOCHS)
    made = [Case("training", partial(kill_training, start, training)) for _ in range(NUM_TRAINING)]
    for name, num in NUM.items():
        reference = measure(name, start, folder)
        made += [Case(name, partial(kill_target, reference)) for _ in range(num)]
    return made


def kill_training(start: Start, training: Training, folder: Path, rng: Random) -> list[Fault]:
    """Kill a training one to three times, half of them after a new checkpoint, and resume it."""
    start.copy(folder, "datasets")
    faults = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        child = Child("main", training.next_argv(folder), folder)
        after = len(list(folder.glob("checkpoints/unet/em/*.pth"))) if rng.random() < 0.5 else None
        _kill_late(child, folder, rng.uniform(0, training.seconds), after)
        faults += training.check_cut(folder)
        if faults:
            return faults
    ended = run("main", training.next_argv(folder), folder)
    return check_end(ended) + training.check_done(folder, ended)


def _kill_late(child: Child, folder: Path, seconds: float, after: int | None) -> None:
    """Kill after some seconds, or a part of them after the folder has more than so many checkpoints."""
    until = time.monotonic() + seconds
    while not child.poll() and time.monotonic() < until:
        if after is not None and len(list(folder.glob("checkpoints/unet/em/*.pth"))) > after:
            until, after = time.monotonic() + seconds / 6, None
        elif after is not None:
            until = time.monotonic() + seconds
        time.sleep(0.002)
    child.kill()


def kill_target(reference: Reference, folder: Path, rng: Random) -> list[Fault]:
    """Kill a program while it runs; if it was faster, kill another run sooner."""
    share = rng.uniform(0.1, 1.0)
    reference.copy(folder)
    while True:
        child = Child(reference.target.program, reference.target.argv, folder)
        time.sleep(share * reference.seconds)
        if not child.poll():
            break
        share *= 0.7
    child.kill()
    return reference.check_cut(folder) + reference.check_again(folder)


PART = Part("kills", cases, quick=10)
