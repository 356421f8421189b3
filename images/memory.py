"""Free memory, a check that pixels fit in it, when it is given back, and a cache of decoded pixels."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from threading import Event, Lock

import numpy as np

from utils import UserError

# M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD [bytes] of glibc's malloc.h; those of RELEASED are where
# its own adjustment ends
KEPT = {-4: 0, -1: 2**31 - 1, -2: 2**27}
RELEASED = {-4: 2**16, -3: 2**25, -1: 2**26, -2: 2**17}
_is_kept = Event()  # a program that only imports this package keeps its own settings
HARMLESS = 2**28  # [bytes] smaller images are never refused


def available() -> int:
    """Memory available without swapping [bytes]; all memory of the machine if the system does not tell."""
    try:
        line = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text("utf-8"))
        return int(line[1]) * 1024 if line else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):  # Windows has neither
        return 2**63


def check_size(what: object, num_byte: int, copies: int = 1) -> None:
    """Refuse pixels before they are allocated if `copies` of them, needed to decode them, do not fit in memory."""
    if num_byte <= HARMLESS:
        return
    needed, free = num_byte * copies, available()
    if needed > free:
        sizes = f"{needed / 1e9:.3g} GB of memory are needed, {free / 1e9:.3g} are free"
        raise UserError(f"{what}: {sizes}: save it in tiles or strips, or use a machine with more")


def keep_memory() -> None:
    """Keep freed memory for the next step or image, instead of giving it back and having it cleared again."""
    _set_options(KEPT)
    _is_kept.set()


def release_memory() -> None:
    """Give freed memory back to the system, and from now on, since that of large images would grow with their size."""
    if _is_kept.is_set():
        _set_options(RELEASED)
        _is_kept.clear()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)


def _set_options(options: dict[int, int]) -> None:
    if sys.platform == "linux" and (set_option := getattr(ctypes.CDLL(None), "mallopt", None)):
        for option, value in options.items():
            set_option(option, value)


class ByteCache:
    """Least-recently-used cache of arrays, up to `max_byte` [bytes] but at least the newest; threads may share it."""

    def __init__(self, max_byte: int) -> None:
        self.max_byte = max_byte
        self._arrays: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._total = 0
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Array of a key; made if it is not in the cache."""
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
                return self._arrays[key]
        array = make()
        with self._lock:
            if key not in self._arrays:  # another thread may have made it too
                self._arrays[key] = array
                self._total += array.nbytes
            while self._total > self.max_byte and len(self._arrays) > 1:
                self._total -= self._arrays.popitem(last=False)[1].nbytes
        return array
