"""Every flag once: name, type, default, help, group and rule. Imports no torch."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NoReturn, TypeVar

from utils import FlagError, check_name, printable

SWITCH = ("on", "off")
Rule = tuple[Callable[[Any], bool], str]
FRACTION: Rule = (lambda value: 0 <= value < 1, "must lie in [0, 1)")


def at_least(least: int) -> Rule:
    """Rule for a number that must not be smaller than another."""
    return lambda value: value >= least, f"must be at least {least}"


def between(least: float, most: float) -> Rule:
    """Rule for a number from one to another."""
    return lambda value: least <= value <= most, f"must lie in [{least}, {most}]"


def up_to(most: float) -> Rule:
    """Rule for a number from 0 to another."""
    return between(0, most)


def positive_up_to(most: float) -> Rule:
    """Rule for a number over 0 and up to another."""
    return lambda value: 0 < value <= most, f"must lie in (0, {most}]"


COUNT = 10**9  # more epochs than this nobody waits for


def is_gpu_list(value: str) -> bool:
    """Whether a text is `-1` or a comma-separated list of GPU numbers, each named once.

    Examples
    --------
    >>> [is_gpu_list(text) for text in ("-1", "0", "0, 1", "0,0", "cuda", "-1,0")]
    [True, True, True, False, False, False]
    """
    numbers = [number.strip() for number in value.split(",")]
    named = all(n.isdecimal() and len(n) < 5 for n in numbers)
    return value.strip() == "-1" or (named and len({*map(int, numbers)}) == len(numbers))


WHAT = ("probability", "mask", "cells")
WHAT_LIST: Rule = (lambda value: set(value.split(",")) <= set(WHAT), f"choose from {', '.join(WHAT)}, with commas")
TILE: Rule = (
    lambda value: value == 0 or (64 <= value <= 2**20 and value % 16 == 0),
    "must be 0 or a multiple of 16, from 64 to 1048576",
)
GPU_LIST: Rule = (is_gpu_list, "must be -1 or GPU numbers with commas")
NORM = ("bnorm", "inorm", "gnorm", "none")
LOSS = ("auto", "bce", "wbce", "dice", "bce+dice")
BY = ("image", "data")
AMP = ("auto", "off", "bf16", "fp16")
COMPILE = ("auto", "on", "off")
INIT = ("normal", "xavier", "kaiming", "orthogonal")
PHANTOM = ("em", "nuclei", "rare")
SPLIT = ("contiguous", "random")
MAX_SHOWN = 40  # images in a figure, which is then 14460 px wide; WebP takes 16383
ISBI_URL = "https://downloads.imagej.net/ISBI-2012-challenge.zip"
DRAWN = {"nargs": "?", "const": 30, "metavar": "N"}
SIZE: Rule = (lambda value: 32 <= value <= 2**14, f"must lie in [32, {2**14}]")
SEED: Rule = up_to(2**63 - 1)
NUMBER = {"type": float, "metavar": "FLOAT"}


def flag(default: Any, help: str, group: str, *, choices: tuple = (), rule: Rule | None = None, **extra: Any) -> Any:
    """One line of a table of flags: a dataclass field that also becomes a command-line flag.

    Parameters
    ----------
    default : str, int, float, bool or None
        Its type is the flag's type; a bool is given as `on` or `off`. For None, `extra` says the `type`.
    help : str
        Shown by `--help`, followed by the default.
    group : str
        Heading in `--help`.
    choices : tuple
        The values allowed.
    rule : (callable, str)
        Test that a value must pass, and the words for it.
    **extra
        Further arguments of `argparse.add_argument`; `alias` is a second name.
    """
    return field(default=default, metadata={"help": help, "group": group, "choices": choices, "rule": rule, **extra})


@dataclass(frozen=True)
class Flags:
    """Base of every table of flags: checks choices, rules and names when an instance is made."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value, choices, rule = getattr(self, item.name), item.metadata["choices"], item.metadata["rule"]
            if choices and value not in choices:
                raise FlagError(f"--{item.name} {value}: choose from {', '.join(map(str, choices))}")
            if rule and not rule[0](value):
                raise FlagError(f"--{item.name} {value}: {rule[1]}")
            if isinstance(value, float) and not math.isfinite(value):
                raise FlagError(f"--{item.name} {value}: must be finite")
            if item.name in ("scope", "name_data"):
                check_name(f"--{item.name}", value)

    def as_typed(self) -> dict[str, Any]:
        """Flags with their values as one types them."""
        return as_typed({item.name: getattr(self, item.name) for item in fields(self)})


def as_typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of flags under their names as one types them; also of a configuration that a checkpoint holds.

    Examples
    --------
    >>> as_typed({"tta": False, "lr": 0.1})
    {'--tta': 'off', '--lr': 0.1}
    """
    return {f"--{k}": SWITCH[not value] if isinstance(value, bool) else value for k, value in values.items()}


@dataclass(frozen=True)
class Config(Flags):
    """All flags of `main.py`.

    Examples
    --------
    >>> Config(nch_ker=4).nch_ker
    4
    """

    mode: str = flag("train", "what to do", "run", choices=("train", "test", "predict", "export"))
    scope: str = flag("unet", "name of the experiment, a folder", "run")
    name_data: str = flag("em", "name of the data, a folder", "run")
    dir_data: str = flag("./datasets", "where the databases lie", "run")
    dir_checkpoint: str = flag("./checkpoints", "where checkpoints go", "run")
    dir_log: str = flag("./log", "where arg.txt and the TensorBoard events go", "run")
    dir_result: str = flag("./results", "where test results go", "run")
    gpu_ids: str = flag("0", "GPU number, or -1 for the CPU", "run", rule=GPU_LIST)
    seed: int = flag(0, "seed of everything random", "run", rule=up_to(2**63 - 1))
    dist_timeout: float = flag(600.0, "wait so long for another process [s]", "run", rule=positive_up_to(1e7))
    train_continue: bool = flag(False, "go on from the newest checkpoint", "run")
    epoch: int = flag(0, "checkpoint to test or to go on from; 0: the newest", "run", rule=up_to(COUNT))

    nch_in: int = flag(0, "channels of the input; 0: as the data has", "model", rule=up_to(10_000))
    nch_out: int = flag(0, "channels of the output; 0: 1 for two classes, else one a class", "model", rule=up_to(1000))
    nch_ker: int = flag(64, "channels of the first level", "model", rule=between(1, 4096))
    num_level: int = flag(4, "times that height and width are halved", "model", rule=between(1, 6))
    norm: str = flag("bnorm", "normalisation after each convolution", "model", choices=NORM)
    pool: str = flag("avg", "pooling between the levels", "model", choices=("avg", "max"))
    dropout: float = flag(0.0, "share of values dropped at the bottom", "model", rule=FRACTION)
    init: str = flag("kaiming", "distribution of the first weights", "model", choices=INIT)

    num_epoch: int = flag(300, "epochs; each sees every training image once", "training", rule=between(1, COUNT))
    max_minutes: float = flag(0.0, "end by the clock instead of --num_epoch; 0: off", "training", rule=up_to(1e7))
    batch_size: int = flag(4, "images a step", "training", rule=between(1, 2**20))
    lr: float = flag(2e-3, "learning rate", "training", rule=positive_up_to(1e30), alias="lr_G")
    beta1: float = flag(0.9, "Adam's beta1; momentum of sgd and rmsprop", "training", rule=FRACTION)
    loss: str = flag(
        "auto", "wbce has the paper's weight map; auto: wbce for two classes, bce for more", "training", choices=LOSS
    )
    balance: bool = flag(False, "wbce: weight each class by the inverse of its share", "training")
    w0: float = flag(3.0, "wbce: weight between two objects that touch", "training", rule=up_to(1e6))
    sigma: float = flag(5.0, "wbce: reach of that weight [px]", "training", rule=between(0.1, 10))
    optim: str = flag("adamw", "optimiser", "training", choices=("adam", "adamw", "sgd", "rmsprop"))
    schedule: str = flag("cosine", "learning rate over the run", "training", choices=("constant", "cosine"))
    warmup: float = flag(0.0, "share of the run in which the learning rate rises", "training", rule=FRACTION)
    clip: float = flag(0.0, "largest norm of the gradient; 0: any", "training", rule=up_to(1e9))
    amp: str = flag("auto", "type to train in; auto: bf16 where the machine computes it", "training", choices=AMP)
    compile: str = flag(
        "auto", "torch.compile; auto: on a GPU, if a trial in a long training is faster", "training", choices=COMPILE
    )
    average: float = flag(0.99, "decay of a moving average of the weights; 0: off", "training", rule=FRACTION)

    ny_load: int = flag(
        256, "height of a training crop [px], at most that of the largest image", "data", rule=between(1, 2**20)
    )
    nx_load: int = flag(256, "width of a training crop [px]", "data", rule=between(1, 2**20))
    normalize: str = flag("image", "subtract mean and divide by deviation of each image, or of all", "data", choices=BY)
    cache_gb: float = flag(2.0, "a database up to this size is kept in memory [GB]", "data", rule=up_to(1e6))
    num_workers: int = flag(2, "processes that read a database larger than that", "data", rule=up_to(1024))

    flip: bool = flag(True, "random flips", "augmentation")
    turn: bool = flag(True, "random quarter turns; half turns where the crop is not square", "augmentation")
    elastic: float = flag(10.0, "deviation of the elastic displacement [px]; 0: off", "augmentation", rule=up_to(100))
    elastic_share: float = flag(0.5, "share of the crops that are displaced", "augmentation", rule=up_to(1))
    elastic_grid: int = flag(3, "nodes a side of the elastic grid", "augmentation", rule=between(2, 256))
    brightness: float = flag(0.2, "random shift, in standard deviations; 0: off", "augmentation", rule=up_to(100))
    contrast: float = flag(0.2, "random gain, up to 1 +- this; 0: off", "augmentation", rule=FRACTION)

    gamma: float = flag(0.0, "largest logarithm of a random gamma; 0: off", "augmentation", rule=up_to(5))
    blur: float = flag(0.0, "largest deviation of a random blur [px]; 0: off", "augmentation", rule=up_to(20))
    noise: float = flag(0.0, "random noise, in standard deviations; 0: off", "augmentation", rule=up_to(100))

    input: str = flag("", "images, stack, folder, pattern or Zarr to segment", "predict", nargs="+")
    output: str = flag("", "file (.tif, .npy, .zarr) or folder (PNG) to write; also of an export", "predict")
    what: str = flag("probability", "also mask, cells; several with commas", "predict", rule=WHAT_LIST)
    dtype: str = flag("uint8", "of the probability; 255 or 1.0 is certain", "predict", choices=("uint8", "float32"))

    format: str = flag("onnx", "what to export to", "export", choices=("onnx", "torchscript", "bioimageio"))
    author: str = flag("", "bioimageio: author of the network; several with commas", "export")
    license: str = flag("", "bioimageio: SPDX identifier of the network's licence, e.g. CC-BY-4.0", "export")

    split: str = flag("test", "which samples to test", "test", choices=("test", "val", "train"))
    tta: bool = flag(True, "average test and predict over the eight flips and quarter turns", "test")

    tile: int = flag(
        0,
        "height of a window in validation, test and predict, four times as wide [px]; 0: as memory allows",
        "test",
        rule=TILE,
    )
    background: str = flag(
        "", "class that no object is of, by name or value; default: as trained, else the first", "test"
    )

    num_freq_disp: int = flag(10, "epochs between two pictures in TensorBoard", "log", rule=between(1, COUNT))
    num_freq_score: int = flag(
        50, "epochs between two scorings of segments (V_Rand, V_Info)", "log", rule=between(1, COUNT)
    )
    num_freq_save: int = flag(50, "epochs between two checkpoints", "log", rule=between(1, COUNT))


@dataclass(frozen=True)
class DatabaseFlags(Flags):
    """All flags of `run_make_database.py`."""

    dir_data: str = flag("./datasets", "where the databases lie", "database")
    name_data: str = flag("em", "name of the data, a folder", "database")
    overwrite: bool = flag(False, "replace a database that is there", "database", nargs="?", const="on")

    input: str = flag(
        "", "stack, folder or pattern of images (default: train-volume.tif in the database)", "source", nargs="+"
    )
    label: str = flag("", "their labels, or 'none' (default: train-labels.tif in the database)", "source", nargs="+")
    threshold: float | None = flag(None, "make two classes: label values above it are class 1", "source", **NUMBER)
    objects: bool = flag(False, "make two classes of labels that number the objects", "source")
    background: str = flag("", "label value, index or r,g,b of class 0 (default: the lowest)", "source")
    foreground: str = flag("", "label value of class 1, where there are two classes", "source")
    class_names: str = flag("", "names of the classes in the order of their values, with commas", "source")
    synthetic: int = flag(0, "draw N sections (30 if left out), and use them", "source", rule=up_to(10_000), **DRAWN)
    phantom: str = flag("em", "what to draw: rare is nuclei on 2 % of the pixels", "source", choices=PHANTOM)
    size: int = flag(256, "height and width of a synthetic section [px]", "source", rule=SIZE)
    download: bool = flag(False, "fetch the ISBI 2012 EM stack and use it", "source", nargs="?", const="on")
    url: str = flag(ISBI_URL, "where to fetch it", "source")

    context: int = flag(0, "neighbours above and below a section that it sees as channels", "source", rule=up_to(64))

    num_val: int = flag(-1, "samples for validation; -1: a tenth, at least one", "split", rule=at_least(-1))
    num_test: int = flag(-1, "samples for the test; -1: a tenth, at least one", "split", rule=at_least(-1))
    split: str = flag("contiguous", "blocks in the order of the stack, or mixed", "split", choices=SPLIT)
    seed: int = flag(0, "seed of the random split and of the synthetic stack", "split", rule=SEED)


@dataclass(frozen=True)
class DisplayFlags(Flags):
    """All flags of `display_result.py`."""

    dir_result: str = flag("./results", "where test results lie", "figure")
    scope: str = flag("unet", "name of the experiment, a folder", "figure")
    name_data: str = flag("em", "name of the data, a folder", "figure")
    num: int = flag(5, "images to show", "figure", rule=between(1, MAX_SHOWN))
    save: str = flag("", "file of any type that matplotlib writes (default: figure.png in the folder)", "figure")
    show: bool = flag(False, "open a window, too", "figure", nargs="?", const="on")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(FlagError.status, f"error: {printable(message)}: see {self.prog} --help\n")


Table = TypeVar("Table", bound=Flags)


def parse(table: type[Table], argv: list[str] | None, description: str | None) -> Table:
    """Table of flags filled from the command line.

    Parameters
    ----------
    table : type
        Dataclass whose fields were made with `flag`.
    argv : list of str or None
        Arguments without the program's name; None: those of the process.
    description : str or None
        Shown by `--help`.

    Returns
    -------
    table
        An instance.

    Raises
    ------
    SystemExit
        Status 2 after an unknown flag or a value of the wrong type, 0 after `--help`.
    UserError
        A value breaks its rule.
    """
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    titles = dict.fromkeys(item.metadata["group"] for item in fields(table))
    groups = {title: parser.add_argument_group(title) for title in titles}
    for item in fields(table):
        _add(groups[item.metadata["group"]], item.name, item.default, dict(item.metadata))
    return table(**vars(parser.parse_args(sys.argv[1:] if argv is None else argv)))


def _add(group: argparse._ArgumentGroup, name: str, default: Any, rules: dict[str, Any]) -> None:
    """Add one flag to the parser."""
    assert default is not MISSING
    names = [f"--{option}" for option in (name, rules.pop("alias", None)) if option]
    choices = rules.pop("choices") or (SWITCH if isinstance(default, bool) else None)
    shown = SWITCH[not default] if isinstance(default, bool) else default
    help = rules["help"] if shown in ("", None) else f"{rules['help']} (default: {shown})"
    kind = {"choices": choices, "type": type(default), "metavar": None if choices else type(default).__name__.upper()}
    if isinstance(default, bool):
        kind |= {"type": str, "action": _Switch}
    if rules.get("nargs") == "+":
        kind |= {"action": _Several}
    extra = {key: value for key, value in rules.items() if key not in ("help", "group", "rule")}
    group.add_argument(*names, dest=name, default=default, help=help.replace("%", "%%"), **kind | extra)


class _Switch(argparse.Action):
    """Stores `on` as True and `off` as False."""

    def __call__(self, _parser: Any, namespace: argparse.Namespace, value: Any, _option: Any = None) -> None:
        setattr(namespace, self.dest, value == "on")


class _Several(argparse.Action):
    """Stores one value as it is, and several, as a shell makes them of a pattern, as a tuple."""

    def __call__(self, _parser: Any, namespace: argparse.Namespace, values: Any, _option: Any = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))
