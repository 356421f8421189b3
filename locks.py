"""Locks of folders: one writer or many readers at a time. They are the kernel's (flock), and end with the process."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from files import cannot_write, has_name, make_folder, open_permitted, try_lock
from utils import UserError, echo, printable

TRIES, PAUSE = 5, 0.02  # attempts to lock, and [s] between them: a leaving reader holds the lock alone for a moment
LENGTH = 300  # most bytes of the text in a lock file


@dataclass
class _Lock:
    """A lock that this process holds."""

    descriptor: int  # of its file
    shared: bool
    count: int = 0  # number of `locked` blocks of this process that hold it


_held: dict[Path, _Lock] = {}  # lock file -> lock
_without_locks: set[int] = set()  # devices whose file systems have no locks, which was said


@contextmanager
def locked(folder: Path, advice: str, *, shared: bool = False, name: str = ".lock") -> Iterator[None]:
    """Lock a folder against other processes, or name its holder in an error that ends with `advice`; nests."""
    # A writer's folder is created if it is missing, and removed at the end if it is empty. Nothing is locked if the
    # file system has no locks, or for a reader that can't write in the folder and finds no lock file there.
    path = Path(os.path.realpath(folder)) / name  # the same lock for all paths of a folder
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
            if not lock.count and path in _held:  # not in a forked process, see `_forget_locks`
                _release(path, _held.pop(path).descriptor)
    finally:
        with suppress(OSError):  # not empty
            for part in missing:
                part.rmdir()


def _acquire(path: Path, advice: str, shared: bool) -> int | None:
    """Create and lock a lock file; return its descriptor, or None if a reader can't create it."""
    while True:
        try:
            if not shared:
                make_folder(path.parent)
            descriptor, writable = open_permitted(path, os.O_RDWR | os.O_CREAT, os.O_RDWR, os.O_RDONLY)
        except OSError as error:
            if shared:
                return None
            if isinstance(error, PermissionError) and os.path.lexists(path):
                raise _foreign_lock(path, error) from error
            raise cannot_write(path.parent, error) from error
        try:
            _claim(path, descriptor, advice, shared)
            is_ours = has_name(descriptor, path)
            if is_ours and not (writable or shared):  # of a dead process of another account
                with suppress(OSError):  # a sticky folder: do with that file, though our name is not in it
                    path.unlink()
                    is_ours = False
        except BaseException:
            os.close(descriptor)
            raise
        if is_ours:
            _sign(descriptor, path, shared)
            return descriptor
        os.close(descriptor)  # the holder before us has removed the file, so that nobody else sees our lock: try again


def _claim(path: Path, descriptor: int, advice: str, shared: bool) -> None:
    """Lock a file, or name its holder in an error."""
    for _ in range(TRIES):
        try:
            is_locked = try_lock(descriptor, path.parent, shared=shared)
        except OSError as error:  # NFS: only who may write to a file can lock it alone
            raise _foreign_lock(path, error) from error
        if is_locked is None and (device := path.parent.stat().st_dev) not in _without_locks:
            _without_locks.add(device)
            if os.environ.get("RANK", "0") == "0":
                what = "the file system has no locks, nothing keeps two commands from writing there at once"
                echo(f"warning: {path.parent}: {what}: run one at a time", sys.stderr)
        if is_locked is not False:
            return
        time.sleep(PAUSE)
    holder = ""
    with suppress(OSError):  # on SMB a locked file can't be read either
        os.lseek(descriptor, 0, os.SEEK_SET)
        holder = os.read(descriptor, LENGTH).decode("utf-8", "replace").strip()
    raise UserError(f"{path.parent} is in use ({holder or 'another process reads it'}): wait for it, or {advice}")


def _foreign_lock(path: Path, error: OSError) -> UserError:
    """Error for a lock file of another account that can't be locked."""
    what = f"{path}: a lock of another account ({error.strerror})"
    return UserError(f"{what}: remove it if nothing of that account runs in {path.parent}, or choose another folder")


def _upgrade(path: Path, lock: _Lock, advice: str) -> None:
    """Turn a shared lock of this process into an exclusive one."""
    try:
        _claim(path, lock.descriptor, advice, shared=False)
    except UserError:
        try_lock(lock.descriptor, path.parent, shared=True)  # the failed attempt has released it
        raise
    lock.shared = False
    _sign(lock.descriptor, path, shared=False)


def _sign(descriptor: int, path: Path, shared: bool) -> None:
    """Write this process into its lock file, replacing what a killed one has left."""
    with suppress(OSError):  # of another account: or who may write in the folder could not lock it over NFS
        path.chmod(path.stat().st_mode | path.parent.stat().st_mode & 0o066)
    with suppress(OSError):  # a full disk: the lock works without it
        os.truncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, b"" if shared else signature().encode())


def signature() -> str:
    """Number, machine and command of this process, by which others name it."""
    command = printable(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    return f"process {os.getpid()} on {socket.gethostname()}: {command}"[:LENGTH]


def _release(path: Path, descriptor: int) -> None:
    """Release a lock, and remove its file if no other process holds it."""
    try:
        with suppress(OSError):
            if try_lock(descriptor, path.parent) is not False:
                path.unlink()
    finally:
        os.close(descriptor)


def _forget_locks() -> None:
    """Close the locks in a forked process: they must end with the parent."""
    for lock in _held.values():
        os.close(lock.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def writer_of(folder: Path) -> str:
    """Process that writes into a folder, as it signs its lock; empty if none does, or it is this one."""
    path = Path(os.path.realpath(folder)) / ".lock"
    if path in _held:
        return ""
    try:
        with path.open("rb") as file:
            is_free = try_lock(file.fileno(), path.parent, shared=True) is not False
            return "" if is_free else file.read(LENGTH).decode("utf-8", "replace").strip()
    except OSError:
        return ""
