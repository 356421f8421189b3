"""Files that are complete or absent, also after a power cut: written under another name, on the disk, and renamed."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

from utils import UserError, natural_key

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2 (Linux): relative to the current folder; exchange the two
ABANDONED = 86400  # [s] where locks don't tell a partial file of a dead process from one in use, it is this old

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
        status = (ctypes.c_long * 64)()
        if libc.statfs(os.fsencode(path), status) or status[0] & 0xFFFFFFFF not in SYNCED_AT_ONCE:
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
    """Rename a complete file or folder; all of it is on the disk before it takes its name, and its name afterwards."""
    # A file there is replaced; there must be no folder. A caller that renames many files flushes the parent once.
    flush(partial)
    partial.replace(path)
    if flush_parent:
        flush_folders(path.parent, partial.parent)


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", *, flush_parent: bool = True) -> Iterator[IO]:
    """Open a file (`"wb"`, or `"w"` for UTF-8) that appears under its name only when it is complete."""
    # The bytes go to `.NAME.XXXX.partial` in the same folder; after an error the old file is unchanged. A link of that
    # name is replaced, not followed.
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
        if try_lock(file.fileno(), path.parent) is not False and has_name(file.fileno(), partial):
            return partial, file
        file.close()  # another process swept it between its creation and the lock: try again


def sweep(path: Path) -> None:
    """Remove the partial files of killed processes: those that nobody locks, or where that can't be told old ones."""
    for partial in path.parent.glob(f"{glob.escape(_prefix(path))}*.partial"):
        with suppress(OSError):
            status = partial.lstat()
            if not stat.S_ISREG(status.st_mode):
                continue
            descriptor, _ = open_permitted(partial, os.O_RDWR, os.O_RDONLY)
            try:
                dead = try_lock(descriptor, path.parent)
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


def open_permitted(path: Path, *ways: int) -> tuple[int, bool]:
    """Descriptor of a file, opened in the first of several ways that is permitted, and whether it can be written to."""
    # For a lock, reading is enough; a kernel may refuse `O_CREAT` for a file of another account (protected_regular).
    errors = []
    for flags in ways:
        try:
            return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666), flags != os.O_RDONLY
        except OSError as error:
            errors.append(error)
            if not isinstance(error, PermissionError):
                break
    raise errors[0]


def has_name(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at its path, where another process may have removed it."""
    with suppress(FileNotFoundError):
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    return False


def try_lock(descriptor: int, folder: Path, *, shared: bool = False) -> bool | None:
    """Lock a file of a folder; False if another process holds it, None if the file system has no locks."""
    try:
        if fcntl:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif not shared:  # on Windows an open file can't be replaced anyway
            import msvcrt

            os.lseek(descriptor, 2**20, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError as error:
        if error.errno == errno.EBADF:  # the file is open for reading only, and the file system (NFS) needs more
            raise
        if error.errno == errno.EACCES and fcntl:  # SMB says so of a lock that another machine holds
            with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:  # a file that nobody else has
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
            return None
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK) else None
    return True


def is_own_folder(path: Path) -> bool:
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
    if is_own_folder(path):
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


def earlier_folders(folder: Path) -> list[Path]:
    """Subfolders `earlier-N` that `move_aside` has made, the newest last."""
    return sorted(folder.glob("earlier-*"), key=lambda path: natural_key(path.name))


def move_aside(folder: Path, files: list[Path]) -> Path | None:
    """Move files of an earlier run into a new subfolder `earlier-N`, and return that; None if there are no files."""
    if not files:
        return None
    earlier = next(path for n in count(1) if not (path := folder / f"earlier-{n}").exists())
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


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, or of the names and contents of all files in a Zarr folder."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for inner in sorted(inner for inner in path.rglob("*") if inner.is_file()):
        digest.update(f"{inner.relative_to(path).as_posix()} {sha256(inner)}\n".encode())
    return digest.hexdigest()
