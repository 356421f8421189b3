"""What programs write, for the parts that cut them off: the command, the state before, and who reads the result."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .cases import PREDICT, SMALL, TEST, TRAIN, Fault, Start, check_end, digest, last_line, left_behind
from .processes import Ended, run
from .project import PER_RUN, is_refusal, read_checkpoint

LOADED = "datasets", "checkpoints"
PROBE = ["--mode", "train", *SMALL, "--num_epoch", "1", "--scope", "probe"]
BEST = "checkpoints/unet/em/model_best.pth"  # may be of a later epoch than the newest checkpoint of a run that was cut
CURVES_END = "the training continues, but its curves end"
TRIES_AGAIN = "the training goes on, and tries again"  # after a checkpoint that a full disk had no room for
VOLUME = "datasets/em/train-volume.tif"
# entries of results that hold times, or the command
VARIABLE = ("index.html", "metrics.json", "figure.png")


@dataclass(frozen=True)
class Goal:
    """A program that replaces what lies under a path.

    Attributes
    ----------
    path : str
        What is written, relative to the case's folder.
    program, argv : str, list of str
        What writes it.
    parts : tuple of str
        Folders of the start that the case needs.
    old : list of str, optional
        Command that makes what lay there before, with the same program; none: nothing lies there.
    reader : (str, list of str), optional
        Program that reads the path next.
    ignore : tuple of str
        Names of files that differ between equal runs.
    each : bool
        Files appear one by one, each whole; else all of them at once.
    """

    path: str
    program: str
    argv: list[str]
    parts: tuple[str, ...] = LOADED
    old: list[str] | None = None
    reader: tuple[str, list[str]] | None = None
    ignore: tuple[str, ...] = ()
    each: bool = False

    def prepare(self, folder: Path, start: Start) -> None:
        """Fill the folder of a case."""
        start.copy(folder, *self.parts)
        np.save(folder / "wide.npy", _wide())
        if self.old is not None:
            start.must(self.program, self.old, folder)

    def digest(self, folder: Path) -> dict[str, str]:
        """What readers can see of the goal."""
        path = folder / self.path
        return _digest_zip(path) if path.suffix == ".pt" and path.exists() else digest(path, self.ignore)


def _digest_zip(path: Path) -> dict[str, str]:
    """SHA-256 of the entries of a TorchScript; the others tell which functions have called it."""
    try:
        with zipfile.ZipFile(path) as file:
            names = [name for name in file.namelist() if not name.endswith((".debug_pkl", "serialization_id"))]
            return {name: hashlib.sha256(file.read(name)).hexdigest() for name in names}
    except zipfile.BadZipFile:
        return {".": "damaged"}


def _wide() -> np.ndarray:
    """Image that is wide enough for a pyramid of two levels."""
    return np.random.default_rng(0).integers(0, 255, (1, 96, 1100), dtype=np.uint8)


def _predict(source: str, output: str, *flags: str) -> list[str]:
    return [*PREDICT, "--input", source, "--output", output, *flags]


def _export(kind: str, output: str, epoch: str = "0") -> list[str]:
    return ["--mode", "export", "--gpu_ids", "-1", "--epoch", epoch, "--format", kind, "--output", output]


OF_OBJECTS = ["--what", "mask,overlay,rois,table", "--link", "0.2"]  # no cells: OME-TIFFs differ by a random number


DATABASE = ["--overwrite", "--num_val", "2", "--num_test", "2", "--split", "random", "--seed", "5"]
TARGETS = {
    "database": Goal(
        "datasets/em",
        "run_make_database",
        DATABASE,
        ("datasets",),
        old=["--overwrite"],
        reader=("main", PROBE),
    ),
    "add": Goal(
        "datasets/em",
        "run_make_database",
        ["--add", "datasets/new/train-volume.tif", "--label", "datasets/new/train-labels.tif", "--replace"],
        ("datasets",),
        old=["--name_data", "new", "--synthetic", "4", "--size", "64", "--seed", "9"],
        reader=("main", PROBE),
    ),
    "test": Goal(
        "results/unet/em",
        "main",
        [*TEST, "--tta", "off", "--split", "train"],
        old=[*TEST, "--tta", "off"],
        reader=("display_result", ["--save", "figure.png"]),
        ignore=VARIABLE,
    ),
    "tif": Goal("p.tif", "main", _predict(VOLUME, "p.tif"), old=_predict("wide.npy", "p.tif")),
    "npy": Goal("p.npy", "main", _predict(VOLUME, "p.npy"), old=_predict("wide.npy", "p.npy")),
    "zarr": Goal("p.zarr", "main", _predict(VOLUME, "p.zarr"), old=_predict("wide.npy", "p.zarr")),
    "pyramid": Goal("p.zarr", "main", _predict("wide.npy", "p.zarr")),
    "png": Goal("png", "main", _predict(VOLUME, "png"), each=True),
    "objects": Goal(
        "objects",
        "main",
        _predict(VOLUME, "objects/p.tif", *OF_OBJECTS),
        old=_predict(VOLUME, "objects/p.tif", *OF_OBJECTS, "--section", "0:3"),
        each=True,
    ),
}


TARGETS |= {
    "new database": Goal(
        "datasets/em",
        "run_make_database",
        ["--overwrite", "--synthetic", "4", "--size", "64"],
        (),
        reader=("main", PROBE),
    ),
    "first test": Goal(
        "results/unet/em",
        "main",
        [*TEST, "--tta", "off"],
        reader=("display_result", ["--save", "f.png"]),
        ignore=VARIABLE,
    ),
    "compressed": Goal(
        "p.tif", "main", _predict(VOLUME, "p.tif", "--compression", "zlib"), old=_predict("wide.npy", "p.tif")
    ),
    "figure": Goal("f.png", "display_result", ["--save", "f.png"], ("results",), old=["--save", "f.png", "--num", "1"]),
    "torchscript": Goal("net.pt", "main", _export("torchscript", "net.pt"), old=_export("torchscript", "net.pt", "1")),
    "onnx": Goal("net.onnx", "main", _export("onnx", "net.onnx"), old=_export("onnx", "net.onnx", "1")),
}


@dataclass
class Reference:
    """A goal before and after an unbroken run, and the folder before it, which cases copy."""

    target: Goal
    before: Path
    old: dict[str, str]
    new: dict[str, str]
    seconds: float

    def copy(self, folder: Path) -> None:
        """Fill the folder of a case."""
        shutil.copytree(self.before, folder, dirs_exist_ok=True)

    def check_cut(self, folder: Path) -> list[Fault]:
        """Faults in what a cut-off run has left: the next reader sees the old or the new whole, or one line."""
        faults = []
        if self.target.reader:
            ended = run(*self.target.reader, folder)
            faults += check_end(ended)
            shutil.rmtree(folder / "checkpoints/probe", ignore_errors=True)
            if ended.status:
                return faults  # it has refused, so it did not read a mixture
        now = self.target.digest(folder)
        whole = now in (self.old, self.new) or (self.target.each and now.items() <= self.new.items() | self.old.items())
        if not whole and now:
            faults.append(Fault("mixed", _difference(now, self.old, self.new)))
        elif not whole and self.old:
            faults.append(Fault("lost", f"{self.target.path} is gone"))
        return faults

    def check_again(self, folder: Path) -> list[Fault]:
        """Faults of a second run, which has to make what the unbroken run made."""
        ended = run(self.target.program, self.target.argv, folder)
        faults = check_end(ended)
        if ended.status:
            return [*faults, Fault("lost", f"the second run fails: {last_line(ended)}")]
        if (now := self.target.digest(folder)) != self.new:
            faults.append(Fault("mixed", "after a second run: " + _difference(now, self.old, self.new)))
        return faults + left_behind(folder)


def _difference(now: dict[str, str], old: dict[str, str], new: dict[str, str]) -> str:
    """In words, how files differ from the old and the new ones."""
    of_old = sorted(name for name in now if now[name] == old.get(name) != new.get(name))
    of_new = sorted(name for name in now if now[name] == new.get(name) != old.get(name))
    of_none = sorted(name for name in now if now[name] not in (old.get(name), new.get(name)))
    missing = sorted((new.keys() & old.keys() or new.keys()) - now.keys())
    groups = {"old": of_old, "new": of_new, "neither": of_none, "missing": missing}
    return "; ".join(f"{name}: {', '.join(files[:4])}" for name, files in groups.items() if files)


def measure(name: str, start: Start, root: Path) -> Reference:
    """Do a target once, without a cut."""
    target, before, after = TARGETS[name], root / f"before-{name}", root / f"after-{name}"
    before.mkdir(parents=True)
    target.prepare(before, start)
    reference = Reference(target, before, target.digest(before), {}, 0.0)
    reference.copy(after)
    reference.seconds = start.must(target.program, target.argv, after).seconds
    reference.new = target.digest(after)
    if target.reader:  # one that always refuses would find nothing
        start.must(*target.reader, after)
    return reference


@dataclass
class Training:
    """A training that is cut off and resumed, compared with the unbroken one."""

    argv: list[str]
    folder: Path
    seconds: float

    @classmethod
    def unbroken(cls, start: Start, folder: Path, epochs: int) -> Training:
        """Train once, without a cut."""
        folder.mkdir(parents=True)
        start.copy(folder, "datasets")
        argv = [*TRAIN, "--num_epoch", str(epochs), "--num_freq_disp", "2", "--seed", "3"]
        return cls(argv, folder, start.must("main", argv, folder).seconds)

    def next_argv(self, folder: Path) -> list[str]:
        """Command that goes on, or begins where there is no checkpoint yet."""
        return [*self.argv, *(["--train_continue", "on"] if _checkpoints(folder) else [])]

    def made(self) -> list[str]:
        """Checkpoints of the unbroken run."""
        return [str(path.relative_to(self.folder)) for path in [*_checkpoints(self.folder), self.folder / BEST]]

    def check_cut(self, folder: Path) -> list[Fault]:
        """Faults in the checkpoints of a run that was cut off: each must load and be the unbroken run's."""
        faults = []
        best = [folder / BEST] if (folder / BEST).exists() else []
        for path in [*_checkpoints(folder), *best]:
            try:
                state = read_checkpoint(path)
            except BaseException as error:
                kind = "lost" if is_refusal(error) else "traceback"
                faults.append(Fault(kind, f"{path.name}: {error}"))
                continue
            if state["whole"] and path.name != Path(BEST).name:
                faults += _compare(state, self.folder / path.relative_to(folder), path.name)
        return faults

    def check_done(self, folder: Path, ended: Ended) -> list[Fault]:
        """Faults in the run that was resumed to its end: weights, moments and curves are the unbroken run's."""
        if ended.status:
            return [Fault("lost", f"can't be resumed: {last_line(ended)}")]
        names, expected = ({path.name for path in _checkpoints(root)} for root in (folder, self.folder))
        faults = [Fault("lost", f"no {name}") for name in sorted(expected - names)]
        if TRIES_AGAIN in ended.err and max(expected) in names:
            faults = []
        faults += self.check_cut(folder) + left_behind(folder)
        if not faults:
            faults += _compare(read_checkpoint(folder / BEST), self.folder / BEST, "model_best.pth")
        if CURVES_END in ended.err:  # a full disk of the log ends the curves, which is said
            return faults
        return faults + _compare_curves(folder, self.folder)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoints/unet/em/model_epoch*.pth"))


def _compare(state: dict, path: Path, name: str) -> list[Fault]:
    """Fault if a checkpoint differs from the unbroken run's of that epoch."""
    expected = read_checkpoint(path)
    keys = (state.keys() | expected.keys()) - PER_RUN
    different = sorted(key for key in keys if not same(state.get(key), expected.get(key)))
    return [Fault("lost", f"{name} differs from the unbroken run's in {', '.join(different)}")] if different else []


def same(one: object, other: object) -> bool:
    """Whether nested tensors and values are equal bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "numpy"):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    return one == other or (one != one and other != other)


def _compare_curves(folder: Path, reference: Path) -> list[Fault]:
    """Faults in what TensorBoard shows: each epoch once, with the unbroken run's values."""
    curves, expected = (_curves(root / "log/unet/em") for root in (folder, reference))
    faults = [Fault("lost", f"TensorBoard: no {tag}") for tag in sorted(expected.keys() - curves.keys())]
    for tag in sorted(expected.keys() & curves.keys()):
        if [step for step, _ in curves[tag]] != [step for step, _ in expected[tag]]:
            faults.append(Fault("lost", f"TensorBoard: {tag} has epochs {[step for step, _ in curves[tag]]}"))
        elif curves[tag] != expected[tag] and "per_second" not in tag:
            faults.append(Fault("lost", f"TensorBoard: {tag} differs from the unbroken run's"))
    return faults


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each tag; pictures have the value 0."""
    import logging

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars | {tag: [(e.step, 0.0) for e in events.Images(tag)] for tag in events.Tags()["images"]}
