"""Files that are complete or absent, also after a power cut: atomic writes, exchanges of folders, and locks."""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from utils import UserError, echo, natural_key, printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2 (Linux): relative to the current folder; exchange the two
ABANDONED = 86400  # [s] where locks don't tell a partial file of a dead process from one in use, it is this old
TRIES, PAUSE = 5, 0.02  # attempts to lock, and [s] between them: a leaving reader holds the lock alone for a moment


@dataclass
class _Lock:
    """A lock held by this process: descriptor of its file, whether it is shared, and how often it was taken."""

    descriptor: int
    shared: bool
    count: int = 0


_held: dict[Path, _Lock] = {}  # lock file -> lock
_without_locks: set[int] = set()  # devices whose file systems have no locks, which was said


@contextmanager
def locked(folder: Path, advice: str, *, shared: bool = False, name: str = ".lock") -> Iterator[None]:
    """Lock a folder against other processes that write in it.

    This is a lock of the kernel (flock), which ends with the process. Nothing is locked if the file system has no
    locks, which is said once, or for a reader that can't write in the folder and finds no lock file there. A process
    may take a lock that it already holds.

    Parameters
    ----------
    folder : Path
        Created if missing (not for readers), and removed at the end if it is empty.
    advice : str
        What to do if another process holds the lock, besides waiting.
    shared : bool
        Whether other readers may hold the lock too.
    name : str
        Name of the lock file in the folder.

    Raises
    ------
    UserError
        Another process holds the lock (the message has its number, machine and command), or the folder is not
        writable.
    """
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


@contextmanager
def reading(folder: Path, names: Mapping[str, str], advice: str) -> Iterator[None]:
    """Keep other processes from replacing the entries of an `atomic_folder`, after completing an interrupted exchange.

    Parameters and errors as for `atomic_folder`.
    """
    while True:
        finish_exchange(folder, names)
        with locked(folder, advice, shared=True):
            if not _is_cut_off(folder):  # else a writer was killed between the two lines above
                yield
                return


def _acquire(path: Path, advice: str, shared: bool) -> int | None:
    """Create and lock a lock file; return its descriptor, or None if a reader can't create it."""
    while True:
        try:
            if not shared:
                make_folder(path.parent)
            descriptor, writable = _open_lock(path, os.O_RDWR | os.O_CREAT, os.O_RDWR, os.O_RDONLY)
        except OSError as error:
            if shared:
                return None
            if isinstance(error, PermissionError) and os.path.lexists(path):
                raise _foreign_lock(path, error) from error
            raise cannot_write(path.parent, error) from error
        try:
            _claim(path, descriptor, advice, shared)
            has_name = _has_name(descriptor, path)
            if has_name and not (writable or shared):  # of a dead process of another account
                with suppress(OSError):  # a sticky folder: do with that file, though our name is not in it
                    path.unlink()
                    has_name = False
        except BaseException:
            os.close(descriptor)
            raise
        if has_name:
            _sign(descriptor, path, shared)
            return descriptor
        os.close(descriptor)  # the holder before us has removed the file, so that nobody else sees our lock: try again


def _open_lock(path: Path, *ways: int) -> tuple[int, bool]:
    """Descriptor of a file, opened in the first of several ways that is permitted, and whether it can be written to.

    For a lock, reading is enough; a kernel may refuse `O_CREAT` for a file of another account (protected_regular).
    """
    first = None
    for flags in ways:
        try:
            return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666), flags != os.O_RDONLY
        except OSError as error:
            first = first or error
            if not isinstance(error, PermissionError):
                break
    assert first is not None
    raise first


def _has_name(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at its path, where another process may have removed it."""
    with suppress(FileNotFoundError):
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    return False


def _claim(path: Path, descriptor: int, advice: str, shared: bool) -> None:
    """Lock a file, or name its holder in an error."""
    for _ in range(TRIES):
        try:
            taken = _try_lock(descriptor, path, shared)
        except OSError as error:  # NFS: only who may write to a file can lock it alone
            raise _foreign_lock(path, error) from error
        if taken is None:
            _say_unlocked(path.parent)
        if taken is not False:
            return
        time.sleep(PAUSE)
    holder = ""
    with suppress(OSError):  # on SMB a locked file can't be read either
        os.lseek(descriptor, 0, os.SEEK_SET)
        holder = os.read(descriptor, 300).decode("utf-8", "replace").strip()
    raise UserError(f"{path.parent} is in use ({holder or 'another process reads it'}): wait for it, or {advice}")


def _foreign_lock(path: Path, error: OSError) -> UserError:
    """Error for a lock file of another account that can't be locked."""
    what = f"{path}: a lock of another account ({error.strerror})"
    return UserError(f"{what}: remove it if nothing of that account runs in {path.parent}, or choose another folder")


def _say_unlocked(folder: Path) -> None:
    """Warn once that a file system has no locks."""
    device = folder.stat().st_dev
    if device not in _without_locks and os.environ.get("RANK", "0") == "0":
        what = "the file system has no locks, nothing keeps two commands from writing there at once"
        echo(f"warning: {folder}: {what}: run one at a time", sys.stderr)
    _without_locks.add(device)


def _upgrade(path: Path, lock: _Lock, advice: str) -> None:
    """Turn a shared lock of this process into an exclusive one."""
    try:
        _claim(path, lock.descriptor, advice, shared=False)
    except UserError:
        _try_lock(lock.descriptor, path, shared=True)  # the failed attempt has released it
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
        os.write(descriptor, b"" if shared else _signature().encode())


def _signature() -> str:
    """Number, machine and command of this process, by which others name it."""
    command = printable(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    return f"process {os.getpid()} on {socket.gethostname()}: {command}"[:300]


def _try_lock(descriptor: int, path: Path, shared: bool) -> bool | None:
    """Lock a file; False if another process holds it, None if the file system has no locks.

    Raises
    ------
    OSError
        The file is open for reading only, and the file system (NFS) needs more.
    """
    try:
        if fcntl:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif not shared:  # on Windows an open file can't be replaced anyway
            import msvcrt

            os.lseek(descriptor, 2**20, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise
        if error.errno == errno.EACCES and fcntl:  # SMB says so of a lock that another machine holds
            return False if _can_lock_in(path.parent) else None
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK) else None
    return True


def _can_lock_in(folder: Path) -> bool:
    """Whether a file that nobody else has can be locked in a folder."""
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _release(path: Path, descriptor: int) -> None:
    """Release a lock, and remove its file if no other process holds it."""
    try:
        with suppress(OSError):
            if _try_lock(descriptor, path, shared=False) is not False:
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


# file systems whose syncfs has all files on the disk, also of a server, when it returns (statfs(2)): ext, XFS, Btrfs,
# F2FS, NFS, overlay, tmpfs; of others, such as SMB and FUSE, it sends them to the server, and only fsync does the rest
SYNCED_AT_ONCE = {0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x6969, 0x794C7630, 0x01021994}
MANY = 100  # more files than these are synced at once; 20,000: 0.5 s, by threads 5 s, one after the other 27 s (ext4)
NUM_SYNC = 8  # threads: the file system writes its journal once for all that wait for it


def flush(path: Path) -> None:
    """Write a file, or a folder with all that lies in it, from the memory of the system to the disk."""
    if path.is_file():
        return _sync(path, to_medium=True)
    files = [Path(root, name) for root, _, names in os.walk(path) for name in names]
    if len(files) > MANY and sync_file_system(path):
        return
    with ThreadPoolExecutor(NUM_SYNC) as pool:
        list(pool.map(_sync, files))
    flush_folders(*(Path(root) for root, *_ in os.walk(path)))


def flush_folders(*folders: Path) -> None:
    """Write the names in folders to the disk."""
    for folder in dict.fromkeys(folders):
        _sync(folder, to_medium=True)


def _sync(path: Path, to_medium: bool = False) -> None:
    """Call fsync for a file or folder, where there is such a thing; on macOS the disk also has to empty its cache."""
    if not fcntl and path.is_dir():
        return  # Windows
    try:
        descriptor = os.open(path, os.O_RDONLY if fcntl else os.O_RDWR)
        try:
            os.fsync(descriptor)
            if to_medium and hasattr(fcntl, "F_FULLFSYNC"):
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        finally:
            os.close(descriptor)
    except OSError as error:  # file systems without it, or a folder that may be written but not read
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EPERM):
            raise


def sync_file_system(path: Path) -> bool:
    """Write all files of a folder's file system to the disk at once, if it can (Linux); returns whether it did."""
    try:
        libc = ctypes.CDLL(None)
        found = (ctypes.c_long * 64)()
        if libc.statfs(os.fsencode(path), found) or found[0] & 0xFFFFFFFF not in SYNCED_AT_ONCE:
            return False
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return libc.syncfs(descriptor) == 0
        finally:
            os.close(descriptor)
    except (AttributeError, OSError, TypeError):  # macOS, Windows
        return False


def make_folder(path: Path) -> None:
    """Create a folder, with those above it, if it is missing; their names are on the disk afterwards."""
    missing = [part for part in (path, *path.parents) if not part.exists()]
    path.mkdir(parents=True, exist_ok=True)
    flush_folders(*(part.parent for part in missing))


def publish(partial: Path, path: Path, *, flush_parent: bool = True) -> None:
    """Rename a complete file or folder; all of it is on the disk before it takes its name, and its name afterwards.

    Parameters
    ----------
    partial : Path
        What was written.
    path : Path
        A file there is replaced; there must be no folder.
    flush_parent : bool
        Whether the name is on the disk on return. Else the caller has to call `flush_folders`, once for many files.
    """
    flush(partial)
    partial.replace(path)
    if flush_parent:
        flush_folders(path.parent, partial.parent)


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", *, flush_parent: bool = True) -> Iterator[IO]:
    """Open a file that appears under its name only when it is complete.

    The bytes go to `.NAME.XXXX.partial` in the same folder, are flushed to the disk, and renamed at the end; after an
    error the old file is unchanged. Partial files of killed processes are removed.

    Parameters
    ----------
    path : path-like
        The file. Its folder is created if missing. A link of that name is replaced, not followed.
    mode : str
        `"wb"`, or `"w"` for UTF-8 text.
    flush_parent : bool
        As for `publish`.

    Raises
    ------
    UserError
        The folder is not writable, or the disk is full.
    """
    path = Path(path)
    with explain_write_errors(path):
        make_folder(path.parent)
        sweep(path)
        partial, file = _open_partial(path, mode)
        try:
            with file:
                yield file
                file.flush()
                if fcntl:
                    publish(partial, path, flush_parent=flush_parent)  # while locked, or another process may remove it
            if not fcntl:  # Windows can't rename an open file
                publish(partial, path)
        finally:
            with suppress(OSError):  # the error of the write is the one to report
                discard(partial)


def _prefix(path: Path) -> str:
    """Beginning of the names of a file's partial files, cut so that these have at most 255 characters."""
    return f".{path.name[:50]}."


def _open_partial(path: Path, mode: str) -> tuple[Path, IO]:
    """Create a partial file, locked as long as this process lives."""
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    while True:
        partial = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}.partial")
        file = partial.open(mode.replace("w", "x"), **text)
        if _try_lock(file.fileno(), partial, shared=False) is not False and _has_name(file.fileno(), partial):
            return partial, file
        file.close()  # another process swept it between its creation and the lock: try again


def sweep(path: Path) -> None:
    """Remove the partial files of killed processes: those that nobody locks, or where that can't be told old ones."""
    for partial in path.parent.glob(f"{glob.escape(_prefix(path))}*.partial"):
        with suppress(OSError):
            status = partial.lstat()
            if not stat.S_ISREG(status.st_mode):
                continue
            descriptor, _ = _open_lock(partial, os.O_RDWR, os.O_RDONLY)
            try:
                dead = _try_lock(descriptor, partial, shared=False)
                if dead and fcntl:
                    partial.unlink()
            finally:
                os.close(descriptor)
            # Windows can't remove an open file, nor rename a locked one
            if time.time() - status.st_mtime > ABANDONED and (dead is None or (dead and not fcntl)):
                partial.unlink()


def partial_of(path: Path) -> Path:
    """Path of an output while it is written, visible to the user."""
    return path.with_name(f"{path.name}.partial")


def check_writable(folder: Path) -> None:
    """Create a folder, and raise a `UserError` if it is not writable, before hours of work rely on it."""
    with explain_write_errors(folder):
        make_folder(folder)
        tempfile.TemporaryFile(dir=folder).close()  # has no name, so that a killed process leaves none


OLD = ".old"  # folder in which earlier versions of this program kept the old entries during an exchange
NEW, PROVIDED = ".new", ".provided"  # folder of new entries that are not yet in place, and the list of their names
PARTIAL = ".partial"  # folder that a program fills, and from which what is left over is removed
REPLACED = ".replaced"  # folder in NEW for the old entries, which are removed when all new ones are in place
ANY = ".*"  # of what earlier versions replaced, everything
SHOWN = 5  # names in a message


@contextmanager
def atomic_folder(parent: str | os.PathLike, names: Mapping[str, str], advice: str) -> Iterator[Path]:
    """Fill a temporary folder whose entries replace those of `parent` together, at the end.

    One rename makes the new entries valid, when they are on the disk; if the process is killed before all are in place,
    `finish_exchange` completes the exchange. Meanwhile `parent` is locked against other processes.

    Parameters
    ----------
    parent : path-like
        Folder whose entries are replaced; created if missing. Its other entries stay.
    names : dict of str to str
        Files and folders that the caller writes into the yielded folder. Old ones of these names are removed, even if
        no new one was written. For a folder a regular expression of the names in it that are the program's: others are
        the user's, and stay.
    advice : str
        What to do if another process uses `parent`, besides waiting.

    Yields
    ------
    Path
        The temporary folder. After an error it is removed, and the old entries are unchanged.

    Raises
    ------
    UserError
        The folder is not writable, the disk is full, or another process uses it. Were not even the old entries to be
        put back, the message says that the next command completes the exchange.
    """
    parent = Path(parent)
    partial, exchange = parent / PARTIAL, Exchange(parent, names)
    with locked(parent, advice):
        finish_exchange(parent, names)
        try:
            discard(partial)
            partial.mkdir()
            yield partial
            exchange.provided = [name for name in names if (partial / name).exists()]
            note = {"names": dict(names), "provided": exchange.provided, "by": _signature()}
            (partial / PROVIDED).write_text(json.dumps(note), "utf-8")
            exchange.run()
        except OSError as error:
            if error.filename and not Path(error.filename).absolute().is_relative_to(parent.absolute()):
                raise  # an error of the caller, outside this folder
            raise cannot_write(parent, error) from error
        finally:
            discard(partial)
    exchange.say_kept()


def finish_exchange(parent: Path, names: Mapping[str, str]) -> None:
    """Complete an exchange that a killed process began, and say so, before the entries of an `atomic_folder` are read.

    Parameters and errors as for `atomic_folder`.
    """
    if not _is_cut_off(parent):
        return
    new, old = parent / NEW, parent / OLD
    if not os.access(parent, os.W_OK):
        what = f"{parent}: the exchange of its files was cut off, and this account can't complete it"
        raise UserError(f"{what}: any program that reads the folder does, for an account that may write there")
    with locked(parent, "run this again later"), explain_write_errors(parent):
        if _is_own_folder(old):  # of an earlier version: put the old entries back
            for entry in old.iterdir():
                discard(parent / entry.name)
                entry.rename(parent / entry.name)
            discard(old)
        if _is_own_folder(new) and not (new / PROVIDED).is_file():  # only its removal is left to do
            discard(new)
        elif _is_own_folder(new):
            exchange, begun_by = _noted(new / PROVIDED, parent, names)
            exchange.complete()
            discard(parent / PARTIAL)
            echo(f"note: {parent}: new files take their place, whose exchange was cut off; begun by {begun_by}")
            exchange.say_kept()


@dataclass
class Exchange:
    """Exchange of the entries of a folder for those in its `NEW`."""

    parent: Path
    names: Mapping[str, str]  # as for `atomic_folder`
    provided: list[str] = field(default_factory=list)  # names for which there is a new entry
    kept: list[str] = field(default_factory=list)  # the user's entries of the folders

    def run(self) -> None:
        """Make `PARTIAL` the folder of new entries, and complete the exchange, or undo it if that fails."""
        try:
            publish(self.parent / PARTIAL, self.parent / NEW)
            self.complete()
        except BaseException as error:
            if not (self.parent / NEW).exists():
                raise  # it has not begun, or is complete
            try:
                self._undo()
            except OSError as second:
                reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
                what = f"{self.parent}: the exchange of its files failed ({reason}), nor could it be undone ({second})"
                raise UserError(
                    f"{what}: the next command that uses this folder, whoever runs it, completes it"
                ) from error
            raise

    def complete(self) -> None:
        """Put the new entries in place of the old ones; can be repeated after an interruption at any point."""
        self._aside.mkdir(exist_ok=True)
        for name in self.names:
            place, fresh, aside = self._paths(name)
            to_replace = os.path.lexists(fresh) or name not in self.provided
            if to_replace and os.path.lexists(place) and not os.path.lexists(aside):
                place.rename(aside)
        self._flush()  # or after a power cut a new entry could stand where the old one was not moved away
        for name in self.names:
            place, fresh, aside = self._paths(name)
            if os.path.lexists(fresh):
                fresh.rename(place)
            self.kept += self._carry(name, aside, place)
        self._flush()
        self._end()

    def say_kept(self) -> None:
        """Print what was carried over, if anything was."""
        if self.kept:
            shown = ", ".join(self.kept[:SHOWN]) + (", ..." if len(self.kept) > SHOWN else "")
            echo(f"note: {self.parent}: kept what this program did not write: {shown}")

    def _undo(self) -> None:
        """Put the old entries back, all of which are in `REPLACED` or where they were."""
        for name in self.names:
            place, fresh, aside = self._paths(name)
            is_placed = name in self.provided and not os.path.lexists(fresh)
            if is_placed and os.path.lexists(place):
                self._carry(name, place, aside)
                place.rename(fresh)
            elif os.path.lexists(aside) and os.path.lexists(place):  # what is not the program's, alone
                self._carry(name, place, aside)
                place.rmdir()
            if os.path.lexists(aside):
                aside.rename(place)
        self._flush()
        self._end()

    @property
    def _aside(self) -> Path:
        return self.parent / NEW / REPLACED

    def _paths(self, name: str) -> tuple[Path, Path, Path]:
        """Place of an entry, and where the new one is before, and the old one after the exchange."""
        return self.parent / name, self.parent / NEW / name, self._aside / name

    def _carry(self, name: str, source: Path, target: Path) -> list[str]:
        """Move what is not the program's from one folder to another, which is created if missing; return the names."""
        if not _is_own_folder(source):
            return []
        foreign = [entry.name for entry in os.scandir(source) if not re.fullmatch(self.names[name], entry.name)]
        if foreign:
            target.mkdir(exist_ok=True)
            for entry in foreign:
                (source / entry).rename(target / entry)
            flush_folders(source, target)
        return [f"{name}/{entry}" for entry in sorted(foreign) if not entry.startswith(".")]

    def _flush(self) -> None:
        """Have all renames on the disk."""
        flush_folders(*(folder for folder in (self.parent, self.parent / NEW, self._aside) if folder.exists()))

    def _end(self) -> None:
        """Say by one rename that the exchange has ended, and only what is left over is to be removed."""
        discard(self.parent / PARTIAL)
        (self.parent / NEW).rename(self.parent / PARTIAL)
        flush_folders(self.parent)


def _noted(note: Path, parent: Path, names: Mapping[str, str]) -> tuple[Exchange, str]:
    """The exchange that a note describes, which may be of other entries than the caller's, and who began it."""
    try:
        noted = json.loads(note.read_text("utf-8"))
        found, provided = noted["names"], noted["provided"]
        if isinstance(found, list):  # of an earlier version
            found = {name: names.get(name, ANY) for name in found}
        for pattern in found.values():
            re.compile(pattern)
        if all(Path(name).name == name for name in (*found, *provided)):
            return Exchange(parent, found, list(provided)), printable(str(noted.get("by", "an earlier version")))
    except (ValueError, KeyError, TypeError, AttributeError, re.error):
        pass
    raise UserError(f"{note} is damaged: remove {note.parent}, and run again what writes {note.parent.parent}")


def _is_cut_off(parent: Path) -> bool:
    """Whether an exchange is in progress or was interrupted."""
    return _is_own_folder(parent / NEW) or _is_own_folder(parent / OLD)


def _is_own_folder(path: Path) -> bool:
    """Whether a path is a folder, not a link, which may lead anywhere."""
    return path.is_dir() and not path.is_symlink()


def swap_folders(partial: Path, path: Path) -> bool:
    """Exchange a folder for a new one as `publish` does, in one step, if the system can; returns whether it did."""
    flush(partial)
    done = rename_exchange(partial, path)
    if done:
        flush_folders(path.parent)
    return done


def rename_exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders, if the system can (Linux); returns whether it did."""
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


def writer_of(folder: Path) -> str:
    """Process that writes into a folder, as it signs its lock; empty if none does, or it is this one."""
    path = Path(os.path.realpath(folder)) / ".lock"
    if path in _held:
        return ""
    try:
        with path.open("rb") as file:
            is_free = _try_lock(file.fileno(), path, shared=True) is not False
            return "" if is_free else file.read(300).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def earlier_folders(folder: Path) -> list[Path]:
    """Subfolders `earlier-N` that `move_aside` has made, the newest last."""
    return sorted(folder.glob("earlier-*"), key=lambda path: natural_key(path.name))


def move_aside(folder: Path, files: list[Path]) -> Path | None:
    """Move files of an earlier run into a new subfolder `earlier-N`, and return that; None if there are no files."""
    if not files:
        return None
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    earlier = folder / f"earlier-{number}"
    make_folder(earlier)
    moved = []
    try:
        for file in files:
            file.rename(earlier / file.name)
            moved.append(file)
    except OSError:
        for file in moved:
            (earlier / file.name).rename(file)
        earlier.rmdir()
        raise
    flush_folders(folder, earlier)
    return earlier
