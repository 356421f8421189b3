"""Files that are complete or absent: atomic writes, exchanges of folders, and locks between processes."""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from utils import UserError, printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@dataclass
class _Lock:
    """A lock held by this process: descriptor of its file, whether it is shared, and how often it was taken."""

    descriptor: int
    shared: bool
    count: int = 0


_held: dict[Path, _Lock] = {}  # lock file -> lock
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux: relative to the current folder; exchange the two
LOCK = ".lock"
ABANDONED = 86400  # [s] on Windows an unlocked partial file may be about to be renamed, unless it is this old
TRIES, PAUSE = 5, 0.02  # attempts, and [s] between them: a leaving reader holds the lock alone for a moment


@contextmanager
def locked(folder: Path, advice: str, *, shared: bool = False, name: str = LOCK) -> Iterator[None]:
    """Lock a folder against other processes that write in it.

    The lock is one of the kernel (flock), so that a killed process leaves none behind. Nothing is locked if the file
    system has no locks, or if a reader may not write. A process may take a lock again that it holds.

    Parameters
    ----------
    folder : Path
        Created if missing, except by readers, and then removed at the end if it is empty.
    advice : str
        What to do if another process holds the lock, besides waiting.
    shared : bool
        For reading: other readers may hold the lock too.
    name : str
        Name of the lock file in the folder.

    Raises
    ------
    UserError
        Another process holds the lock (the message has its number, machine and command), or the folder is not
        writable.
    """
    path = Path(os.path.realpath(folder)) / name  # one lock for all paths of a folder
    # folders that this call creates, innermost first
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
            if not lock.count and path in _held:  # a forked process has forgotten it
                _release(path, _held.pop(path).descriptor)
    finally:
        with suppress(OSError):  # not empty
            for part in missing:
                part.rmdir()


@contextmanager
def reading(folder: Path, names: list[str], advice: str) -> Iterator[None]:
    """While entered, the entries of an `atomic_folder` are complete and not replaced.

    Parameters
    ----------
    folder : Path
        Folder whose entries are read.
    names : list of str
        As for `atomic_folder`.
    advice : str
        What to do if another process writes there, besides waiting.

    Raises
    ------
    UserError
        Another process writes there.
    """
    while True:
        finish_exchange(folder, names)
        with locked(folder, advice, shared=True):
            if not _is_cut_off(folder):  # by a writer killed between the two lines above
                yield
                return


def _acquire(path: Path, advice: str, shared: bool) -> int | None:
    """Create and lock a lock file; return its descriptor, or None if a reader can't create it."""
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
            # the holder before us may have removed the file: then the lock is on a file without a name; try again
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                _sign(descriptor, shared)
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _claim(path: Path, descriptor: int, advice: str, shared: bool) -> None:
    """Lock a file, or raise an error that names the holder."""
    for _ in range(TRIES):
        if _try_lock(descriptor, shared) is not False:
            return
        time.sleep(PAUSE)
    os.lseek(descriptor, 0, os.SEEK_SET)
    holder = os.read(descriptor, 300).decode("utf-8", "replace").strip() or "another process reads it"
    raise UserError(f"{path.parent} is in use ({holder}): wait for it, or {advice}")


def _upgrade(path: Path, lock: _Lock, advice: str) -> None:
    """Turn a shared lock of this process into an exclusive one."""
    try:
        _claim(path, lock.descriptor, advice, shared=False)
    except UserError:
        _try_lock(lock.descriptor, shared=True)  # the failed attempt has released it
        raise
    lock.shared = False
    _sign(lock.descriptor, shared=False)


def _sign(descriptor: int, shared: bool) -> None:
    """Write the holder into a lock file, over what a killed process has left."""
    command = printable(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    text = "" if shared else f"process {os.getpid()} on {socket.gethostname()}: {command}"[:300]
    with suppress(OSError):  # a full disk: the lock works without it
        os.truncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, text.encode())


def _try_lock(descriptor: int, shared: bool) -> bool | None:
    """Lock a file; False if another process holds it, None if the file system has no locks."""
    try:
        if fcntl:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif not shared:  # on Windows an open file can't be replaced anyway
            import msvcrt

            os.lseek(descriptor, 2**20, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK) else None
    return True


def _release(path: Path, descriptor: int) -> None:
    """Release a lock, and remove its file if no other process holds it."""
    try:
        if _try_lock(descriptor, shared=False) is not False:
            with suppress(OSError):
                path.unlink()
    finally:
        os.close(descriptor)


def _forget_locks() -> None:
    """Close the locks in a forked process: they belong to the parent and must end with it."""
    for lock in _held.values():
        os.close(lock.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a file that appears under its name only when it is complete.

    The bytes go to `.NAME.XXXX.partial` in the same folder (NAME: at most 50 letters), are flushed to the disk, and
    renamed at the end; after an error the partial file is removed and the old file stays. Partial files of killed
    processes are removed.

    Parameters
    ----------
    path : path-like
        The file. Its folder is created if missing. A link of that name is replaced, not followed.
    mode : str
        `"wb"`, or `"w"` for UTF-8 text.

    Raises
    ------
    UserError
        The folder is not writable, or the disk is full.
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
                partial.replace(path)  # still locked, or another process would take it for a dead one's
        if not fcntl:  # Windows can't rename an open file
            partial.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # the error of the write is the one to report
            if partial:
                discard(partial)


def _prefix(path: Path) -> str:
    """Beginning of the names of a file's partial files; short enough if the name has 255 letters."""
    return f".{path.name[:50]}."


def _open_partial(path: Path, mode: str) -> tuple[Path, IO]:
    """Create a partial file, locked as long as this process lives."""
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    while True:
        partial = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}.partial")
        file = partial.open(mode.replace("w", "x"), **text)
        swept = _try_lock(file.fileno(), shared=False) is False
        with suppress(FileNotFoundError):
            if not swept and os.fstat(file.fileno()).st_ino == partial.stat().st_ino:
                return partial, file
        file.close()  # between creation and lock, another process took it for a dead one's; try again


def _sweep(path: Path) -> None:
    """Remove the partial files of killed processes, which nobody locks."""
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
                partial.unlink()  # Windows can't remove an open file, nor rename a locked one


def partial_of(path: Path) -> Path:
    """Path of an output that is being written, visible to the user."""
    return path.with_name(f"{path.name}.partial")


def check_writable(folder: Path) -> None:
    """Create a folder and test that it is writable, before hours of work rely on it.

    Raises
    ------
    UserError
        The folder is not writable, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # has no name, so that a killed process leaves none
            pass
    except OSError as error:
        raise cannot_write(folder, error) from error


OLD = ".old"  # folder of old entries that earlier versions of this program set aside
NEW, PROVIDED = ".new", ".provided"  # folder of complete entries that are not yet in place, and the list of their names


@contextmanager
def atomic_folder(parent: str | os.PathLike, names: list[str], advice: str) -> Iterator[Path]:
    """Fill a temporary folder whose entries replace those of `parent` together, at the end.

    One rename makes the new entries valid; if the process is killed before all are in place, `finish_exchange`
    completes the exchange. `parent` is locked against other writers meanwhile.

    Parameters
    ----------
    parent : path-like
        Folder whose entries are replaced; created if missing. Its other entries stay.
    names : list of str
        Entries (files or folders) that the caller writes into the yielded folder. Old entries of these names are
        removed, even if no new one was written.
    advice : str
        What to do if another process writes there, besides waiting.

    Yields
    ------
    Path
        The temporary folder. After an error it is removed, and the old entries are unchanged.

    Raises
    ------
    UserError
        The folder is not writable, the disk is full, or another process writes there.
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
                raise  # an error of the caller, outside this folder
            raise cannot_write(parent, error) from error
        finally:
            discard(partial)


def finish_exchange(parent: Path, names: list[str]) -> None:
    """Complete an exchange that a killed process began; call this before reading entries of an `atomic_folder`.

    Parameters
    ----------
    parent : Path
        Folder whose entries are replaced.
    names : list of str
        As for `atomic_folder`.

    Raises
    ------
    UserError
        Another process is exchanging entries now, or the folder is not writable.
    """
    if not _is_cut_off(parent):
        return
    new, old = parent / NEW, parent / OLD
    with locked(parent, "run this again then"):
        try:
            if _is_own_folder(old):  # of an earlier version: put the old entries back
                for entry in old.iterdir():
                    discard(parent / entry.name)
                    entry.rename(parent / entry.name)
                discard(old)
            if _is_own_folder(new):
                _exchange(parent, new, names)
        except OSError as error:
            raise cannot_write(parent, error) from error


def _exchange(parent: Path, new: Path, names: list[str]) -> None:
    """Replace entries by those of a folder; may be interrupted anywhere and called again."""
    names, provided = _noted(new / PROVIDED, names)
    for name in names:
        if (new / name).exists():
            discard(parent / name)
            (new / name).rename(parent / name)
        elif name not in provided:
            discard(parent / name)
    discard(new)


def _noted(note: Path, names: list[str]) -> tuple[list[str], list[str]]:
    """Entries that an exchange replaces, which may differ from the caller's, and those that it provides."""
    if not note.is_file():  # only the removal of the folder was left to do
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
    """Whether an exchange of entries is in progress or was interrupted."""
    return _is_own_folder(parent / NEW) or _is_own_folder(parent / OLD)


def _is_own_folder(path: Path) -> bool:
    """Whether a path is a folder and not a link to one, which may lead anywhere."""
    return path.is_dir() and not path.is_symlink()


def swap_folders(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, if the system can (Linux); returns whether it did."""
    try:
        libc = ctypes.CDLL(None)
        return libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0
    except (AttributeError, OSError, TypeError):  # macOS, an old libc, Windows
        return False


def discard(path: Path) -> None:
    """Remove a file, link or folder, if possible."""
    if _is_own_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.EROFS, errno.EACCES):
                raise


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` (a folder that is not writable, a full disk) into a `UserError` that names what is written."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """Error for a folder that is not writable or a full disk."""
    return UserError(f"cannot write {path}: {error.strerror or error}: choose another folder, or make room")


def move_aside(folder: Path, files: list[Path]) -> Path | None:
    """Move files of an earlier run into a new subfolder `earlier-N`.

    Parameters
    ----------
    folder : Path
        Folder that gets the subfolder.
    files : list of Path
        Files in that folder.

    Returns
    -------
    Path or None
        The subfolder; None if there was no file to move.
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
