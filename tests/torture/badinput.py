"""Commands that are wrong: each ends with one line and status 1 or 2, and changes nothing on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import tifffile
from PIL import Image

from .cases import PREDICT, SMALL, TEST, Case, Fault, Part, Start, check_end, digest
from .processes import run
from .project import FLAGS

LIMIT = 10.0  # [s] for one command
NOBODY = 65534
PARTS = ("datasets", "checkpoints", "results")
VOLUME, LABELS = "datasets/em/train-volume.tif", "datasets/em/train-labels.tif"
TRAIN = ["--mode", "train", *SMALL, "--num_epoch", "1", "--scope", "new"]
RESUME = ["--mode", "train", *SMALL, "--num_epoch", "9", "--train_continue", "on"]
NEW = ["--name_data", "new"]
BASE = {"main": TRAIN, "run_make_database": [*NEW, "--input", VOLUME, "--label", LABELS], "display_result": []}
HUGE = str(10**30)
# elsewhere it is a long run, or as much as there is
HUGE_IS_WRONG = {"nch_ker", "nch_in", "nch_out", "elastic_grid", "context"}
Argv = list[str]


def cases(start: Start) -> list[Case]:
    """All wrong commands: of every flag by its type and rule, then by hand."""
    inputs = start.folder.with_name("bad-inputs")
    make_inputs(inputs)
    commands = [(f"--{item.name}", program, argv) for program in FLAGS for item, argv in wrong_values(program)]
    commands += [("files", program, argv) for program, argv in wrong_files()]
    commands += [("flags", program, argv) for program, argv in wrong_together()]
    made = [Case(name, partial(wrong, start, inputs, prog, argv, None)) for name, prog, argv in commands]
    made += [Case(name, partial(wrong, start, inputs, *BROKEN[name])) for name in BROKEN]
    made += [Case("no rights", partial(wrong, start, inputs, program, argv, forbid)) for program, argv in FORBIDDEN]
    return made


def wrong(
    start: Start,
    inputs: Path,
    program: str,
    argv: Argv,
    prepare: Callable[[Path], Callable[[], None] | None] | None,
    folder: Path,
    _rng: Random,
) -> list[Fault]:
    """Run a wrong command."""
    start.copy(folder, *PARTS)
    shutil.copytree(inputs, folder / "in", symlinks=True, copy_function=_copy)
    rights = prepare(folder) if prepare else None
    old = _all_files(folder)
    ended = run(program, argv, folder, rights, LIMIT)
    faults = check_end(ended, (1, 2))
    new = _all_files(folder)
    if ended.status and old != new:
        names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        faults.append(Fault("lost", f"{ended.command}: made, changed or removed {', '.join(names[:5])}"))
    return faults


def _copy(source: str, target: str) -> None:
    """Copy a file, or make the named pipe again."""
    if Path(source).is_fifo():
        os.mkfifo(target)
    else:
        shutil.copy2(source, target)


def _all_files(folder: Path) -> dict[str, str]:
    """Digests of files, and the names of pipes and folders; not of what a training computes once and keeps."""
    others = {str(p.relative_to(folder)): "" for p in folder.rglob("*") if p.is_fifo() or p.is_dir()}
    return {name: made for name, made in (digest(folder) | others).items() if not name.endswith(".distance.npy")}


def wrong_values(program: str) -> Iterator[tuple[Field, Argv]]:
    """Each flag of a program with values that its type, choices or rule can't take."""
    for item in fields(FLAGS[program]):
        for value in [*_of_type(item), *_against_rule(item), *_of_name(item)]:
            base = TEST if item.name == "dir_result" and program == "main" else BASE[program]
            yield item, [*base, f"--{item.name}={value}"]


def _of_type(item: Field) -> list[str]:
    """Texts that are no value of the flag's type."""
    kind = type(item.default)
    if item.metadata["choices"]:
        return ["nonsense", ""]
    if kind is bool:
        return ["maybe", "1"]
    if kind is int:
        return ["x", "1.5", "", *([HUGE] if item.name in HUGE_IS_WRONG else [])]
    return ["x", "", "inf"] if kind is float else []


def _against_rule(item: Field) -> list[str]:
    """Numbers that break the flag's rule."""
    rule, kind = item.metadata["rule"], type(item.default)
    if not rule or kind not in (int, float):
        return []
    candidates = [-2, -1, 0, 1, 101] if kind is int else [float("nan"), -1.0, 0.0, 1.0, 101.0]
    return [str(value) for value in candidates if not rule[0](value)]


def _of_name(item: Field) -> list[str]:
    """Names and folders that can't be."""
    if item.name in ("scope", "name_data"):
        return ["", " ", ".", "..", "../x", "a/b", "a\\b", "a\nb", "x" * 300, "\x1b[31m"]
    return ["in/file", "/dev/null", "in/loop", "/proc/nothing"] if item.name.startswith("dir_") else []


def make_inputs(folder: Path) -> None:
    """Files and folders that are no images, or the wrong ones."""
    folder.mkdir()
    for name, data in {"file": b"x", "empty.tif": b"", "text.tif": b"hello", "text.png": b"hello"}.items():
        (folder / name).write_bytes(data)
    for name in ("fifo", "fifo.tif", "pipes/a.tif"):
        (folder / name).parent.mkdir(exist_ok=True)
        os.mkfifo(folder / name)
    for name in ("emptydir", "dir.tif", "d.png", "d.onnx", "folders/a.tif", "z.zarr"):
        (folder / name).mkdir(parents=True)
    for name, target in {
        "loop": "loop",
        "loop.tif": "loop.tif",
        "broken.tif": "nowhere",
        "links/a.tif": "gone",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(target)
    (folder / "z.zarr/zarr.json").write_text("{}")
    _make_arrays(folder)
    _make_labels(folder)


def _make_arrays(folder: Path) -> None:
    """Arrays that are no images, and images that don't go together."""
    arrays = {
        "complex": np.zeros((9, 9), complex),
        "text": np.array([["a"]]),
        "rgb": np.zeros((32, 32, 3), np.uint8),
        "nan": np.full((32, 32), np.nan, np.float32),
        "inf": np.full((32, 32), np.inf, np.float32),
        "5d": np.zeros((2, 2, 2, 9, 9), np.uint8),
        "zero": np.zeros((0, 9), np.uint8),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "pickle.npy", np.array([[{}, 1]], object), allow_pickle=True)
    with (folder / "claims.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6)}
        np.lib.format.write_array_header_1_0(file, header)
    for name in ("same/a.png", "same/a.bmp", "jpegs/a.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(folder / name)


def _make_labels(folder: Path) -> None:
    """Label stacks that don't fit eight sections of 64 px, or no training."""
    rng, size = np.random.default_rng(0), (8, 64, 64)
    stacks = {
        "three": np.zeros((3, 64, 64), np.uint8),
        "forty": np.arange(8 * 64 * 64, dtype=np.uint16).reshape(size) % 40,
        "small": np.zeros((8, 32, 64), np.uint8),
        "nan": np.full(size, np.nan, np.float32),
        "float": rng.random(size, np.float32),
        "negative": np.full(size, -1, np.int16),
    }
    for name, stack in stacks.items():
        tifffile.imwrite(folder / f"label-{name}.tif", stack, photometric="minisblack")


def wrong_files() -> Iterator[tuple[str, Argv]]:
    """Inputs and outputs that can't be."""
    names = (
        "nothing.tif emptydir fifo fifo.tif pipes folders loop loop.tif broken.tif links text.tif empty.tif text.png"
    )
    names += " z.zarr complex.npy text.npy rgb.npy nan.npy inf.npy 5d.npy zero.npy pickle.npy claims.npy *.xyz [ file"
    for source in [*(f"in/{name}" for name in names.split()), "", "/dev/null", "/proc", "/proc/self/mem", "x" * 5000]:
        yield "main", [*PREDICT, "--output", "o.tif", "--input", source]
    outputs = "in/x.xyz in/file/x.tif in/dir.tif in/file /dev/null /dev/full /proc/x.tif in/loop/x.tif in/fifo"
    for target in ["", VOLUME, f"{VOLUME}/p.zarr", "x" * 300 + ".tif", "datasets/em/p.zarr/../train-volume.tif"]:
        yield "main", [*PREDICT, "--input", VOLUME, "--output", target]
    for target in outputs.split():
        yield "main", [*PREDICT, "--input", VOLUME, "--output", target]
    labels = ["nothing", "file", "text.tif", "jpegs", "fifo", "pipes", "emptydir", "rgb.npy"]
    for label in labels + [f"label-{name}.tif" for name in ("three", "small", "nan", "float", "negative", "forty")]:
        yield "run_make_database", [*NEW, "--input", VOLUME, "--label", f"in/{label}"]
    for source in ("in/fifo", "in/pipes", "in/text.tif", "in/nothing", "/dev/null", "in/links", "in/folders"):
        yield "run_make_database", [*NEW, "--label", "none", "--input", source]
    for target in ("o.xyz", "in/file/x.png", "in/d.png", "/dev/null", "noending", "/proc/x.png"):
        yield "display_result", ["--save", target]
    exports = {"onnx": ("", "a.pt", "in/d.onnx"), "torchscript": ("in/file/a.pt", "/dev/null", "/proc/a.pt")}
    for kind, targets in (exports | {"bioimageio": ("a",)}).items():
        for target in targets:
            yield "main", ["--mode", "export", "--gpu_ids", "-1", "--format", kind, "--output", target]


def wrong_together() -> Iterator[tuple[str, Argv]]:
    """Flags that don't go together, or not with what is there."""
    for argv in ([], ["--mode"], ["--nch", "3"], ["--unknown", "1"], ["foo"]):
        yield "main", [*TRAIN, *argv] if argv else ["--name_data", "new"]
    for flag, value in {"nch_in": "3", "nch_out": "5", "gpu_ids": "0,0", "name_data": "nothing"}.items():
        yield "main", [*TRAIN, f"--{flag}", value]
    for seed in (HUGE, str(2**64)):
        yield "main", [*TRAIN, "--seed", seed]
    for gpus in ("", "-2", "cuda", "0,-1", ",", "1.5", "0;1"):
        yield "main", [*TRAIN, f"--gpu_ids={gpus}"]
    for flag, value in {"nch_ker": "9", "norm": "inorm", "pool": "max", "epoch": "99"}.items():
        yield "main", [*RESUME, "--scope", "unet", f"--{flag}", value]
    for argv in (["--scope", "nobody"], ["--epoch", "77"], ["--dir_data", "in"], ["--dir_result", "in/file"]):
        yield "main", [*TEST, *argv]
    yield "main", PREDICT
    yield "main", [*PREDICT, "--input", VOLUME]
    yield "main", [*PREDICT, "--output", "o.tif"]
    for argv in (["--dtype", "float32"], ["--what", "cells,x"], ["--scope", "nobody"], ["--what", "mask,"]):
        yield "main", [*PREDICT, "--input", VOLUME, "--output", "q", *argv]
    yield "main", [*PREDICT, "--input", "in/same", "--output", "pngs"]
    yield "run_make_database", []  # there is a database
    yield "run_make_database", NEW  # no stacks there
    stacks = BASE["run_make_database"]
    for argv in (["--num_val", "100"], ["--class_names", "a"], ["--class_names", "a,a"], ["--class_names", "a,<b>"]):
        yield "run_make_database", [*stacks, *argv]
    for argv in (["2"], ["4", "--size", "32", "--num_val", "9"], ["4", "--phantom", "x"]):
        yield "run_make_database", [*NEW, "--synthetic", *argv]
    for url in ("", "file:///etc/passwd", "http://127.0.0.1:1/x.zip", "ftp://127.0.0.1:1/x", "http://[bad"):
        yield "run_make_database", [*NEW, "--download", "--url", url]
    yield "display_result", ["--scope", "nobody"]


SAMPLE, CHECKPOINT = "datasets/em/train/00001.npy", "checkpoints/unet/em/model_epoch0009.pth"
DESCRIPTION, PICTURE = "datasets/em/dataset.json", "results/unet/em/images/0000-output.png"


def _pipe(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def _folder(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()


def _loop(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(Path(name).name)


def _content(content: bytes) -> Callable[[Path, str], None]:
    return lambda folder, name: (folder / name).write_bytes(content) and None


def _sample(channels: int, label: int | None) -> Callable[[Path, str], None]:
    """Writes a sample with so many channels and one label value, or none."""

    def write(folder: Path, name: str) -> None:
        kind = [("input", "u1", (channels,)), *([] if label is None else [("label", "u1")])]
        sample = np.zeros((64, 64), kind)
        if label is not None:
            sample["label"] = label
        np.save(folder / name, sample)

    return write


def _one_class(folder: Path, name: str) -> None:
    text = (folder / name).read_text("utf-8")
    (folder / name).write_text(text.replace('"class_values"', '"class_values": [0], "x"'), "utf-8")


def _of_other_shape(shape: tuple[int, int]) -> Callable[[Path, str], None]:
    return lambda folder, name: np.save((folder / name).with_suffix(".distance.npy"), np.zeros(shape, np.float32))


NINTH = ["--epoch", "9"]  # else it may take an older checkpoint, where that one is no file
_HOW = {  # what is broken, how, and in which commands that shows
    "sample is a pipe": (SAMPLE, _pipe, TRAIN),
    "sample is a folder": (SAMPLE, _folder, TRAIN),
    "sample is a link to itself": (SAMPLE, _loop, TRAIN),
    "sample has three channels": (SAMPLE, _sample(3, 0), TRAIN),
    "sample has no label": (SAMPLE, _sample(1, None), TRAIN),
    "sample has a seventh class": (SAMPLE, _sample(1, 7), TRAIN),
    "sample is empty": (SAMPLE, _content(b""), TRAIN),
    "dataset.json is a pipe": (DESCRIPTION, _pipe, TRAIN),
    "dataset.json is a folder": (DESCRIPTION, _folder, TRAIN),
    "dataset.json is empty": (DESCRIPTION, _content(b""), TRAIN),
    "dataset.json is no text": (DESCRIPTION, _content(b"\xff\xfe{"), TRAIN),
    "dataset.json is deep": (DESCRIPTION, _content(b"[" * 100000), TRAIN),
    "dataset.json has a long number": (DESCRIPTION, _content(b'{"nch_in": ' + b"9" * 5000 + b"}"), TRAIN),
    "dataset.json has one class": (DESCRIPTION, _one_class, TRAIN),
    "dataset.json is gone": (DESCRIPTION, lambda folder, name: (folder / name).unlink(), TRAIN),
    "checkpoint is a folder": (CHECKPOINT, _folder, [*TEST, *NINTH]),
    "checkpoint is a pipe": (CHECKPOINT, _pipe, [*TEST, *NINTH]),
    "checkpoint is empty": (CHECKPOINT, _content(b""), [*TEST, *NINTH]),
    "checkpoint is a link to itself": (CHECKPOINT, _loop, [*RESUME, "--scope", "unet", *NINTH]),
    "checkpoint is a text": (CHECKPOINT, _content(b"hello"), [*RESUME, "--scope", "unet", *NINTH]),
    "picture is empty": (PICTURE, _content(b""), []),
    "picture is a text": (PICTURE, _content(b"hello"), []),
    "picture is a folder": (PICTURE, _folder, []),
    "picture is a pipe": (PICTURE, _pipe, []),
}
BROKEN = {
    name: ("main" if argv else "display_result", argv, lambda folder, part=part, how=how: how(folder, part) and None)
    for name, (part, how, argv) in _HOW.items()
}
FORBIDDEN = [
    ("main", TRAIN),
    ("main", TEST),
    ("main", [*PREDICT, "--input", VOLUME, "--output", "o.tif"]),
    ("main", [*PREDICT, "--input", "in/secret.tif", "--output", "o.tif"]),
    ("main", ["--mode", "export", "--gpu_ids", "-1", "--format", "torchscript", "--output", "n.pt"]),
    ("run_make_database", ["--overwrite"]),
    ("run_make_database", [*NEW, "--synthetic", "4"]),
    ("display_result", []),
]


def forbid(folder: Path) -> Callable[[], None] | None:
    """Take the right to write in a folder, and to read one file of it; root has to become nobody for that."""
    shutil.copy(folder / VOLUME, folder / "in/secret.tif")
    (folder / "in/secret.tif").chmod(0)
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o555)
    return _become_nobody if not os.geteuid() else None


def _become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


PART = Part("badinput", cases, quick=80)
