"""Used by all other files: errors for users, messages, names, signals and devices."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    import torch

Network = TypeVar("Network", bound="torch.nn.Module")

SIGPIPE = 13  # signal.SIGPIPE does not exist on Windows
ALIKE = 0.6  # least likeness of two names, 1 for equal ones, to take one for the other misspelled
MOST_NAMED = 5  # names that a message lists
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # variables that torchrun sets for a process
OMP_SPIN_COUNT = "3000"  # after which idle OpenMP threads sleep; the default 300000 blocks cores others need


class UserError(Exception):
    """An error that the user can fix: one line says what is wrong, where, and what to do; no traceback."""

    status = 1


class FlagError(UserError):
    """A flag has an invalid value; the program exits with the status of argparse."""

    status = 2


class DivergenceError(UserError):
    """The loss or the output of a network is no longer finite, so that its weights are of no use."""


class Stopped(KeyboardInterrupt):
    """A signal that would have ended the process at once, without removing its partial files."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def program(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate `main(argv)`: errors meant for the user become one line on stderr and an exit status.

    Parameters
    ----------
    main : callable
        Takes the arguments without the program's name (None: those of the process).

    Returns
    -------
    callable
        Returns 0, the status of the `UserError` (1, or 2 for a flag), or 128 plus the number of the signal that ended
        it, 130 after Ctrl-C.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        """Run the program."""
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", OMP_SPIN_COUNT)  # read when torch is imported
        try:
            with _raise_signals():
                return main(argv) or 0
        except UserError as error:
            message, status = f"error: {_last_line(str(error))}", error.status
        except BrokenPipeError:
            _mute()
            return 128 + SIGPIPE
        except KeyboardInterrupt as stop:
            signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
            message, status = "interrupted; no partial files remain", 128 + signum
        except (OSError, MemoryError, RuntimeError) as error:
            message, status = f"error: {_explain(error)}", 1
        rank = os.environ.get("RANK", "0")
        say(printable(message if rank == "0" else f"process {rank}: {message}"), sys.stderr)
        return status

    return run


@contextmanager
def _raise_signals() -> Iterator[None]:
    """While entered, SIGTERM (of a batch system) and SIGHUP (a closed terminal) raise `Stopped` if nobody handles them.

    Not in a process of torchrun, which ends by SIGTERM those that wait for a dead one: there Python would not see it.
    """

    def stop(signum: int, _frame: object) -> None:
        raise Stopped(signum)

    found = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]  # Windows has no SIGHUP
    unhandled = [signum for signum in found if signum and signal.getsignal(signum) == signal.SIG_DFL]
    if "RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        unhandled = []  # Python allows handlers in the main thread only
    for signum in unhandled:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum in unhandled:
            signal.signal(signum, signal.SIG_DFL)


def printable(text: str) -> str:
    r"""Text on one line without control characters, which could steer a terminal; they become `\x1b` and the like.

    Examples
    --------
    >>> print(printable("a\x1b[31m.png"))
    a\x1b[31m.png
    """
    control = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(control, lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines and flush; control characters in them are escaped.

    Parameters
    ----------
    text : str
        One or more lines.
    file : file, optional
        Default: stdout.
    """
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    text = "\n".join(map(printable, text.split("\n"))).encode(encoding, "backslashreplace").decode(encoding)
    print(text, file=file, flush=True)


def _mute() -> None:
    """Discard further output: the reader of stdout has gone, as `| head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _last_line(message: str) -> str:
    """Message of an error, without the traceback that an error in a loader process carries."""
    if "Original Traceback" in message:
        return message.strip().splitlines()[-1].partition(": ")[2]
    return message


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


def release_memory() -> None:
    """Give freed memory back to the system, which glibc does not do by itself for pieces below some megabytes."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turn an out-of-memory error into a `UserError` with advice.

    Raises
    ------
    UserError
        The memory does not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise UserError(f"out of memory: {advice}") from error
        raise


def check_module(name: str, purpose: str) -> None:
    """Refuse an action whose package is not installed.

    Raises
    ------
    UserError
        The package is missing; the message says how to install it.
    """
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{purpose} needs the package {name}: pip install -r requirements-extra.txt") from error


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that orders the numbers in names by value.

    Examples
    --------
    >>> sorted(["10.npy", "9.npy", "a2", "a10"], key=natural_key)
    ['9.npy', '10.npy', 'a2', 'a10']
    """
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def nearest(name: str, names: Iterable[str]) -> str:
    """The name most like another one, whatever the case and the order of its words; empty if none is like it.

    Examples
    --------
    >>> nearest("EM", ["em", "nuclei"]), nearest("data-dir", ["dir_data", "dir_log"]), nearest("cells", ["em"])
    ('em', 'dir_data', '')
    """

    def likeness(other: str) -> float:
        """Likeness of a name to the one sought, from 0 to 1."""
        pairs = [(text(name), text(other)) for text in (str.casefold, _sorted_words)]
        return max(SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in pairs)

    best = max(names, key=likeness, default="")
    return best if best and likeness(best) >= ALIKE else ""


def _sorted_words(name: str) -> str:
    return "_".join(sorted(re.findall(r"[^\W_]+", name.casefold())))


def name_hint(name: str, names: Iterable[str]) -> str:
    """Beginning of the advice about an unknown name: the one that may be meant; empty if none is like it.

    Examples
    --------
    >>> name_hint("gpf", ["DAPI", "GFP"]), name_hint("red", ["DAPI", "GFP"])
    ('did you mean GFP? Else ', '')
    """
    best = nearest(name, names)
    return f"did you mean {best}? Else " if best else ""


def folder_hint(folder: Path, flags: tuple[str, ...], is_one: Callable[[Path], bool]) -> str:
    """Beginning of the advice about a folder that is not there, whose last parts are given by flags.

    It names the folder beside it that may be meant, of those that are one; if none is like it, the first of them.
    """
    parts = folder.parts[-len(flags) :]
    with suppress(OSError, IndexError):  # a folder that can't be listed; a path without parents
        others = sorted(folder.parents[len(flags) - 1].glob("/".join("*" * len(flags))), key=str)
        found = {"/".join(other.parts[-len(flags) :]): other for other in others if other != folder and is_one(other)}
        if best := nearest("/".join(parts), found):
            meant = zip(flags, found[best].parts[-len(flags) :], parts, strict=True)
            return (
                f"did you mean {' '.join(f'{flag} {there}' for flag, there, given in meant if there != given)}? Else "
            )
        more = ", ..." if len(found) > MOST_NAMED else ""
        return f"there is {', '.join(list(found)[:MOST_NAMED])}{more}: " if found else ""
    return ""


def csv_cell(value: Any) -> Any:
    r"""Cell of a CSV table; a text that a spreadsheet would compute gets an apostrophe in front, numbers do not.

    Source: OWASP, CSV injection. Tabs and line breaks are escaped; the last four characters are `=+-@` in full width.

    Examples
    --------
    >>> [csv_cell(value) for value in ("=1+1", "-cell", "@a", "cell", "\t=1", "-1.5", "-1e-05", -2)]
    ["'=1+1", "'-cell", "'@a", 'cell', '\\t=1', '-1.5', '-1e-05', -2]
    """
    text = printable(value) if isinstance(value, str) else ""
    is_number = re.fullmatch(r"[+-][0-9]+(\.[0-9]+)?(e[+-][0-9]+)?", text)
    return f"'{text}" if text.startswith(tuple("=+-@\uff1d\uff0b\uff0d\uff20")) and not is_number else text or value


def check_name(flag: str, name: str) -> None:
    """Refuse a text that is not the name of a single folder.

    Raises
    ------
    FlagError
        The name is empty, `.` or `..`, or contains a separator or a control character.
    """
    if name.strip() in ("", ".", "..") or re.search(r"[/\\]", name) or not name.isprintable():
        rule = r"it must not be empty, '.' or '..', nor hold '/', '\' or control characters"
        raise FlagError(f"{flag} {name!r} is not a folder name: {rule}: choose another")


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGHUP (a closed terminal) set `signum` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt; under nohup, SIGHUP stays ignored. Outside the main thread, where Python
    allows no handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._old: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signum != 0

    def __enter__(self) -> StopRequest:
        closed = getattr(signal, "SIGHUP", None)  # Windows has none
        hangup = [closed] if closed and signal.getsignal(closed) != signal.SIG_IGN else []
        for signum in (signal.SIGINT, signal.SIGTERM, *hangup):
            try:
                self._old[signum] = signal.signal(signum, self._note)
            except ValueError:
                break
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    @contextmanager
    def unless_read(self) -> Iterator[None]:
        """While entered, a closed stdout counts as SIGPIPE."""
        try:
            yield
        except BrokenPipeError:
            _mute()
            self.signum = SIGPIPE

    def _note(self, signum: int, _frame: object) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum


def is_worker() -> bool:
    """Whether this is one of several processes of a run, which torchrun started.

    Raises
    ------
    UserError
        The environment sets only some of the variables by which such processes find each other, or not to numbers.
    """
    found = {name: os.environ.get(name, "") for name in (*LAUNCHED, "MASTER_ADDR", "MASTER_PORT")}
    if not any(name in os.environ for name in LAUNCHED):  # an address alone makes no process one of several
        return False
    advice = "start the program with torchrun, or unset them"
    if missing := [name for name, value in found.items() if not value]:
        there = ", ".join(f"{name}={value}" for name, value in found.items() if value) or "nothing else"
        raise UserError(f"the environment sets {there}, but not {', '.join(missing)}: {advice}")
    numbers = {name: int(value) for name, value in found.items() if value.isascii() and value.isdecimal()}
    limits = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE", "MASTER_PORT": ""}
    for name, size in limits.items():
        if not 0 <= numbers.get(name, -1) < (numbers.get(size, 0) if size else 2**16):
            rule = f"a number below {size}={found[size]}" if size else "the number of a port"
            raise UserError(f"the environment sets {name}={found[name]}, which must be {rule}: {advice}")
    return True


def pick_device(gpu_ids: str) -> torch.device:
    """Device that the network runs on.

    Parameters
    ----------
    gpu_ids : str
        `"-1"` for the CPU, or a comma-separated list of GPU numbers. A process of torchrun takes the entry at its local
        rank, or if the list is shorter than the number of processes, the GPU with the number of its local rank.

    Returns
    -------
    torch.device
        The GPU, or the CPU with a warning on stderr if there is no such GPU.

    Raises
    ------
    UserError
        As `is_worker`.
    """
    import torch

    numbers = [int(number) for number in gpu_ids.split(",")]
    rank, num_process = (int(os.environ[name]) for name in LAUNCHED[2:]) if is_worker() else (0, 1)
    number = numbers[rank] if len(numbers) >= num_process else rank
    if numbers[0] < 0:
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        say(f"warning: --gpu_ids {gpu_ids}: no GPU {number} here, running on the CPU", sys.stderr)
        return torch.device("cpu")
    return torch.device("cuda", number)


def pick_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """Data type of mixed precision; weights, normalisation statistics, losses and probabilities stay float32.

    Parameters
    ----------
    amp : {"auto", "off", "bf16", "fp16"}
        `auto` is bfloat16 if the device has instructions for it; without them it is slower than float32.
    device : torch.device
        Device that the network runs on.

    Returns
    -------
    torch.dtype or None
        For `torch.autocast`; None for float32 throughout.
    """
    import torch

    if amp == "auto" and device.type == "cuda":
        with torch.cuda.device(device):
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif amp == "auto":
        can = torch.cpu.get_capabilities()
        fast = can.get("avx512_bf16", False) or can.get("amx_tile", False)
    else:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.bfloat16 if fast else None


def on_device(net: Network, norm: str, device: torch.device, precision: torch.dtype | None) -> Network:
    """Network with some normalisation on a device, in the memory order that is fastest there."""
    return net.to(device, memory_format=memory_format(norm, device, precision))  # type: ignore[call-overload]


def memory_format(norm: str, device: torch.device, precision: torch.dtype | None) -> torch.memory_format:
    """Order of the pixels in memory that a network is fastest with.

    Channels-last, but for instance and group normalisation in float32 or on a CPU, which then spend up to a third of
    their time on copies (`benchmarks/bench_step.py`).
    """
    import torch

    planes = norm in ("inorm", "gnorm") and (precision is None or device.type == "cpu")
    return torch.contiguous_format if planes else torch.channels_last
