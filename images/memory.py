"""Free memory, a check of the memory that a file claims, and a cache of decoded pixels."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from threading import Lock

import numpy as np

from utils import UserError

HARMLESS = 2**28  # [bytes] smaller images are never refused
DEFLATE = 1032  # largest compression ratio of deflate
ANY = 2**15  # a larger ratio means a damaged or malicious file, whatever the compression


def available() -> int:
    """Memory available without swapping [bytes]; all memory of the machine if the system does not say."""
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text("utf-8"))
        return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):  # Windows has neither
        return 2**63


def check_size(what: object, num_byte: int, stored: int | None = None, *, ratio: int = ANY, copies: int = 1) -> None:
    """Refuse pixels that a file can not contain, or that do not fit in memory, before they are allocated.

    Parameters
    ----------
    what : object
        Named in the message.
    num_byte : int
        Size of the pixels as claimed by the file.
    stored : int, optional
        Size of the compressed pixels in the file [bytes].
    ratio : int
        Largest possible compression ratio.
    copies : int
        Number of copies of all pixels in memory during decoding; 0 if they are read by rows.

    Raises
    ------
    UserError
        The file can not contain them, or the memory does not suffice.
    """
    if num_byte <= HARMLESS:
        return
    if stored is not None and num_byte > stored * ratio:
        raise UserError(f"{what}: {num_byte / 1e9:.3g} GB of pixels can't be in {stored} bytes: check the file")
    if num_byte * copies > available():
        needed = f"{num_byte * copies / 1e9:.3g} GB of memory are needed, {available() / 1e9:.3g} are free"
        raise UserError(f"{what}: {needed}: save it in tiles or strips, or use a machine with more")


class ByteCache:
    """Least-recently-used cache of arrays, limited by their total size.

    The newest array is kept whatever its size. Safe to share between threads.

    Parameters
    ----------
    max_byte : int
        Largest total size.
    """

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
