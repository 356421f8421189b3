"""What every other file may use: errors meant for users, whole-or-nothing writes, signals, devices."""

from __future__ import annotations

import errno
import functools
import importlib
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIGPIPE = 13  # Windows has no such name
SPINS = (
    "3000"  # of a waiting thread of torch, then it sleeps; by OpenMP's own 300000 it takes the core of one that works
)


class UserError(Exception):
    """What is wrong, where, and what to do: one line for the user, who gets no traceback."""

    status = 1


class FlagError(UserError):
    """A flag's value breaks the flag's rule; the program exits as argparse does."""

    status = 2


def program(main: Callable[..., int | None]) -> Callable[..., int]:
    """Turn what `main(argv)` raises for its user into one line on stderr and an exit status.

    Parameters
    ----------
    main : callable
        Takes the arguments without the program's name (`None`: those of the process).

    Returns
    -------
    callable
        Returns 0, the status of the `UserError` (1, or 2 for a flag), or 130 after Ctrl-C.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported
        try:
            return main(argv) or 0
        except UserError as error:
            message, status = f"error: {_last_line(str(error))}", error.status
        except BrokenPipeError:
            _mute()
            return 128 + SIGPIPE
        except KeyboardInterrupt:
            message, status = "interrupted: nothing was left half written", 130
        except (OSError, MemoryError, RuntimeError) as error:
            message, status = f"error: {_explain(error)}", 1
        rank = os.environ.get("RANK", "0")
        print(message if rank == "0" else f"process {rank}: {message}", file=sys.stderr)
        return status

    return run


def _mute() -> None:
    """Print nothing any more: the reader of our output has gone, as `| head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _last_line(message: str) -> str:
    """Message of an error; one that comes from a loader process has its traceback in front."""
    if "Original Traceback" in message:
        return message.strip().splitlines()[-1].partition(": ")[2]
    return message


def _explain(error: Exception) -> str:
    """One line for what the machine refuses; whatever is a defect of ours is raised again."""
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "out of memory: lower --batch_size, --ny_load and --nx_load, --nch_ker or --cache_gb"
    if re.search(r"gloo|NCCL|torch\.distributed|store", f"{type(error).__module__} {error}"):
        return "another process of this run has died or is too slow: see its message, or raise --dist_timeout"
    if isinstance(error, OSError) and error.errno:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: check the path, the permissions and the free space"
    raise error


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a file that appears under its name only when it is whole.

    The bytes go to `.NAME.partial` beside the goal, are flushed to the disk, and renamed at the end; on an
    error the partial file is removed and the old file stays.

    Parameters
    ----------
    path : path-like
        The goal. Its folder is made when missing.
    mode : str
        `"wb"`, or `"w"` for UTF-8 text.

    Raises
    ------
    UserError
        The folder or the disk takes no file.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open(mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        _discard(partial)
        raise cannot_write(path, error) from error
    except BaseException:
        _discard(partial)
        raise


def partial_of(path: Path) -> Path:
    """Where a file is written before it is whole, where a user may see how far it is."""
    return path.with_name(f"{path.name}.partial")


def check_module(name: str, purpose: str) -> None:
    """Refuse what needs a package that is not installed.

    Raises
    ------
    UserError
        The package is missing; says how to get it.
    """
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{purpose} needs the package {name}: pip install -r requirements-extra.txt") from error


def check_writable(folder: Path) -> None:
    """Make a folder, and try now what hours of work will rely on later.

    Raises
    ------
    UserError
        The folder takes no file.
    """
    with atomic_write(folder / ".writable", "w"):
        pass
    (folder / ".writable").unlink()


@contextmanager
def atomic_folder(parent: str | os.PathLike, names: list[str]) -> Iterator[Path]:
    """Fill a temporary folder whose entries replace those of `parent` together, at the end.

    Parameters
    ----------
    parent : path-like
        Folder whose entries are replaced; made when missing. Its other entries stay.
    names : list of str
        Entries (files or folders) that the caller writes into the yielded folder. Old entries of these
        names go away, also where no new one was written.

    Yields
    ------
    Path
        The temporary folder. After an error it is removed, and the old entries are as they were.

    Raises
    ------
    UserError
        The folder or the disk takes no file.
    """
    parent = Path(parent)
    partial, old, done = (parent / name for name in (".partial", ".old", ".done"))
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _restore(old, parent)
        _discard(done)
        _discard(partial)
        partial.mkdir()
        yield partial
        old.mkdir()
        for name in names:
            if (parent / name).exists():
                (parent / name).rename(old / name)
        for name in names:
            if (partial / name).exists():
                (partial / name).rename(parent / name)
        old.rename(done)  # from here on the new entries count, however the removal of the old ones ends
    except OSError as error:
        raise cannot_write(parent, error) from error
    finally:
        _restore(old, parent)
        _discard(partial)
        _discard(done)


def _restore(old: Path, parent: Path) -> None:
    """Put back what a cut-off exchange had set aside."""
    for entry in old.iterdir() if old.is_dir() else ():
        _discard(parent / entry.name)
        entry.rename(parent / entry.name)
    _discard(old)


def _discard(path: Path) -> None:
    """Remove a file or folder if it can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.EROFS, errno.EACCES):
                raise


def cannot_write(path: Path, error: OSError) -> UserError:
    """What to tell when a folder or the disk takes no file."""
    return UserError(f"cannot write {path}: {error.strerror or error}: choose another folder, or make room")


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Key that sorts names as people count: numbers by value.

    Examples
    --------
    >>> sorted(["10.npy", "9.npy", "a2", "a10"], key=natural_key)
    ['9.npy', '10.npy', 'a2', 'a10']
    """
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def check_name(flag: str, name: str) -> None:
    """Refuse a name that is no single folder.

    Raises
    ------
    UserError
        The name is empty, `.` or `..`, or holds a separator or a control character.
    """
    if name.strip() in ("", ".", "..") or re.search(r"[/\\\x00-\x1f]", name):
        raise UserError(f"{flag} {name!r} is no folder name: use letters, digits, '-' and '_', no '/' and no '..'")


def move_aside(folder: Path, files: list[Path]) -> Path | None:
    """Move files of an earlier run into a new subfolder `earlier-K`.

    Parameters
    ----------
    folder : Path
        Gets the subfolder.
    files : list of Path
        Files in that folder.

    Returns
    -------
    Path or None
        The subfolder; None where no file had to move.
    """
    if not files:
        return None
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    earlier = folder / f"earlier-{number}"
    earlier.mkdir()
    for file in files:
        file.rename(earlier / file.name)
    return earlier


class StopRequest:
    """While entered, SIGINT, SIGTERM and a closed terminal (SIGHUP) set `signum` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt; under nohup, SIGHUP stays ignored. Outside the main thread, where Python
    takes no handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._old: dict[int, object] = {}

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
        """While entered, output that nobody reads any more counts as SIGPIPE."""
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
        `"-1"` for the CPU, or a comma-separated list of GPU numbers. A process of torchrun takes the one at its place
        in the list, or where the list is shorter than the processes are many, the GPU of its own number.

    Returns
    -------
    torch.device
        The GPU, or the CPU with a warning on stderr where that GPU is not there.
    """
    import torch

    numbers = [int(number) for number in gpu_ids.split(",")]
    place, places = (int(os.environ.get(name, one)) for name, one in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    number = numbers[place] if len(numbers) >= places else place
    if numbers[0] < 0:
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        print(f"warning: --gpu_ids {gpu_ids}: no GPU {number} here, running on the CPU", file=sys.stderr)
        return torch.device("cpu")
    return torch.device("cuda", number)


def pick_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """Type that the network computes in while it trains; weights, normalisation's statistics and losses are float32.

    Parameters
    ----------
    amp : {"auto", "off", "bf16", "fp16"}
        `auto` takes bfloat16 where the device has instructions for it: elsewhere it is slower than float32.
    device : torch.device
        What the network runs on.

    Returns
    -------
    torch.dtype or None
        For `torch.autocast`; None for float32 throughout.
    """
    import torch

    if amp == "auto" and device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif amp == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.bfloat16 if fast else None
