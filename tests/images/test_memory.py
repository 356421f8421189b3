import struct

import pytest
import tifffile
from examples import stack

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
