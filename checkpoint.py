"""Checkpoints: written completely or not at all, and read without running code."""

from __future__ import annotations

import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

import torch

from description import DataInfo, compare_databases, find_description, load_info
from files import atomic_write, earlier_folders
from flags import BEST
from legacy import convert_legacy
from locks import writer_of
from model import Architecture, UNet
from rules import is_integer, is_list, is_number, is_table
from utils import UserError, echo, folder_hint, is_out_of_memory

OURS = {"net", "optim", "arch", "data", "config", "epoch", "whole", "losses"}
FORMAT = 1  # raised when readers of the old layout would misread the new one
USE_OURS = "use a checkpoint that main.py --mode train wrote"
LATEST = "model_latest.pth"  # saved every ten minutes, and removed when a numbered one is written


class DamagedError(UserError):
    """A checkpoint is truncated or damaged, so that an older one has to do."""


class MismatchError(UserError):
    """A checkpoint was trained with other channels or classes than those of a database."""


def _is_state(value: Any) -> bool:
    return is_table(value, lambda weights: isinstance(weights, torch.Tensor))


def _is_flag(value: Any) -> bool:
    """Whether it is the value of a flag: a number, a text or None, or a sequence of them."""
    parts = value if isinstance(value, list | tuple) else [value]
    return all(part is None or isinstance(part, str | int | float) for part in parts)


# rules of the entries of a file, some of which have other names here; `netG` and `optimG` are pytorch-UNET's
RULES: dict[str, Callable[[Any], bool]] = {
    "format": is_integer,
    "net": _is_state,
    "optim": is_table,
    "scaler": lambda value: is_table(value, is_number),
    "arch": is_table,
    "data": is_table,
    "config": lambda value: is_table(value, _is_flag),
    "epoch": is_integer,
    "whole": lambda value: isinstance(value, bool),
    "losses": lambda value: is_list(value, is_number),
    "threshold": lambda value: is_number(value, 0, 1),
    "certainty": lambda value: is_number(value, 0, 1),
    "chosen_on": lambda value: value is None or is_list(value, is_integer, 2),
    "seconds": lambda value: is_number(value, 0),
    "database": lambda value: isinstance(value, str),
    "best_epoch": is_integer,
    "best_score": lambda value: value is None or is_number(value),
    "plan": lambda value: is_table(value, lambda part: is_integer(part) or is_list(part, is_integer)),
    "average": lambda value: (
        value is None or (is_table(value) and _is_state(value.get("net")) and is_integer(value.get("num_step")))
    ),
    "netG": _is_state,
    "optimG": is_table,
}
STORED = {"epoch_complete": "whole", "batch_settings": "plan"}  # names in the file where they are others than here


@dataclass
class Checkpoint:
    """Contents of a checkpoint of this program or of pytorch-UNET: tensors and plain values."""

    net: dict[str, torch.Tensor]
    optim: dict[str, Any]  # state of the optimiser
    arch: Architecture
    info: DataInfo  # of the data that the network was trained on
    config: dict[str, Any]  # flags of the training
    epoch: int
    epoch_complete: bool  # whether the epoch was trained to its end
    losses: list[float] = field(default_factory=list)  # of the batches of that epoch
    scaler: dict[str, Any] = field(default_factory=dict)  # state of the scaler of the loss
    batch_settings: dict[str, Any] = field(default_factory=dict)  # what the batches of that epoch depend on
    threshold: float = 0.5  # for the probability of class 1, that scored best on the validation set
    certainty: float = 0.0  # that the probability of an object exceeds somewhere, chosen with the threshold
    chosen_on: list[int] | None = None  # validation images with foreground, and their objects; None: an older file
    seconds: float = 0.0  # trained
    database: str = ""  # see `description.identity`; empty in older files
    average: dict[str, Any] | None = None  # state of the moving average of the weights
    best_epoch: int = 0  # with the best validation score up to this one; 0: there is none
    best_score: float | None = None

    @classmethod
    def load(cls, path: Path, info: DataInfo | None = None) -> Checkpoint:
        """Load a checkpoint on the CPU; pytorch-UNET's have no description of the data, and get `info`."""
        return cls._of(_read(path), path, info)

    @classmethod
    def load_for(cls, path: Path, database: Path, note: Callable[[str], None] = echo) -> Checkpoint:
        """Load a checkpoint for use with a database, which must have its channels, and its classes or no labels."""
        # names of classes, and the label value of pixels that are not annotated, are those of the database
        state = _read(path)
        here = load_info(database) if "info" not in state or find_description(database) else None
        saved = cls._of(state, path, here if here and here.class_values else None)
        for what in ("nch_in", "context", "class_values") if here else ():
            ours, theirs = getattr(here, what), getattr(saved.info, what)
            if ours not in (theirs, []):  # without labels there are no classes
                raise MismatchError(
                    f"{database}: {what} {ours}, but {path} was trained with {theirs}: use its database"
                )
        if here is None:
            return saved
        names = here.class_names or saved.info.class_names
        if names != saved.info.class_names:
            before = ", ".join(saved.info.class_names)
            note(f"note: the classes are named {', '.join(names)}, as in {database}; {path} has {before}")
        for line in compare_databases(saved.info, here, database):
            note(f"warning: {line}")
        return replace(saved, info=replace(saved.info, ignore=here.ignore, class_names=names))

    @classmethod
    def _of(cls, state: dict[str, Any], path: Path, info: DataInfo | None) -> Checkpoint:
        """Checkpoint from the contents of a file."""
        arch, is_legacy = state["arch"], "info" not in state
        if is_legacy:
            state |= {"info": legacy_info(arch, info).checked(path, USE_OURS), "epoch": epoch_of(path) or 0}
        with explain_mismatch(path):
            if (arch["nch_in"], max(arch["nch_out"], 2)) != (state["info"].nch_in, state["info"].num_class):
                raise ValueError("other channels or classes")
        if is_legacy and (num := arch["nch_out"]) > 1:
            what = f"its {num} outputs were trained as one sigmoid each, and are read as {num} classes (softmax)"
            echo(f"warning: {path}: {what}: the likeliest class is the same, probabilities differ", sys.stderr)
        state.setdefault("plan", {name: state["config"].get(name) for name in ("batch_size", "seed")})  # of older files
        names = {name: STORED.get(name, name) for name in cls.__dataclass_fields__}
        return cls(**{name: state[stored] for name, stored in names.items() if stored in state})

    def save(self, path: Path, before_rename: Callable[[], None] = lambda: None) -> None:
        """Write the file; an older one stays until the new one is complete, and `before_rename` is called then."""
        state = {STORED.get(name, name): getattr(self, name) for name in self.__dataclass_fields__ if name != "info"}
        with atomic_write(path) as file:
            writer = _Writer(file)
            torch.save(state | {"data": asdict(self.info), "format": FORMAT}, cast(IO[bytes], writer))
            if writer.error:
                raise writer.error
            before_rename()

    def network(self, path: Path, *, averaged: bool = True, dropout: float = 0.0) -> UNet:
        """Network with the averaged weights, if there are any and `averaged` is true; errors name `path`."""
        with explain_mismatch(path):
            net = UNet(**self.arch, dropout=dropout)
            net.load_state_dict(self.average["net"] if self.average and averaged else self.net)
        return net


def legacy_info(arch: Architecture, info: DataInfo | None = None) -> DataInfo:
    """Description of the data for pytorch-UNET's networks, which take images scaled to [-1, 1]."""
    half = [127.5] * (info.nch_in if info else arch["nch_in"])
    if info is None:
        classes = list(range(max(arch["nch_out"], 2)))
        share = [1 / len(classes)] * len(classes)
        return DataInfo(len(half), classes, [str(k) for k in classes], share, half, half, [0.0, 255.0], "legacy")
    return replace(info, mean=half, std=half, normalize="legacy")


def path_of(folder: Path, epoch: int) -> Path:
    """Path of the checkpoint of an epoch.

    Examples
    --------
    >>> path_of(Path("checkpoints/unet/em"), 50).name
    'model_epoch0050.pth'
    """
    return folder / f"model_epoch{epoch:04d}.pth"


def best_path(folder: Path) -> Path:
    """Where the checkpoint of the epoch with the best validation score lies."""
    return folder / "model_best.pth"


def latest_path(folder: Path) -> Path:
    """Where the checkpoint that is replaced every ten minutes lies."""
    return folder / LATEST


def epoch_of(path: Path) -> int | None:
    """Epoch in the name of a checkpoint, with any number of digits; None for other names.

    Examples
    --------
    >>> epoch_of(Path("model_epoch50.pth")), epoch_of(Path("model.pth"))
    (50, None)
    """
    match = re.fullmatch(r"model_epoch(\d+)\.pth", path.name)
    return int(match[1]) if match else None


class _Writer:
    """File that torch writes to in chunks, without a copy in memory; torch hides that a write failed, or why."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, chunk: memoryview) -> int:
        """Write a chunk, unless an earlier one failed: accept all, and keep the first error."""
        if self.error is None:
            try:
                self.file.write(chunk)
            except OSError as error:
                self.error = error
        return len(chunk)

    def flush(self) -> None:
        """Do nothing: `atomic_write` flushes the file."""


def list_epochs(folder: Path) -> dict[int, Path]:
    """Checkpoints in a folder by their epoch."""
    paths = {epoch_of(path): path for path in folder.glob("model_epoch*.pth") if path.is_file()}
    return {epoch: path for epoch, path in paths.items() if epoch is not None}


def load_epoch(
    folder: Path,
    epoch: int | str = 0,
    load: Callable[[Path], Checkpoint] = Checkpoint.load,
    note: Callable[[str], None] = echo,
) -> tuple[Path, Checkpoint]:
    """Load the checkpoint of an epoch, of the best one (`best`), or the newest that can be read (0); or a file."""
    # `note` is called with a line if a damaged file is passed over, or the training still runs
    if folder.is_file():
        return folder, load(folder)
    if epoch == 0:
        path, saved = _load_newest(folder, load, note)
    else:
        path = find(folder, epoch)
        saved = load(path)
    if holder := writer_of(folder):
        note(f"note: {path}: its training still runs ({holder})")
    return path, saved


def load_trained(
    folders: list[Path], epoch: int | str, load: Callable[[Path], Checkpoint] = Checkpoint.load, *, is_main: bool = True
) -> dict[Path, Checkpoint]:
    """Load a checkpoint of each folder to use its network; the main process prints the notes of `load_epoch`."""
    loaded = {}
    for folder in folders:
        path, saved = load_epoch(folder, epoch, load, echo if is_main else lambda _: None)
        saved.optim = {}  # as large as two networks
        loaded[path] = saved
    return loaded


def find(folder: Path, epoch: int | str = 0) -> Path:
    """Checkpoint of an epoch, the newest, or that of the best epoch, without a look into the files."""
    epochs, newest = list_epochs(folder), list_newest(folder)
    if not newest:
        raise no_checkpoint(folder, best_path(folder).name if epoch == BEST else "checkpoint")
    if epoch == BEST and not best_path(folder).is_file():
        what = "only a training with a validation set that has the --best_score writes one: leave --epoch out"
        raise UserError(f"no {best_path(folder).name} in {folder}: {what}")
    if epoch not in (0, BEST, *epochs):
        there = ", ".join(map(str, sorted(epochs))) or newest[0].name
        raise UserError(f"no checkpoint of epoch {epoch} in {folder}: there are {there}")
    return best_path(folder) if epoch == BEST else epochs[int(epoch)] if epoch else newest[0]


def _load_newest(
    folder: Path, load: Callable[[Path], Checkpoint], note: Callable[[str], None]
) -> tuple[Path, Checkpoint]:
    """Load the newest checkpoint that can be read."""
    epochs = list_epochs(folder)
    readable, damaged = [], []
    for path in list_newest(folder):
        try:
            readable.append((path, load(path)))
        except DamagedError as reason:
            damaged.append(reason)
            continue
        # a kill between the writing of a numbered one and the removal of the latest leaves both
        if path.name != LATEST or readable[0][1].epoch > max(epochs, default=0):
            break
    if not readable:
        raise damaged[0] if damaged else no_checkpoint(folder)
    path, saved = max(readable, key=lambda each: (each[1].epoch, each[1].epoch_complete, len(each[1].losses)))
    for error in damaged:
        note(f"warning: {error}; now {path} is used")
    if path == best_path(folder) and not damaged:
        note(f"note: {path} is used, the only checkpoint there")
    return path, saved


def list_newest(folder: Path) -> list[Path]:
    """Checkpoints in a folder: the latest, the numbered ones from the newest on, and that of the best epoch."""
    epochs = list_epochs(folder)
    numbered = [epochs[epoch] for epoch in sorted(epochs, reverse=True)]
    return [path for path in (latest_path(folder), *numbered, best_path(folder)) if path.is_file()]


def no_checkpoint(folder: Path, what: str = "checkpoint") -> UserError:
    """Error for a folder without a checkpoint, which says where others lie."""
    hint = folder_hint(folder, ("--scope", "--name_data"), lambda other: any(other.glob("model_*.pth")))
    advice = f"{hint}run --mode train first, copy one there, or check --scope and --name_data"
    if earlier := earlier_folders(folder):
        advice = f"those of an earlier training lie in {earlier[-1]}: copy them back, or run --mode train"
    return UserError(f"no {what} in {folder}: {advice}")


def _read(path: Path) -> dict[str, Any]:
    """Contents of a checkpoint that can be used, with the description of its data as `info`, if it has one."""
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise UserError(f"{path}: not a regular file: {USE_OURS}")
    try:
        _check_archive(path)
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = "refused, it holds more than tensors and plain values, and could run code when loaded"
        raise UserError(f"{path}: {what if _is_of_torch(path) else 'not a checkpoint'}: {USE_OURS}") from error
    except Exception as error:  # a damaged archive can fail in many ways
        raise _damaged(path) from error
    if not isinstance(state, dict) or not (state.keys() >= OURS or state.keys() >= {"netG", "optimG"}):
        raise UserError(f"{path}: a file of another program: {USE_OURS}")
    is_valid = all(RULES[name](state[name]) for name in state.keys() & RULES.keys())
    has_values = all(each.numel() * each.element_size() <= each.untyped_storage().nbytes() for each in _tensors(state))
    if not (is_valid and has_values):
        raise _damaged(path)
    if state.get("format", FORMAT) > FORMAT:
        raise UserError(f"{path}: written by a newer version of this program: update it")
    with explain_mismatch(path):
        state = convert_legacy(state) if "netG" in state else state
    if "data" in state:
        state["info"] = DataInfo.from_dict(state.pop("data"), path)
    _check_weights(path, state)
    return state


def _damaged(path: Path) -> DamagedError:
    what = "truncated, damaged or not a checkpoint: choose another file, or an older one with --epoch"
    return DamagedError(f"{path}: {what}")


def _is_of_torch(path: Path) -> bool:
    """Whether a file begins as torch writes them: a .zip, or before torch 1.6 a pickle."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"PK", b"\x80"))


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """Tensors in a dictionary, and in the dictionaries in it."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for part in state.values():
            yield from _tensors(part)


def _check_weights(path: Path, state: dict[str, Any]) -> None:
    """Refuse weights that don't fit the network in `arch`, before memory is allocated for it, or are not finite."""
    if newer := state["arch"].keys() - Architecture.__annotations__.keys():
        what = f"its network has {', '.join(sorted(newer))}, which this version of the program does not know"
        raise UserError(f"{path}: {what}: update the program")
    all_weights = [state["net"], *([state["average"]["net"]] if state.get("average") else [])]
    with explain_mismatch(path):
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # about layers without channels
            expected = _shapes(UNet(**state["arch"]).state_dict())
        if any(_shapes(weights) != expected for weights in all_weights):
            raise ValueError("other weights")
    if not all(weight.isfinite().all() for weights in all_weights for weight in weights.values()):
        raise UserError(f"{path}: NaN or infinite weights (its training diverged): choose an older one with --epoch")


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def _check_archive(path: Path) -> None:
    """Check the sizes and checksums of a checkpoint's parts; torch writes checksums, but does not check them."""
    if zipfile.is_zipfile(path):  # torch before 1.6 wrote another format
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            size = os.fstat(file.fileno()).st_size  # of the open file, which may be replaced meanwhile
            for part in archive.infolist():
                if part.compress_type != zipfile.ZIP_STORED or part.file_size > size:
                    raise ValueError(f"{part.filename} is larger than the file: torch packs nothing")
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")


@contextmanager
def explain_mismatch(path: Path) -> Iterator[None]:
    """Report a checkpoint of another network as one clear error, without what torch warns of before it."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        raise UserError(f"{path}: its weights are not those of this network: use a checkpoint of this U-Net") from error
