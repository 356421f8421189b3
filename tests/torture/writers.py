"""Two programs at once on the same folders: one may go on, the other says why not, and nothing is mixed."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from random import Random

from .cases import PREDICT, TEST, TRAIN, Case, Fault, Part, Start, check_end, digest, left_behind
from .processes import Child, Ended, run
from .project import read_checkpoint
from .targets import VARIABLE, VOLUME

ROUNDS = 4
OVERWRITE = ["--overwrite", "--num_val"]
ENDINGS = ("p.tif", "p.npy", "p.zarr", "png")


def cases(start: Start) -> list[Case]:
    """Each pair of programs, several times with other delays between them."""
    made = []
    for _ in range(ROUNDS):
        made.append(Case("two trainings", partial(two_trainings, start)))
        made.append(Case("training and test", partial(training_and_test, start)))
        made.append(Case("training and --overwrite", partial(training_and_overwrite, start)))
        made.append(Case("two databases", partial(two_databases, start)))
        made.append(Case("two tests", partial(two_tests, start)))
        made += [Case(f"two predictions {name}", partial(two_predictions, start, name)) for name in ENDINGS]
    return made


def two_trainings(start: Start, folder: Path, rng: Random) -> list[Fault]:
    """Two trainings of one scope with different seeds: all checkpoints and arg.txt are of one of them."""
    start.copy(folder, "datasets")
    commands = [("main", [*TRAIN, "--num_epoch", "8", "--seed", str(seed)]) for seed in (1, 2)]
    first, second = _both(commands, folder, rng.choice([0, 0.1, 0.5, 1.0]))
    faults = _check_pair(first, second)
    checkpoints = sorted(folder.glob("checkpoints/unet/em/*.pth"))
    seeds = {read_checkpoint(path)["config"]["seed"] for path in checkpoints}
    arguments = (folder / "log/unet/em/arg.txt").read_text("utf-8")
    if len(seeds) != 1 or not any(f"--seed {seed}" in " ".join(arguments.split()) for seed in seeds):
        faults.append(Fault("mixed", f"checkpoints of seeds {sorted(seeds)} in one folder, or another one's arg.txt"))
    kept = list(folder.glob("checkpoints/unet/em/earlier-*/model_epoch*.pth"))
    if first.status == second.status == 0 and len(kept) != 8:
        faults.append(Fault("lost", "both trainings ended well, but the first one's checkpoints are not all kept"))
    return faults + left_behind(folder)


def training_and_test(start: Start, folder: Path, _rng: Random) -> list[Fault]:
    """Tests while a training writes checkpoints: each reads a whole one, or says why not."""
    start.copy(folder, "datasets")
    training = Child("main", [*TRAIN, "--num_epoch", "8"], folder)
    faults = []
    while not training.poll():
        if list(folder.glob("checkpoints/unet/em/*.pth")):
            faults += check_end(run("main", [*TEST, "--tta", "off"], folder))
        time.sleep(0.05)
    return faults + check_end(training.wait(), (0,)) + left_behind(folder)


def training_and_overwrite(start: Start, folder: Path, rng: Random) -> list[Fault]:
    """`--overwrite` beside a training that streams its samples is refused."""
    start.copy(folder, "datasets")
    before = digest(folder / "datasets/em")
    streams = ["--cache_gb", "0", "--num_workers", str(rng.choice([0, 1]))]
    training = Child("main", [*TRAIN, "--num_epoch", "10", *streams], folder)
    while not training.poll() and not list(folder.glob("checkpoints/unet/em/*.pth")):
        time.sleep(0.01)
    ended = run("run_make_database", [*OVERWRITE, "3"], folder)
    running = not training.poll()
    faults = check_end(ended) + check_end(training.wait(), (0,))
    if ended.status == 0 and running:
        faults.append(Fault("mixed", "the database was replaced under a training that streams it"))
    if ended.status and digest(folder / "datasets/em") != before:
        faults.append(Fault("lost", "the database has changed, though --overwrite was refused"))
    return faults + left_behind(folder)


def two_databases(start: Start, folder: Path, rng: Random) -> list[Fault]:
    """Two `--overwrite` with different splits: the samples are those that dataset.json names."""
    start.copy(folder, "datasets")
    commands = [("run_make_database", [*OVERWRITE, str(num), "--num_test", str(4 - num)]) for num in (1, 3)]
    pair = _both(commands, folder, rng.choice([0, 0.02, 0.1]))
    faults = _check_pair(*pair)
    database = folder / "datasets/em"
    named = json.loads((database / "dataset.json").read_text("utf-8"))["samples"]
    numbers = {split: len([*database.glob(f"{split}/[0-9]*[0-9].npy")]) for split in named}
    if numbers != {split: len(samples) for split, samples in named.items()}:
        faults.append(Fault("mixed", f"dataset.json names other samples than there are: {numbers}"))
    return faults + left_behind(folder)


def two_tests(start: Start, folder: Path, rng: Random) -> list[Fault]:
    """Two tests of different splits: pictures and scores are of one of them."""
    commands = [("main", [*TEST, "--tta", "off", "--split", split]) for split in ("train", "val")]
    return _two_targets(start, commands, "results/unet/em", folder, rng, VARIABLE)


def two_predictions(start: Start, name: str, folder: Path, rng: Random) -> list[Fault]:
    """Two predictions of one name, with and without augmentation: the result is that of one of them."""
    argv = [*PREDICT, "--input", VOLUME, "--output", name]
    commands = [("main", [*argv, "--tta", tta]) for tta in ("on", "off")]
    return _two_targets(start, commands, name, folder, rng)


def _two_targets(
    start: Start,
    commands: list[tuple[str, list[str]]],
    target: str,
    folder: Path,
    rng: Random,
    ignore: tuple[str, ...] = (),
) -> list[Fault]:
    """Two commands that write the same goal: it is whole, and that of one that ended well."""
    expected = []
    for number, (program, argv) in enumerate(commands):
        place = folder / f"alone-{number}"
        start.copy(place, "datasets", "checkpoints")
        start.must(program, argv, place)
        expected.append(digest(place / target, ignore))
    together = folder / "together"
    start.copy(together, "datasets", "checkpoints")
    pair = _both(commands, together, rng.choice([0, 0.02, 0.1, 0.3]))
    faults = _check_pair(*pair)
    good = [made for made, ended in zip(expected, pair, strict=True) if ended.status == 0]
    if digest(together / target, ignore) not in good:
        faults.append(Fault("mixed", f"{target} is the result of neither command that ended well"))
    return faults + left_behind(together)


def _both(commands: list[tuple[str, list[str]]], folder: Path, delay: float) -> tuple[Ended, Ended]:
    """Run two commands at once, the second some seconds after the first."""
    first = Child(*commands[0], folder)
    time.sleep(delay)
    second = Child(*commands[1], folder)
    return first.wait(), second.wait()


def _check_pair(first: Ended, second: Ended) -> list[Fault]:
    """Faults in how two programs ended: at least one well."""
    faults = check_end(first) + check_end(second)
    if first.status and second.status:
        faults.append(Fault("lost", f"neither has done its work: {first.err.strip()} / {second.err.strip()}"[:400]))
    return faults


PART = Part("writers", cases, quick=9)
