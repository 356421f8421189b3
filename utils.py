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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    import torch

Network = TypeVar("Network", bound="torch.nn.Module")

SIGPIPE = 13  # signal.SIGPIPE does not exist on Windows
OMP_SPIN_COUNT = "3000"  # after which idle OpenMP threads sleep; the default 300000 blocks cores others need


class UserError(Exception):
    """An error that the user can fix: one line says what is wrong, where, and what to do; no traceback."""

    status = 1


class FlagError(UserError):
    """A flag has an invalid value; the program exits with the status of argparse."""

    status = 2


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
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime would call its maker; read when it is imported
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
    """
    import torch

    numbers = [int(number) for number in gpu_ids.split(",")]
    rank = int(os.environ.get("LOCAL_RANK", 0))
    num_process = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
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
