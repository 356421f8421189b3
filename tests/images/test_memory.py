import struct
from threading import Event

import pytest
import tifffile
from examples import stack

from images import memory
from images.readers import list_frames
from utils import UserError


def test_check_size_refuses_a_strip_that_does_not_fit_in_memory(tmp_path):
    whole = tmp_path / "a.tif"
    tifffile.imwrite(whole, stack(1)[0], photometric="minisblack", compression="zlib", metadata=None)
    data = whole.read_bytes()
    for tag in (256, 257, 278):  # width, height, rows of a strip
        entry = data.index(struct.pack("<HH", tag, 4) if tag < 258 else struct.pack("<H", tag)) + 8
        data = data[:entry] + struct.pack("<I", 10**6) + data[entry + 4 :]
    whole.write_bytes(data)
    with pytest.raises(UserError, match="GB"):
        list_frames(whole)[0].read()


def test_release_memory_sets_only_what_keep_memory_set(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "_set_options", calls.append)
    monkeypatch.setattr(memory, "_is_kept", Event())
    memory.release_memory()
    assert calls == []  # the settings of a program that imports this one are its own
    memory.keep_memory()
    memory.release_memory()
    memory.release_memory()
    assert calls == [memory.KEPT, memory.RELEASED]
