"""Used by all other files: errors for users, the door of a program, messages and names."""

from __future__ import annotations

import functools
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from difflib import SequenceMatcher
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

from signals import SIGPIPE, Stopped, mute, raise_signals

ALIKE = 0.6  # least likeness of two names, 1 for equal ones, to take one for the other misspelled
MOST_NAMED = 5  # names that a message lists
OMP_SPIN_COUNT = "3000"  # after which idle OpenMP threads sleep; the default 300000 blocks cores others need


class UserError(Exception):
    """An error that the user can fix: one line says what is wrong, where, and what to do; no traceback."""

    status = 1


class FlagError(UserError):
    """A flag has an invalid value; the program exits with the status of argparse."""

    status = 2


class DivergenceError(UserError):
    """The loss or the output of a network is no longer finite, so that its weights are of no use."""


def program(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate `main(argv)`: errors meant for the user become one line on stderr and an exit status.

    The status is 0, that of the `UserError` (1, or 2 for a flag), or 128 plus the number of the signal that ended the
    program, 130 after Ctrl-C.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime would call its maker; read when it is imported
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read when torch is imported
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", OMP_SPIN_COUNT)  # read when torch is imported
        try:
            with raise_signals():
                return main(argv) or 0
        except UserError as error:
            text, status = str(error), error.status
            if "Original Traceback" in text:  # from a loader process
                text = text.strip().splitlines()[-1].partition(": ")[2]
            message = f"error: {text}"
        except BrokenPipeError:
            mute()
            return 128 + SIGPIPE
        except KeyboardInterrupt as stop:
            signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
            message, status = "interrupted; no partial files remain", 128 + signum
        except (OSError, MemoryError, RuntimeError) as error:
            message, status = f"error: {_explain(error)}", 1
        rank = os.environ.get("RANK", "0")
        echo(printable(message if rank == "0" else f"process {rank}: {message}"), sys.stderr)
        return status

    return run


def _explain(error: Exception) -> str:
    """One line for an error of the machine (memory, disk, network); anything else is a defect and raised again."""
    if is_out_of_memory(error):
        return "out of memory: close other programs, or use a machine with more"
    if isinstance(error, OSError) and error.errno:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: check the path, the permissions and the free space"
    of_distributed = r"gloo|NCCL|torch\.distributed|TCPStore|DistStoreError"
    if "RANK" in os.environ and re.search(of_distributed, f"{type(error).__module__} {type(error).__name__} {error}"):
        return "another process of this run has died or is too slow: see its message, or raise --dist_timeout"
    raise error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device or the machine has run out of memory."""
    texts = ("out of memory", "can't allocate memory", "could not create a primitive", "bad_alloc")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def check_module(name: str, purpose: str) -> None:
    """Refuse an action whose package is not installed."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{purpose} needs the package {name}: pip install -r requirements-extra.txt") from error


def printable(text: str) -> str:
    r"""Text on one line without control characters, which could steer a terminal; they become `\x1b` and the like.

    >>> print(printable("a\x1b[31m.png"))
    a\x1b[31m.png
    """
    control = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(control, lambda match: match[0].encode("unicode_escape").decode(), text)


def shortened(text: str, most: int = 24) -> str:
    """Text with its middle left out where it is longer than `most` characters.

    >>> shortened("0bf4b144e8f1bd.png", 13)
    '0bf4b1…bd.png'
    """
    last = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - last]}\u2026{text[-last:]}"


def echo(text: str, file: TextIO | None = None) -> None:
    """Print lines to stdout or another file and flush; control characters in them are escaped."""
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    text = "\n".join(map(printable, text.split("\n"))).encode(encoding, "backslashreplace").decode(encoding)
    print(text, file=file, flush=True)


def csv_cell(value: Any) -> Any:
    r"""Cell of a CSV table; a text that a spreadsheet would compute gets an apostrophe in front, numbers do not.

    Source: OWASP, CSV injection. Tabs and line breaks are escaped; the last four characters are `=+-@` in full width.

    >>> [csv_cell(value) for value in ("=1+1", "-cell", "@a", "cell", "\t=1", "-1.5", "-1e-05", -2)]
    ["'=1+1", "'-cell", "'@a", 'cell', '\\t=1', '-1.5', '-1e-05', -2]
    """
    text = printable(value) if isinstance(value, str) else ""
    is_number = re.fullmatch(r"[+-][0-9]+(\.[0-9]+)?(e[+-][0-9]+)?", text)
    return f"'{text}" if text.startswith(tuple("=+-@\uff1d\uff0b\uff0d\uff20")) and not is_number else text or value


def spread(total: int, num: int) -> list[int]:
    """At most `num` of the indices below `total`, evenly spaced, with the first and the last.

    >>> spread(10, 4), spread(2, 4), spread(0, 4)
    ([0, 3, 6, 9], [0, 1], [])
    """
    return [index * (total - 1) // max(min(num, total) - 1, 1) for index in range(min(num, total))]


def num_common(texts: Iterable[Sequence[str]]) -> int:
    """Number of letters, or of other parts, that all texts begin with."""
    return sum(1 for _ in takewhile(lambda parts: len({*parts}) == 1, zip(*texts, strict=False)))


def names_below(paths: Sequence[Path], taken: Collection[str] = ()) -> dict[Path, str]:
    """Paths below the folder that holds all of these files: their names, if no folders lie between.

    They have more of their folders where a name is taken.

    Examples
    --------
    >>> list(names_below([Path("raw/1/images/img.tif"), Path("raw/2/images/img.tif")]).values())
    ['1/images/img.tif', '2/images/img.tif']
    >>> list(names_below([Path("new/img.tif")], ["img.tif"]).values())
    ['new/img.tif']
    """
    parts = {path: path.absolute().parts for path in paths}
    names: dict[Path, str] = {}
    for num in range(num_common(folders for *folders, _ in parts.values()), -1, -1):
        names = {path: Path(*of[num:]).as_posix() for path, of in parts.items()}
        if not {*names.values()} & {*taken}:
            break
    return names


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that orders the numbers in names by value.

    >>> sorted(["10.npy", "9.npy", "a2", "a10"], key=natural_key)
    ['9.npy', '10.npy', 'a2', 'a10']
    """
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def nearest(name: str, names: Iterable[str]) -> str:
    """The name most like another one, whatever the case and the order of its words; empty if none is like it.

    >>> nearest("EM", ["em", "nuclei"]), nearest("data-dir", ["dir_data", "dir_log"]), nearest("cells", ["em"])
    ('em', 'dir_data', '')
    """

    def likeness(other: str) -> float:
        pairs = [(text(name), text(other)) for text in (str.casefold, _sorted_words)]
        return max(SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in pairs)

    best = max(names, key=likeness, default="")
    return best if best and likeness(best) >= ALIKE else ""


def _sorted_words(name: str) -> str:
    return "_".join(sorted(re.findall(r"[^\W_]+", name.casefold())))


def name_hint(name: str, names: Iterable[str]) -> str:
    """Beginning of the advice about an unknown name: the one that may be meant; empty if none is like it.

    >>> name_hint("gpf", ["DAPI", "GFP"]), name_hint("red", ["DAPI", "GFP"])
    ('did you mean GFP? Else ', '')
    """
    best = nearest(name, names)
    return f"did you mean {best}? Else " if best else ""


def folder_hint(folder: Path, flags: tuple[str, ...], is_one: Callable[[Path], bool]) -> str:
    """Beginning of the advice about a missing folder whose last parts are the values of flags.

    It names the adjacent folder that may be meant, of those for which `is_one`; if none is like it, the first of them.
    """
    parts = folder.parts[-len(flags) :]
    with suppress(OSError, IndexError):  # a folder that can't be listed; a path without parents
        others = sorted(folder.parents[len(flags) - 1].glob("/".join("*" * len(flags))), key=str)
        names = ["/".join(other.parts[-len(flags) :]) for other in others if other != folder and is_one(other)]
        if best := nearest("/".join(parts), names):
            values = zip(flags, best.split("/"), parts, strict=True)
            return f"did you mean {' '.join(f'{flag} {value}' for flag, value, old in values if value != old)}? Else "
        more = ", ..." if len(names) > MOST_NAMED else ""
        return f"there is {', '.join(names[:MOST_NAMED])}{more}: " if names else ""
    return ""
