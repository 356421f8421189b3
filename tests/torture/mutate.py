"""Damage: of bytes, of texts, and of values in nested lists and dictionaries."""

from __future__ import annotations

import copy
import re
from random import Random
from typing import Any

LIMITS = [0, 1, 2, 3, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
NUMBERS = ["0", "-1", "1", "3", "1000000000", "99999999999999999999", "1e400", "NaN", "null", '"x"', "[]", "{}", "0.5"]
WORDS = ["", "O", "|O", "<f8", "<U9", "uint8", "float16", "complex64", "int64", "object", "../..", "x" * 50]
SIGNS = ["", "(", ")", "[", "]", "{", "}", ",", ":", '"', "'", "\x00", "é", "\n"]
VALUES: list[Any] = [None, True, False, 0, 1, -1, 2, 1.5, float("nan"), float("inf"), -1e308, 10**30, 10**9]
VALUES += ["", "x", "é" * 10, [], [0], [0, 255], [0, 0], [255, 0], ["a", "b"], [[0, 0, 0], [9, 9, 9]], {}, {"a": 1}]
VALUES += [[None], [float("nan")], [float("inf"), 0], [1, 2, 3], "data", "image", [-1], [[]]]


def damage_bytes(data: bytes, rng: Random, header: int = 256) -> bytes:
    """Bytes with up to six changes, most of them among the first `header`."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        if not damaged:
            break
        reach = min(len(damaged), header) if rng.random() < 0.6 else len(damaged)
        rng.choice(CHANGES)(damaged, rng.randrange(reach), rng)
    return bytes(damaged)


def _flip(data: bytearray, at: int, rng: Random) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _set(data: bytearray, at: int, rng: Random) -> None:
    data[at] = rng.choice([0, 1, 255, 127, 128, rng.randrange(256)])


def _set_number(data: bytearray, at: int, rng: Random) -> None:
    size = rng.choice([2, 4, 8])
    data[at : at + size] = (rng.choice(LIMITS) % (1 << 8 * size)).to_bytes(size, rng.choice(["little", "big"]))


def _truncate(data: bytearray, _at: int, rng: Random) -> None:
    del data[rng.randrange(len(data)) :]


def _cut_out(data: bytearray, at: int, rng: Random) -> None:
    del data[at : at + rng.choice([1, 2, 4, 16, 100])]


def _repeat(data: bytearray, at: int, rng: Random) -> None:
    source = rng.randrange(len(data))
    data[at:at] = data[source : source + rng.choice([1, 4, 12, 64])]


def _copy_over(data: bytearray, at: int, rng: Random) -> None:
    source, size = rng.randrange(len(data)), rng.choice([2, 4, 12, 64])
    data[at : at + size] = data[source : source + size]


def _insert(data: bytearray, at: int, rng: Random) -> None:
    data[at:at] = rng.randbytes(rng.choice([1, 2, 8, 32]))


CHANGES = [_flip, _flip, _flip, _set, _set, _set_number, _set_number, _truncate, _cut_out, _repeat, _copy_over, _insert]


def damage_text(text: str, rng: Random) -> str:
    """Text with other numbers, words or signs."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind = rng.choice(
            [(r"-?\d+(\.\d+)?", NUMBERS), (r"-?\d+(\.\d+)?", NUMBERS), (r"[A-Za-z_|<>]+", WORDS), (r".", SIGNS)]
        )
        places = list(re.finditer(kind[0], text, re.DOTALL))
        if places:
            place = rng.choice(places)
            text = text[: place.start()] + rng.choice(kind[1]) + text[place.end() :]
    return text


def damage_tree(tree: Any, rng: Random, values: list[Any] = VALUES) -> Any:
    """Nested lists and dictionaries with an entry replaced, removed or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2])):
        nodes = list(_entries(tree))
        if not nodes:
            break
        parent, key = rng.choice(nodes)
        chance = rng.random()
        if chance < 0.75:
            parent[key] = copy.deepcopy(rng.choice(values))
        elif chance < 0.9 or isinstance(parent, list):
            del parent[key]
        else:
            parent[f"{key}x"] = parent.pop(key)
    return tree


def _entries(tree: Any) -> Any:
    """Container and key of each entry."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in items:
        yield tree, key
        yield from _entries(value)
