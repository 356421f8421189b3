"""Damaged files: each must be read, or refused in one line, in seconds and within 2 GB."""

from __future__ import annotations

import io
import json
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import torch

from . import seeds
from .cases import PREDICT, TEST, TRAIN, Case, Fault, Part, Start, check_end
from .mutate import VALUES, damage_bytes, damage_text, damage_tree
from .processes import run
from .project import is_refusal, read_checkpoint, read_images, read_samples

LIMIT = 20.0  # [s] for one file
TINY = ["--nch_ker", "1", "--ny_load", "32", "--nx_load", "32", "--elastic", "0"]


@dataclass
class Whole:
    """What whole commands need: a tiny database, a checkpoint and results, and Zarr files."""

    folder: Path

    @classmethod
    def make(cls, start: Start, folder: Path) -> Whole:
        """Run the programs once."""
        folder.mkdir()
        start.must("run_make_database", ["--synthetic", "4", "--size", "32"], folder)
        start.must("main", [*TRAIN, *TINY, "--num_epoch", "1"], folder)
        start.must("main", [*TEST, "--tta", "off"], folder)
        (folder / "zarrs").mkdir()
        seeds.write_zarrs(folder / "zarrs")
        return cls(folder)

    def copy(self, target: Path, *parts: str) -> None:
        """Copy folders into that of a case."""
        for part in parts:
            shutil.copytree(self.folder / part, target / part)


def cases(start: Start) -> Sequence[Case]:
    """As many cases of each kind of file as the table says, mixed."""
    whole = Whole.make(start, start.folder.with_name("fuzz-whole"))
    made = [Case(name, partial(trial, whole), LIMIT) for name, (trial, num) in TRIALS.items() for _ in range(num)]
    Random(0).shuffle(made)
    return made


def _damaged_npy(data: bytes, rng: Random) -> bytes:
    """A `.npy` with bytes damaged, or with another text in its header and the right length."""
    if rng.random() < 0.5:
        return damage_bytes(data, rng, 130)
    length = struct.unpack("<H", data[8:10])[0]
    head = damage_text(data[10 : 10 + length].decode("latin1").rstrip(), rng).encode()[:65000] + b"\n"
    return data[:8] + struct.pack("<H", len(head)) + head + data[10 + length :]


def _read(read: Callable[[Path], object], path: Path) -> list[Fault]:
    """Faults of a reader: anything raised that no program turns into one line."""
    try:
        with warnings.catch_warnings(action="ignore"):
            read(path)
    except Exception as error:
        if not is_refusal(error):
            raise
    return []


def array_image(_whole: Whole, folder: Path, rng: Random) -> list[Fault]:
    """A `.npy` image."""
    path = folder / "a.npy"
    path.write_bytes(_damaged_npy(rng.choice(seeds.arrays()), rng))
    return _read(read_images, path)


def sample(_whole: Whole, folder: Path, rng: Random) -> list[Fault]:
    """A sample of a database."""
    (folder / "00000.npy").write_bytes(_damaged_npy(rng.choice(seeds.samples()), rng))
    return _read(read_samples, folder)


def tiff(_whole: Whole, folder: Path, rng: Random) -> list[Fault]:
    """A TIFF."""
    data, path = rng.choice(seeds.tiffs()), folder / "a.tif"
    path.write_bytes(damage_bytes(data, rng, rng.choice([64, 600, len(data)])))
    return _read(read_images, path)


def picture(_whole: Whole, folder: Path, rng: Random) -> list[Fault]:
    """A PNG, JPEG, GIF or BMP."""
    ending, data = rng.choice(seeds.pictures())
    path = folder / f"a.{ending}"
    path.write_bytes(damage_bytes(data, rng, rng.choice([40, 100, 400])))
    return _read(read_images, path)


def zarr(whole: Whole, folder: Path, rng: Random) -> list[Fault]:
    """A Zarr with one file damaged, mostly a description."""
    source = rng.choice(sorted((whole.folder / "zarrs").iterdir()))
    target = folder / source.name
    shutil.copytree(source, target)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    described = [path for path in files if path.name.startswith((".z", "zarr.json"))]
    file = rng.choice(described if rng.random() < 0.7 else files)
    if file in described:
        file.write_bytes(_damaged_json(file.read_bytes(), rng))
    else:
        file.write_bytes(damage_bytes(file.read_bytes(), rng, 100))
    return _read(read_images, target)


def _damaged_json(data: bytes, rng: Random) -> bytes:
    chance = rng.random()
    if chance < 0.6:
        return json.dumps(damage_tree(json.loads(data), rng)).encode()
    return damage_text(data.decode(), rng).encode() if chance < 0.85 else damage_bytes(data, rng, 600)


def checkpoint_bytes(whole: Whole, folder: Path, rng: Random) -> list[Fault]:
    """A checkpoint with bytes damaged, or its pickle damaged and the checksums right."""
    path = folder / "model_epoch0001.pth"
    data = _checkpoint(whole).read_bytes()
    if rng.random() < 0.5:
        path.write_bytes(damage_bytes(data, rng, rng.choice([200, 2000, len(data)])))
    else:
        _rezip(data, path, rng)
    return _read(read_checkpoint, path)


def _rezip(data: bytes, path: Path, rng: Random) -> None:
    """Flip one or two bits of the pickle in a checkpoint."""
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            content = bytearray(old.read(item))
            for _ in range(rng.choice([1, 1, 2]) if item.filename.endswith("data.pkl") else 0):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            new.writestr(item.filename, bytes(content))


def _checkpoint(whole: Whole) -> Path:
    return whole.folder / "checkpoints/unet/em/model_epoch0001.pth"


def checkpoint_state(whole: Whole, folder: Path, rng: Random) -> list[Fault]:
    """A checkpoint with entries of a wrong type, to test, predict or resume from."""
    whole.copy(folder, "datasets", "checkpoints")
    state = torch.load(_checkpoint(whole), weights_only=True)
    values = [*VALUES, torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(0)]
    key = rng.choice(sorted(state))
    inside = isinstance(state[key], dict) and rng.random() < 0.85
    state[key] = damage_tree(state[key], rng, values) if inside else rng.choice(values)
    torch.save(state, folder / "checkpoints/unet/em/model_epoch0001.pth")
    predict = [*PREDICT, "--input", "datasets/em/train-volume.tif", "--output", "o.npy"]
    resume = [*TRAIN, *TINY, "--num_epoch", "2", "--train_continue", "on"]
    return _command("main", rng.choice([[*TEST, "--tta", "off"], predict, resume]), folder)


def description(whole: Whole, folder: Path, rng: Random) -> list[Fault]:
    """A damaged dataset.json, to train or test with."""
    whole.copy(folder, "datasets", "checkpoints")
    path = folder / "datasets/em/dataset.json"
    path.write_bytes(_damaged_json(path.read_bytes(), rng))
    train = [*TRAIN, *TINY, "--num_epoch", "1", "--scope", "x", "--normalize", "data"]
    return _command("main", rng.choice([train, [*TEST, "--tta", "off"]]), folder)


def distance(whole: Whole, folder: Path, rng: Random) -> list[Fault]:
    """A damaged distance file beside a sample."""
    whole.copy(folder, "datasets")
    path = folder / "datasets/em/train/00000.distance.npy"
    path.write_bytes(_damaged_npy(path.read_bytes(), rng))
    return _command("main", [*TRAIN, *TINY, "--num_epoch", "1"], folder)


def result(whole: Whole, folder: Path, rng: Random) -> list[Fault]:
    """A damaged picture of a test, for the figure."""
    whole.copy(folder, "results")
    path = rng.choice(sorted((folder / "results/unet/em/images").glob("*.png")))
    other = [data for ending, data in seeds.pictures() if ending == "png"]
    path.write_bytes(damage_bytes(rng.choice([path.read_bytes(), *other]), rng, rng.choice([40, 100, 400])))
    return _command("display_result", ["--save", "figure.png"], folder)


def _command(program: str, argv: list[str], folder: Path) -> list[Fault]:
    """Faults of a program that must end in time."""
    return check_end(run(program, argv, folder, limit=LIMIT - 5), (0, 1, 2))


Trial = Callable[[Whole, Path, Random], list[Fault]]
TRIALS: dict[str, tuple[Trial, int]] = {  # and how many of each
    "npy image": (array_image, 11500),
    "sample": (sample, 11500),
    "tiff": (tiff, 9000),
    "picture": (picture, 10000),
    "zarr": (zarr, 4000),
    "checkpoint bytes": (checkpoint_bytes, 3000),
    "checkpoint entries": (checkpoint_state, 400),
    "dataset.json": (description, 400),
    "distance": (distance, 100),
    "result picture": (result, 100),
}
PART = Part("fuzz", cases, quick=1500)
