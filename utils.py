"""What every other file may use: errors meant for users, whole-or-nothing writes, signals, devices."""

from __future__ import annotations

import errno
import functools
import glob
import importlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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
        say(printable(message if rank == "0" else f"process {rank}: {message}"), sys.stderr)
        return status

    return run


def printable(text: str) -> str:
    r"""Text on one line, with nothing in it that steers a terminal: control characters are written as `\x1b`.

    Examples
    --------
    >>> print(printable("a\x1b[31m.png"))
    a\x1b[31m.png
    """
    steers = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(steers, lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines at once; names of files and classes in them can't steer the terminal.

    Parameters
    ----------
    text : str
        One or more lines.
    file : file, optional
        Where to; default: stdout.
    """
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    text = "\n".join(map(printable, text.split("\n"))).encode(encoding, "backslashreplace").decode(encoding)
    print(text, file=file, flush=True)


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
    """Whether an error says that a device or the machine has no more memory."""
    texts = ("out of memory", "can't allocate memory", "could not create a primitive", "bad_alloc")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Say what to do when the memory doesn't suffice.

    Raises
    ------
    UserError
        The memory did not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise UserError(f"out of memory: {advice}") from error
        raise


@dataclass
class _Lock:
    """A lock that this process holds: descriptor of its file, how often it was taken, and whether for reading."""

    descriptor: int
    shared: bool
    count: int = 0


_held: dict[Path, _Lock] = {}  # by lock file
LOCK = ".lock"
ABANDONED = 86400  # [s] a partial file that nobody locks is a dead process's; for Windows, see `_sweep`
TRIES, PAUSE = 5, 0.02  # [s] a lock that is busy is tried so often: a reader that leaves holds it alone for a moment


@contextmanager
def locked(folder: Path, advice: str, *, shared: bool = False, name: str = LOCK) -> Iterator[None]:
    """Keep other processes from writing in a folder, or with `shared` from doing so while this one reads.

    The lock is the kernel's (flock), so that a killed process leaves none behind. Where the file system has no locks,
    or where a reader can't write, nothing is locked. A process may take a lock that it holds once more.

    Parameters
    ----------
    folder : Path
        Made when missing, but by readers; removed at the end if it was and holds nothing.
    advice : str
        What to do when another process holds the lock, besides waiting.
    shared : bool
        Other readers may hold the lock as well.
    name : str
        Of the lock file in the folder.

    Raises
    ------
    UserError
        Another process holds the lock; its number, machine and command are said. Or the folder takes no file.
    """
    path = Path(os.path.realpath(folder)) / name  # one lock for all names of a folder
    missing = [] if shared else [part for part in (path.parent, *path.parent.parents) if not part.exists()]
    try:
        lock = _held.get(path)
        if lock is None:
            descriptor = _acquire(path, advice, shared)
            if descriptor is None:
                yield
                return
            lock = _held[path] = _Lock(descriptor, shared)
        elif lock.shared and not shared:
            _upgrade(path, lock, advice)
        lock.count += 1
        try:
            yield
        finally:
            lock.count -= 1
            if not lock.count and path in _held:  # a forked process holds none
                _release(path, _held.pop(path).descriptor)
    finally:
        with suppress(OSError):  # it holds something
            for part in missing:
                part.rmdir()


@contextmanager
def reading(folder: Path, names: list[str], advice: str) -> Iterator[None]:
    """While entered, entries of an `atomic_folder` are whole and not replaced.

    Parameters
    ----------
    folder : Path
        Whose entries are read.
    names : list of str
        As for `atomic_folder`.
    advice : str
        What to do, besides waiting, when another process writes there.

    Raises
    ------
    UserError
        Another process writes there.
    """
    while True:
        finish_exchange(folder, names)
        with locked(folder, advice, shared=True):
            if not _is_cut_off(folder):  # by a writer that came and was killed in between
                yield
                return


def _acquire(path: Path, advice: str, shared: bool) -> int | None:
    """Descriptor of a lock file that is locked now; None where there are no locks."""
    while True:
        try:
            if not shared:
                path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            if shared:
                return None
            raise cannot_write(path.parent, error) from error
        try:
            _claim(path, descriptor, advice, shared)
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                _sign(descriptor, shared)
                return descriptor
        except FileNotFoundError:  # removed by the process that held it
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _claim(path: Path, descriptor: int, advice: str, shared: bool) -> None:
    """Lock a file, or say who holds it."""
    for _ in range(TRIES):
        if _try_lock(descriptor, shared) is not False:
            return
        time.sleep(PAUSE)
    os.lseek(descriptor, 0, os.SEEK_SET)
    holder = os.read(descriptor, 300).decode("utf-8", "replace").strip() or "another process reads it"
    raise UserError(f"{path.parent} is in use ({holder}): wait for it, or {advice}")


def _upgrade(path: Path, lock: _Lock, advice: str) -> None:
    """Turn this process's lock for reading into one for writing."""
    try:
        _claim(path, lock.descriptor, advice, shared=False)
    except UserError:
        _try_lock(lock.descriptor, shared=True)  # trying for more has given it up
        raise
    lock.shared = False
    _sign(lock.descriptor, shared=False)


def _sign(descriptor: int, shared: bool) -> None:
    """Note in a lock file who writes, in the place of what a killed process has left."""
    command = printable(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    text = "" if shared else f"process {os.getpid()} on {socket.gethostname()}: {command}"[:300]
    with suppress(OSError):  # a full disk: the lock holds without it
        os.truncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, text.encode())


def _try_lock(descriptor: int, shared: bool) -> bool | None:
    """Lock a file; False where another process has, None where the file system has no locks."""
    try:
        if fcntl:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif not shared:  # on Windows a file that is read can't be replaced anyway
            import msvcrt

            os.lseek(descriptor, 2**20, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK) else None
    return True


def _release(path: Path, descriptor: int) -> None:
    """Give a lock back, and remove its file if nobody else holds it."""
    try:
        if _try_lock(descriptor, shared=False) is not False:
            with suppress(OSError):
                path.unlink()
    finally:
        os.close(descriptor)


def _forget_locks() -> None:
    """In a forked process: the locks are its parent's, and must end with it."""
    for lock in _held.values():
        os.close(lock.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a file that appears under its name only when it is whole.

    The bytes go to `.NAME.XXXX.partial` beside the goal (NAME: at most 50 letters of it), are flushed to the disk, and
    renamed at the end; on an error the partial file is removed and the old file stays. What killed processes left of
    that name is removed.

    Parameters
    ----------
    path : path-like
        The goal. Its folder is made when missing. A link of that name is replaced, not followed.
    mode : str
        `"wb"`, or `"w"` for UTF-8 text.

    Raises
    ------
    UserError
        The folder or the disk takes no file.
    """
    path = Path(path)
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        partial, file = _open_partial(path, mode)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl:
                partial.replace(path)  # locked up to here, or another process would take it for a dead one's
        if not fcntl:  # Windows renames no file that is open
            partial.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # what made the write fail is said, not what tidying up met
            if partial:
                discard(partial)


def _prefix(path: Path) -> str:
    """What the names of a goal's partial files begin with; short enough for a goal of 255 letters."""
    return f".{path.name[:50]}."


def _open_partial(path: Path, mode: str) -> tuple[Path, IO]:
    """New partial file of a goal, with a lock on it that says that this process is alive."""
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    while True:
        partial = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}.partial")
        file = partial.open(mode.replace("w", "x"), **text)
        swept = _try_lock(file.fileno(), shared=False) is False
        with suppress(FileNotFoundError):
            if not swept and os.fstat(file.fileno()).st_ino == partial.stat().st_ino:
                return partial, file
        file.close()  # before it was locked, another process has taken it for a dead one's


def _sweep(path: Path) -> None:
    """Remove the partial files of a goal whose processes have been killed: nobody locks them."""
    for partial in path.parent.glob(f"{glob.escape(_prefix(path))}*.partial"):
        with suppress(OSError):
            status = partial.lstat()
            if not stat.S_ISREG(status.st_mode):
                continue
            with partial.open("r+b") as file:
                dead = _try_lock(file.fileno(), shared=False)
                if dead and fcntl:
                    partial.unlink()
            if dead and not fcntl and time.time() - status.st_mtime > ABANDONED:
                partial.unlink()  # Windows removes no file that is open, and renames none that is locked


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
    path = folder / f".writable-{secrets.token_hex(4)}"
    with atomic_write(path, "w"):
        pass
    discard(path)


OLD = ".old"  # what earlier versions of this program had set aside
NEW, PROVIDED = ".new", ".provided"  # entries that are whole but not yet in place, and the note of their names


@contextmanager
def atomic_folder(parent: str | os.PathLike, names: list[str], advice: str) -> Iterator[Path]:
    """Fill a temporary folder whose entries replace those of `parent` together, at the end.

    From one rename on the new entries count; should the process be killed before they are in place,
    `finish_exchange` puts them there. Other processes are kept from writing in `parent` meanwhile.

    Parameters
    ----------
    parent : path-like
        Folder whose entries are replaced; made when missing. Its other entries stay.
    names : list of str
        Entries (files or folders) that the caller writes into the yielded folder. Old entries of these
        names go away, also where no new one was written.
    advice : str
        What to do, besides waiting, when another process writes there.

    Yields
    ------
    Path
        The temporary folder. After an error it is removed, and the old entries are as they were.

    Raises
    ------
    UserError
        The folder or the disk takes no file, or another process writes there.
    """
    parent = Path(parent)
    partial = parent / ".partial"
    with locked(parent, advice):
        finish_exchange(parent, names)
        try:
            discard(partial)
            partial.mkdir()
            yield partial
            provided = [name for name in names if (partial / name).exists()]
            with atomic_write(partial / PROVIDED, "w") as note:
                json.dump({"names": names, "provided": provided}, note)
            partial.rename(parent / NEW)
            finish_exchange(parent, names)
        except OSError as error:
            if error.filename and not Path(error.filename).absolute().is_relative_to(parent.absolute()):
                raise  # the caller could not read something else
            raise cannot_write(parent, error) from error
        finally:
            discard(partial)


def finish_exchange(parent: Path, names: list[str]) -> None:
    """Put in place what a killed process had made whole: whoever reads entries of an `atomic_folder` calls this first.

    Parameters
    ----------
    parent : Path
        Folder whose entries are replaced.
    names : list of str
        As for `atomic_folder`.

    Raises
    ------
    UserError
        The exchange is another process's and goes on, or the folder takes no file.
    """
    if not _is_cut_off(parent):
        return
    new, old = parent / NEW, parent / OLD
    with locked(parent, "run this again then"):
        try:
            if _is_own_folder(old):  # of an earlier version of this program, which put the old entries back
                for entry in old.iterdir():
                    discard(parent / entry.name)
                    entry.rename(parent / entry.name)
                discard(old)
            if _is_own_folder(new):
                _exchange(parent, new, names)
        except OSError as error:
            raise cannot_write(parent, error) from error


def _exchange(parent: Path, new: Path, names: list[str]) -> None:
    """Replace entries by those of a folder; may be cut off anywhere and called again."""
    names, provided = _noted(new / PROVIDED, names)
    for name in names:
        if (new / name).exists():
            discard(parent / name)
            (new / name).rename(parent / name)
        elif name not in provided:
            discard(parent / name)
    discard(new)


def _noted(note: Path, names: list[str]) -> tuple[list[str], list[str]]:
    """Entries that an exchange replaces, which may be others than its reader names, and those that it brings."""
    if not note.is_file():  # all is in place but the removal of the folder
        return names, names
    try:
        noted = json.loads(note.read_text("utf-8"))
        names, provided = noted["names"], noted["provided"]
        if all(Path(name).name == name for name in (*names, *provided)):
            return names, provided
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{note} is damaged: remove {note.parent}, and run again what writes {note.parent.parent}")


def _is_cut_off(parent: Path) -> bool:
    """Whether an exchange of entries goes on, or was cut off."""
    return _is_own_folder(parent / NEW) or _is_own_folder(parent / OLD)


def _is_own_folder(path: Path) -> bool:
    """Whether a path is a folder, and no link to one, which somebody may have planted."""
    return path.is_dir() and not path.is_symlink()


def discard(path: Path) -> None:
    """Remove a file, link or folder if it can be removed."""
    if _is_own_folder(path):
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
    if name.strip() in ("", ".", "..") or re.search(r"[/\\]", name) or not name.isprintable():
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
        say(f"warning: --gpu_ids {gpu_ids}: no GPU {number} here, running on the CPU", sys.stderr)
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
        with torch.cuda.device(device):
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif amp == "auto":
        can = torch.cpu.get_capabilities()
        fast = can.get("avx512_bf16", False) or can.get("amx_tile", False)
    else:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.bfloat16 if fast else None
