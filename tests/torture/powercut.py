"""A disk that loses at a power cut whatever was not synced: records what a program does, and says what may be left."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

Tree = dict[str, bytes | None]  # relative path -> content; None for a folder
SUBSETS = 3  # random choices among what was not synced, at each cut
CREATING = set("wax")  # letters in the mode of a file that may be created
GARBAGE = (".partial", ".lock")  # endings of names whose content no program looks at


def tree_of(folder: Path) -> Tree:
    """All that lies in a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_dir() or path.is_file()]
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}


def write_tree(folder: Path, tree: Tree) -> None:
    """Lay a tree into an empty folder."""
    for name, content in sorted(tree.items()):
        path = folder / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@dataclass
class Recorder:
    """Notes each operation in a folder that a power cut may undo, and each that makes others last.

    Attributes
    ----------
    folder : Path
        What lies outside is not noted.
    note : Path
        Gets the operations, one pickle after the other.
    """

    folder: Path
    note: Path

    def install(self) -> None:
        """Put it before the functions of `os` and `open`, and what the project calls beside them, in this process."""
        from . import project

        self.lock = threading.RLock()
        self.file = io.open(self.note, "wb", buffering=0)  # noqa: SIM115, UP020
        for name in ("unlink", "remove", "rmdir", "mkdir"):
            setattr(os, name, partial(self._one, getattr(os, name), name))
        for name in ("rename", "replace"):
            setattr(os, name, partial(self._two, getattr(os, name), "rename"))
        os.link = partial(self._link, os.link)
        os.open = partial(self._open, os.open, lambda flags, *_: bool(flags & os.O_CREAT))
        builtins.open = io.open = partial(self._open, io.open, _may_create)
        os.fsync = partial(self._fsync, os.fsync)
        project.record_system_calls(self._sync_all, lambda swap, one, other: self._two(swap, "exchange", one, other))

    def _add(self, kind: str, *values: Any) -> None:
        self.file.write(pickle.dumps((kind, *values)))

    def _inside(self, path: Any, folder: int | None = None) -> str | None:
        """Path relative to the folder; None outside, and for a file without a name."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")  # noqa: PTH115
        elif folder is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fspath(path))  # noqa: PTH115, PTH118
        path = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
        inside = path.startswith(f"{self.folder}{os.sep}") or path == str(self.folder)
        return os.path.relpath(path, self.folder) if inside and os.path.lexists(os.path.dirname(path)) else None  # noqa: PTH120

    def _one(self, function: Callable, kind: str, path: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            done = function(path, *args, **kwargs)
            if (inside := self._inside(path, kwargs.get("dir_fd"))) is not None:
                self._add("mkdir" if kind == "mkdir" else "remove", inside)
            return done

    def _two(self, function: Callable, kind: str, source: Any, target: Any, **kwargs: Any) -> Any:
        with self.lock:
            names = self._inside(source), self._inside(target)
            done = function(source, target, **kwargs)
            if None not in names and done is not False:
                self._add(kind, *names)
            return done

    def _link(self, function: Callable, source: Any, target: Any, **kwargs: Any) -> None:
        with self.lock:
            function(source, target, **kwargs)
            if (inside := self._inside(target)) is not None:
                self._add("create", inside)  # its content lasts from the next fsync on, at the latest

    def _open(self, function: Callable, may_create: Callable[..., bool], path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, int) or not may_create(*args, *kwargs.values()):
            return function(path, *args, **kwargs)
        with self.lock:
            inside = self._inside(path, kwargs.get("dir_fd"))
            is_new = inside is not None and not (self.folder / inside).exists()
            opened = function(path, *args, **kwargs)
            if is_new:
                self._add("create", inside)
            return opened

    def _fsync(self, function: Callable, descriptor: int) -> None:
        with self.lock:
            function(descriptor)
            if (inside := self._inside(descriptor)) is not None:
                path = self.folder / inside
                self._add("fsync", inside, path.read_bytes() if path.is_file() else None)

    def _sync_all(self, function: Callable, path: Path) -> bool:
        with self.lock:
            done = function(path)
            if done:
                self._add("sync", tree_of(self.folder))
            return done


def _may_create(*arguments: Any) -> bool:
    mode = next((argument for argument in arguments if isinstance(argument, str)), "r")
    return bool(CREATING & set(mode))


def recorded(note: Path) -> list[tuple]:
    """The operations that a `Recorder` has noted."""
    operations = []
    with note.open("rb") as file:
        while file.peek(1):
            operations.append(pickle.load(file))
    return operations


@dataclass
class Node:
    """A file or folder on the disk."""

    content: bytes | None = None  # of a file, as it was last synced; None for a folder
    entries: dict[str, Node] = field(default_factory=dict)  # as programs see them


@dataclass
class Change:
    """Entries of folders that one operation changes together."""

    entries: list[tuple[Node, str, Node, bool]]  # folder, name, what is set or removed there
    lasts: bool = False  # whether it was synced


class Disk:
    """What is on a disk, and what a power cut may leave of it, while operations are done one after another.

    Content that was not synced is empty after a cut. Each change of a folder's entries that was not synced may have
    happened or not, in any combination.
    """

    def __init__(self, tree: Tree) -> None:
        self.root, self.changes = Node(), []
        for name, content in sorted(tree.items()):
            folder, last = self._find_folder(name)
            folder.entries[last] = Node(content)
        self.before = {id(node): (node, dict(node.entries)) for node in _all_nodes(self.root)}

    def _find_folder(self, path: str) -> tuple[Node, str]:
        *folders, last = Path(path).parts
        node = self.root
        for name in folders:
            node = node.entries[name]
        return node, last

    def _find(self, path: str) -> Node | None:
        if path == ".":
            return self.root
        try:
            folder, last = self._find_folder(path)
        except KeyError:
            return None
        return folder.entries.get(last)

    def do(self, kind: str, path: str | Tree, other: Any = None) -> None:
        """Do one recorded operation."""
        if kind == "sync":
            self._sync_all(path)
        elif kind == "fsync":
            self._sync(path, other)
        elif kind in ("create", "mkdir"):
            folder, name = self._find_folder(path)
            self._change([(folder, name, Node(b"" if kind == "create" else None), True)])
        elif kind == "remove":
            folder, name = self._find_folder(path)
            self._change([(folder, name, folder.entries[name], False)])
        else:
            (source, old), (target, new) = self._find_folder(path), self._find_folder(other)
            node = source.entries[old]
            back = (source, old, target.entries[new], True) if kind == "exchange" else (source, old, node, False)
            self._change([(target, new, node, True), back])

    def _change(self, entries: list[tuple[Node, str, Node, bool]]) -> None:
        self.changes.append(Change(entries))
        for folder, name, node, is_set in entries:
            _apply(folder.entries, name, node, is_set)

    def _sync(self, path: str, content: bytes | None) -> None:
        node = self._find(path)
        if node is None:  # it has no name any more
            return
        if content is not None:
            node.content = content
        for change in self.changes:  # where an entry appears; the other folder of a rename then loses it, too
            change.lasts = change.lasts or change.entries[0][0] is node

    def _sync_all(self, tree: Tree) -> None:
        for change in self.changes:
            change.lasts = True
        for path, content in tree.items():
            if content is not None and (node := self._find(path)):
                node.content = content

    def after_cut(self, choose: Callable[[], bool]) -> Tree:
        """What is left if each change that was not synced has happened where `choose` says so."""
        entries = {key: dict(before) for key, (_, before) in self.before.items()}
        for change in self.changes:
            if change.lasts or choose():
                for folder, name, node, is_set in change.entries:
                    _apply(entries.setdefault(id(folder), {}), name, node, is_set)
        return dict(_walk(self.root, entries, ""))


def _apply(entries: dict[str, Node], name: str, node: Node, is_set: bool) -> None:
    if is_set:
        entries[name] = node
    elif entries.get(name) is node:
        del entries[name]


def _all_nodes(node: Node) -> Iterator[Node]:
    yield node
    for entry in node.entries.values():
        yield from _all_nodes(entry)


def _walk(node: Node, entries: dict[int, dict[str, Node]], path: str) -> Iterator[tuple[str, bytes | None]]:
    for name, entry in entries.get(id(node), {}).items():
        yield path + name, entry.content
        if entry.content is None:
            yield from _walk(entry, entries, f"{path}{name}/")


@dataclass
class Cut:
    """What a power cut leaves.

    Attributes
    ----------
    operation : int
        Number of the operation that it came before.
    last : bool
        Whether the program had ended.
    """

    operation: int
    last: bool
    tree: Tree


def cuts(before: Tree, operations: list[tuple], rng: Random) -> list[Cut]:
    """All that cuts before each operation, and after the last one, may leave; equal states once."""
    disk, found = Disk(before), {}
    for number in range(len(operations) + 1):
        choices = [lambda: False, lambda: True, *[lambda: rng.random() < 0.5] * SUBSETS]
        last = number == len(operations)
        for choose in choices:
            tree = disk.after_cut(choose)
            found.setdefault((last, _key(tree)), Cut(number, last, tree))
        if not last:
            disk.do(*operations[number])
    return list(found.values())


def _key(tree: Tree) -> frozenset:
    """What of a tree can make a difference: not the content of garbage."""
    kept = set()
    for path, content in tree.items():
        parts = Path(path).parts
        garbage = next((n for n, part in enumerate(parts) if part.endswith(GARBAGE)), None)
        kept.add((path, content) if garbage is None else ("/".join(parts[: garbage + 1]), b""))
    return frozenset(kept)
