"""Paths that an output occupies, and checks that no input and no foreign file is replaced."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from files import partial_of
from images.zarr import is_zarr
from utils import UserError

# entries that ZarrWriter makes in a folder, also if it was killed
PARTIAL = r"\.[0-9a-f]{32}\.partial"
ENTRY = rf"(\d+/)?zarr(\.json|{PARTIAL})|\d+(/c(/\d+)*({PARTIAL})?)?"


def check_apart(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse an output that is, contains or lies in an input; an input inside a Zarr stands for the whole Zarr."""
    identity = cache(_identity)  # many outputs have few parents
    roots = {_outermost_zarr(path.resolve()) for path in set(inputs)}
    input_at = {identity(root): root for root in roots}
    input_in = {identity(parent): root for root in roots for parent in root.parents}
    for output in outputs:
        try:
            real = output.resolve()
        except (OSError, RuntimeError) as error:
            raise UserError(f"--output {output}: a link in this path leads to itself: choose another") from error
        inside = (input_at.get(identity(path)) for path in (real, *real.parents))
        if hit := input_in.get(identity(real)) or next(filter(None, inside), None):
            raise UserError(f"--output {output} would replace the input {hit}, contain it or lie in it: choose another")


def _outermost_zarr(path: Path) -> Path:
    """Outermost Zarr that contains an array or group, or the path itself."""
    while is_zarr(path.parent):
        path = path.parent
    return path


def _identity(path: Path) -> Any:
    """Device and inode, which are one for all paths of a file; the path itself if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return path
    return (status.st_dev, status.st_ino) if status.st_ino else path


def old_of(path: Path) -> Path:
    """Path of an older Zarr until the new one has its name."""
    return path.with_name(f"{path.name}.old")


def written_at(target: Path) -> list[Path]:
    """Paths that the writer of one file or Zarr writes, replaces or removes."""
    return [target, partial_of(target), *([old_of(target)] if target.suffix.lower() == ".zarr" else [])]


def check_replaceable(target: Path) -> None:
    """Refuse to replace a folder, pipe or device by a file, or anything but a Zarr image of this program by a Zarr."""
    advice = "move it, or choose another --output"
    if target.suffix.lower() != ".zarr":
        for path in written_at(target):
            if path.is_dir() and not (path.is_symlink() and path != target):
                raise UserError(f"{path} is a folder: {advice}, one that ends with / for PNGs in a folder")
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is not a file: {advice}")
        return
    for path in written_at(target):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise UserError(f"{path} is not a folder of a Zarr image: {advice}")
        for entry in path.rglob("*"):
            name = entry.relative_to(path).as_posix()
            if entry.is_symlink() or not re.fullmatch(ENTRY, name):
                raise UserError(f"{path} is not a Zarr image that --mode predict wrote (it holds {name}): {advice}")
    if target.exists() and not (target / "zarr.json").is_file():
        raise UserError(f"{target} is not a Zarr image that --mode predict wrote: {advice}")
