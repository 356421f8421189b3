"""What makes a table of flags a command line: types of values, their rules, and the parser. Imports no torch."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from utils import FlagError, printable

SWITCH = ("on", "off")
Rule = tuple[Callable[[Any], bool], str]
FRACTION: Rule = (lambda value: 0 <= value < 1, "must lie in [0, 1)")
UNIT: Rule = (lambda value: value is None or 0 <= value <= 1, "must lie in [0, 1]")


def check_name(flag: str, name: str) -> None:
    """Refuse a text that is not the name of a single folder."""
    if name.strip() in ("", ".", "..") or re.search(r"[/\\]", name) or not name.isprintable():
        rule = r"it must not be empty, '.' or '..', nor hold '/', '\' or control characters"
        raise FlagError(f"{flag} {name!r} is not a folder name: {rule}: choose another")


def at_least(least: int) -> Rule:
    """Rule for a number with a minimum."""
    return lambda value: value >= least, f"must be at least {least}"


def between(least: float, most: float) -> Rule:
    """Rule for a number in a closed interval."""
    return lambda value: least <= value <= most, f"must lie in [{least}, {most}]"


def up_to(most: float) -> Rule:
    """Rule for a number from 0 to a maximum."""
    return between(0, most)


def positive_up_to(most: float) -> Rule:
    """Rule for a number above 0, up to a maximum."""
    return lambda value: 0 < value <= most, f"must lie in (0, {most}]"


COUNT = 10**9  # largest number of epochs


def is_gpu_list(value: str) -> bool:
    """Whether a text is `-1`, `mps` (Apple's GPU) or a comma-separated list of GPU numbers, each named once.

    Examples
    --------
    >>> [is_gpu_list(text) for text in ("-1", "mps", "0", "0, 1", "0,0", "cuda", "-1,0")]
    [True, True, True, True, False, False, False]
    """
    numbers = [number.strip() for number in value.split(",")]
    named = all(n.isdecimal() and len(n) < 5 for n in numbers)
    return value.strip() in ("-1", "mps") or (named and len({*map(int, numbers)}) == len(numbers))


def is_output_name(value: str) -> bool:
    """Whether a path to write is empty, or its last part is more than an ending and does not end in a dot or space.

    Examples
    --------
    >>> [is_output_name(path) for path in ("out.tif", "out/", ".", "../", ".hidden/a.tif", ".hidden", "")]
    [True, True, True, True, True, True, True]
    >>> [is_output_name(path) for path in ("..tif", ".tif", "a/ .npy", ".ome.tif", "out.tif.", "out.tif ", " ", "...")]
    [False, False, False, False, False, False, False, False]
    """
    name = re.split(r"[/\\]" if os.name == "nt" else "/", value.removesuffix("/").removesuffix(os.sep))[-1]
    is_ending = re.fullmatch(r"\.(ome\.)?[a-z]{2,11}", name.lower()) and name.lower().rpartition(".")[2] in ENDINGS
    return name in ("", ".", "..") or not (is_ending or name.endswith((".", " ")) or re.match(r"\.\.|\s", name))


ENDINGS = ("tif", "tiff", "npy", "zarr", "png", "csv", "zip", "onnx", "pt", "pth", "pdf", "svg", "jpg", "jpeg")
OUTPUT_NAME: Rule = (is_output_name, "must have a name before its ending and no dot or space at an end, as in out.tif")
TILE: Rule = (
    lambda value: value == 0 or (64 <= value <= 2**20 and value % 16 == 0),
    "must be 0 or a multiple of 16, from 64 to 1048576",
)
LARGEST_SCALE = 20.0  # and smallest, its inverse


def scale_factors(text: str) -> tuple[float, float] | None:
    """Factors for height and width, of a text with one for both or with two; None: it has none.

    Examples
    --------
    >>> scale_factors("2"), scale_factors("0.5,1.5"), scale_factors("auto"), scale_factors("0"), scale_factors("1,2,3")
    ((2.0, 2.0), (0.5, 1.5), None, None, None)
    """
    try:
        factors = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    is_allowed = len(factors) < 3 and all(1 / LARGEST_SCALE <= factor <= LARGEST_SCALE for factor in factors)
    return (factors[0], factors[-1]) if is_allowed else None


SCALE: Rule = (
    lambda value: value == "auto" or scale_factors(value) is not None,
    f"must be auto, a factor in [{1 / LARGEST_SCALE:g}, {LARGEST_SCALE:g}], or two such as 2,1.5 for height and width",
)
GPU_LIST: Rule = (is_gpu_list, "must be -1, mps or comma-separated GPU numbers")
MIN_FOLD = 3  # training, validation and test


def fold_numbers(value: str) -> tuple[int, int]:
    """K and N of a text `K/N` with K from 1 to N and N at least 3; (0, 0) for any other text.

    Examples
    --------
    >>> fold_numbers("2/5"), fold_numbers("6/5"), fold_numbers("2"), fold_numbers("")
    ((2, 5), (0, 0), (0, 0), (0, 0))
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", value.strip())
    number, total = (int(match[1]), int(match[2])) if match else (0, 0)
    return (number, total) if total >= MIN_FOLD and 1 <= number <= total else (0, 0)


FOLD: Rule = (
    lambda value: not value or fold_numbers(value) != (0, 0),
    f"must be K/N with K from 1 to N, and N at least {MIN_FOLD}",
)
DRAWN: dict[str, Any] = {"nargs": "?", "const": 30, "metavar": "N"}
NUMBER: dict[str, Any] = {"type": float, "metavar": "FLOAT"}
BEST = "best"  # the epoch with the best validation score


def epoch_number(text: str) -> int | str:
    """Value of `--epoch`: a number, or `best`.

    Examples
    --------
    >>> epoch_number("50"), epoch_number("best")
    (50, 'best')
    """
    if text == BEST:
        return BEST
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {BEST}") from None


EPOCH_RULE: Rule = (
    lambda value: value == BEST or (not isinstance(value, str) and 0 <= value <= COUNT),
    f"must be {BEST}, or lie in [0, {COUNT}]",
)
EPOCH: dict[str, Any] = {"type": epoch_number, "metavar": f"N|{BEST}", "rule": EPOCH_RULE}


def flag(default: Any, help: str, group: str, rule: Rule | None = None, *, choices: tuple = (), **extra: Any) -> Any:
    """One line of a table of flags: a dataclass field that also becomes a command-line flag."""
    # The type is that of the default; a bool is typed as `on` or `off`; for None, give `type` in `extra`, which goes to
    # `argparse.add_argument`. A rule is a test that a value must pass, and how messages state it.
    return field(default=default, metadata={"help": help, "group": group, "choices": choices, "rule": rule, **extra})


@dataclass(frozen=True)
class Flags:
    """Base of every table of flags: checks choices, rules and names when an instance is made."""

    program: ClassVar[str]  # file that has these flags
    beginner: ClassVar[tuple[str, ...]] = ()  # the flags of `--help`, without `all`; empty: every one

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

    def group(self, name: str) -> dict[str, Any]:
        """Flags of one group and their values."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.metadata["group"] == name}

    def given(self, *names: str) -> str:
        """Those of the named flags that don't have their default value, as typed; of many values the first ones."""
        defaults = {item.name: item.default for item in fields(self) if item.name in names}
        typed = as_typed({name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]})
        for name, value in typed.items():
            if isinstance(value, tuple):
                typed[name] = " ".join(value[:3]) + (" ..." if len(value) > 3 else "")
        return " ".join(f"{name} {value}" for name, value in typed.items())

    def as_typed(self) -> dict[str, Any]:
        """Flags and values as typed on the command line."""
        return as_typed(vars(self))

    def next_step(self, table: type[Flags], **values: Any) -> str:
        """Line with the command to type next: the flags of these values, and the names and folders of this one."""
        flags = {name: getattr(self, name) for name in FOLLOW if self.given(name)} | values
        names = {item.name for item in fields(table)} & flags.keys()
        typed = as_typed({name: flags[name] for name in ("mode", *FOLLOW, *values) if name in names})
        script = Path(sys.argv[0])
        program = str(script.with_name(table.program)) if script.name == self.program else table.program
        words = [(name, *(value if isinstance(value, list | tuple) else [value])) for name, value in typed.items()]
        return f"next: {shlex.join(['python', program, *(str(word) for of_flag in words for word in of_flag)])}"


def as_typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flags and values as typed on the command line, also of a configuration stored in a checkpoint; none for None.

    Examples
    --------
    >>> as_typed({"tta": False, "lr": 0.1, "threshold": None})
    {'--tta': 'off', '--lr': 0.1}
    """
    given = {name: value for name, value in values.items() if value is not None}
    return {f"--{k}": SWITCH[not value] if isinstance(value, bool) else value for k, value in given.items()}


# flags that the next command needs as well
FOLLOW = ("name_data", "scope", "dir_data", "dir_checkpoint", "dir_log", "dir_result", "gpu_ids")
UNKNOWN_FLAG = r"[-\u2013\u2014]+[^\W\d]"  # begins with hyphens, or with the dashes that text processors make of them


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(FlagError.status, f"error: {printable(message)}: see {self.prog} --help\n")


class _Help(argparse.Action):
    """Prints the flags that a beginner needs, or with `all` every one, and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, _namespace: Any, values: Any, _option: Any = None) -> None:
        more = [action for action in parser._actions if self.const and action.dest not in self.const]
        if values == self.const and more:
            parser.epilog = f"{len(more) - 1} more flags: python {parser.prog} --help all"  # without --help itself
            for action in more:
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


Table = TypeVar("Table", bound=Flags)


def make_parser(table: type[Flags], description: str | None) -> argparse.ArgumentParser:
    """Parser of the flags of a table."""
    shape: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, "add_help": False}
    parser = _Parser(description=description, **shape)
    help_rules: Any = {"nargs": "?", "choices": ["all"], "const": table.beginner, "help": argparse.SUPPRESS}
    parser.add_argument("-h", "--help", action=_Help, **help_rules)
    titles = dict.fromkeys(item.metadata["group"] for item in fields(table))
    groups = {title: parser.add_argument_group(title) for title in titles}
    for item in fields(table):
        _add(groups[item.metadata["group"]], item.name, item.default, dict(item.metadata))
    return parser


def to_value(item: Field, typed: Any) -> Any:
    """Value of a flag from what argparse has read: a switch as a bool, and several texts as a tuple."""
    if isinstance(item.default, bool):
        return typed in (True, SWITCH[0])
    if isinstance(typed, list):  # such as a pattern expanded by the shell
        return typed[0] if len(typed) == 1 else tuple(typed)
    return typed


def at_home(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Path, or several, in which `~` at the beginning is the home folder; shells leave it as it is after `=`."""
    paths = [value] if isinstance(value, str) else value
    expanded = tuple(os.path.expanduser(path) for path in paths)  # noqa: PTH111 (a Path has no / at its end)
    return expanded[0] if isinstance(value, str) else expanded


def _add(group: argparse._ArgumentGroup, name: str, default: Any, rules: dict[str, Any]) -> None:
    """Add one flag to the parser."""
    names = [f"--{option}" for option in (name, rules.pop("alias", None)) if option]
    choices = rules.pop("choices") or (SWITCH if isinstance(default, bool) else None)
    text = SWITCH[not default] if isinstance(default, bool) else default
    help = rules["help"] if text in ("", None) else f"{rules['help']} (default: {text})"
    kind: dict[str, Any] = {"choices": choices, "type": type(default)}
    kind["metavar"] = None if choices else type(default).__name__.upper()
    if isinstance(default, bool):
        kind |= {"type": str, "nargs": "?", "const": SWITCH[0]}
    extra = {key: value for key, value in rules.items() if key not in ("help", "group", "rule")}
    group.add_argument(*names, dest=name, default=default, help=help.replace("%", "%%"), **kind | extra)
