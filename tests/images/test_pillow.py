import struct
import warnings
import zlib

import numpy as np
import pytest
from examples import RNG, read_frames, stack
from PIL import Image, ImageFile

from images.readers import list_frames
from utils import UserError


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "P", "LA", "RGBA"])
def test_png_of_every_mode_is_read(tmp_path, mode):
    image = (
        Image.fromarray(stack(1, 8, np.uint16)[0]) if mode == "I;16" else Image.fromarray(stack(1, 8)[0]).convert(mode)
    )
    image.save(tmp_path / "a.png")
    channels = 3 if mode in ("P", "RGBA") else 1
    assert read_frames(tmp_path / "a.png")[0].shape == (8, 8, channels)


def test_jpeg_with_a_preview_is_read_as_its_first_image(tmp_path):
    large, small = (Image.fromarray(np.full((size, size), size, np.uint8)) for size in (64, 16))
    large.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[small])
    assert read_frames(tmp_path / "a.jpg")[0].shape == (64, 64, 1)


def test_png_that_is_truncated_is_refused(tmp_path):
    Image.fromarray(stack(1, 64)[0]).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"a\.png"):
        list_frames(tmp_path / "a.png")[0].read()


@pytest.mark.parametrize("kind", ["png", "jpeg2k"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_picture_in_16_bits_keeps_them(tmp_path, channels, kind):
    codecs = pytest.importorskip("imagecodecs")
    pixels = RNG.integers(0, 65535, (8, 9, channels)).astype(np.uint16)
    options = {"reversible": True} if kind == "jpeg2k" else {}
    (tmp_path / "a.png").write_bytes(getattr(codecs, f"{kind}_encode")(np.squeeze(pixels), **options))
    frame = list_frames(tmp_path / "a.png")[0]
    assert frame.open().dtype == np.uint16
    assert np.array_equal(frame.read(), pixels[..., : {2: 1, 4: 3}.get(channels, channels)])


def test_png_in_16_bits_names_the_package_that_it_needs(tmp_path, monkeypatch):
    codecs = pytest.importorskip("imagecodecs")
    (tmp_path / "a.png").write_bytes(codecs.png_encode(np.zeros((8, 9, 3), np.uint16)))
    monkeypatch.setitem(__import__("sys").modules, "imagecodecs", None)
    with pytest.raises(UserError, match="pip install imagecodecs"):
        list_frames(tmp_path / "a.png")


@pytest.mark.parametrize("ending", ["png", "webp", "gif"])
def test_picture_of_several_images_is_refused(tmp_path, ending):
    first, *others = (Image.fromarray(page).convert("RGB") for page in stack(3, 8))
    first.save(tmp_path / f"a.{ending}", save_all=True, append_images=others)
    with pytest.raises(UserError, match="3 images in one file"):
        list_frames(tmp_path / f"a.{ending}")


def png(width, height, data=b"", bits=8):
    """A grey PNG whose header says a size and whose data are any."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_png_that_is_large_is_read_and_one_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns above, and refuses twice as many
    pixels = stack(1, 64)[0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(list_frames(tmp_path / "a.png")[0].read()[..., 0], pixels)
    assert Image.MAX_IMAGE_PIXELS == 100
    (tmp_path / "a.png").write_bytes(png(60_000, 60_000, zlib.compress(bytes(10**6))))
    monkeypatch.setattr("images.memory.available", lambda: 10**10)
    with pytest.raises(UserError, match=r"a\.png: 10\.8 GB of memory are needed"):
        list_frames(tmp_path / "a.png")


def test_picture_is_decoded_once_and_only_when_its_pixels_are_read(tmp_path, monkeypatch):
    for number in range(6):
        Image.fromarray(stack(1, 16)[0]).save(tmp_path / f"{number}.png")
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.filename) or load(self))
    frames = list_frames(tmp_path)
    assert [frame.open().shape for frame in frames] == [(16, 16, 1)] * 6
    assert not decoded
    for frame in frames * 2:
        assert np.array_equal(frame.open()[3:9], frame.read()[3:9])
    assert len({*decoded}) == 6 and len(decoded) <= 12  # Pillow calls it twice


def test_warnings_of_pillow_are_one_line_of_ours(tmp_path, capfd):
    for number in range(3):
        image = Image.fromarray(stack(1, 8)[0]).convert("P")
        image.save(tmp_path / f"{number}.png", transparency=bytes(range(256)))
        exif = Image.Exif()
        exif[274] = 1
        Image.fromarray(stack(1, 8)[0]).save(tmp_path / f"{number}.jpg", exif=exif)
        data = bytearray((tmp_path / f"{number}.jpg").read_bytes())
        where = data.index(b"Exif") + 14
        data[where : where + 2] = b"\0\x40"  # more entries than there are bytes
        (tmp_path / f"{number}.jpg").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for frame in list_frames(tmp_path):
            frame.read()
    out, err = capfd.readouterr()
    assert not err and len(out.splitlines()) == 1 and "0.jpg and 2 more file(s): Pillow says: Corrupt EXIF data" in out
