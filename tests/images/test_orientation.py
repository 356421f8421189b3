import numpy as np
import pytest
import tifffile
from examples import RNG, read_frames
from PIL import Image

from images.orientation import TURNS
from images.readers import list_frames, read_geometry
from run_make_database import main

SEEN = {  # what a camera that stores rows 1 2 3 and 4 5 6 has seen, by the definition of EXIF
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


def exif(orientation):
    """EXIF with an orientation."""
    tags = Image.Exif()
    tags[274] = orientation
    return tags


@pytest.mark.parametrize("orientation", SEEN)
@pytest.mark.parametrize("name", ["a.png", "a.webp", "map.tif", "strips.tif", "big.tif", "palette.png"])
def test_orientation_is_applied_in_every_format(tmp_path, name, orientation):
    stored, path = np.uint8([[1, 2, 3], [4, 5, 6]]), tmp_path / name
    if name.endswith("tif"):
        options = {"compression": "zlib", "rowsperstrip": 1} if name == "strips.tif" else {}
        options |= {"byteorder": ">"} if name == "big.tif" else {}
        options |= {"resolution": (2e5, 4e5), "resolutionunit": "INCH"}
        stored = stored.astype(np.uint16)
        tifffile.imwrite(path, stored, extratags=[(274, "H", 1, orientation, True)], **options)
    elif name == "palette.png":
        image = Image.fromarray(stored)
        image.putpalette([value for colour in range(8) for value in (colour, colour, colour)])
        image.save(path, exif=exif(orientation))
    else:
        stored = np.stack([stored] * 3, -1) if name == "a.webp" else stored
        Image.fromarray(stored).save(path, exif=exif(orientation), lossless=True)
    (frame,) = list_frames(path)
    seen = np.array(SEEN[orientation])
    assert np.array_equal(frame.read()[..., 0], seen)
    for top in range(len(seen)):
        assert np.array_equal(frame.open()[top : top + 1][..., 0], seen[top : top + 1])
    if name == "map.tif":
        pixel = read_geometry([frame]).pixel
        assert pixel["Y"] / pixel["X"] == pytest.approx(2 if orientation in (5, 6, 7, 8) else 0.5)


def test_orientation_is_applied_to_16_bit_colours(tmp_path):
    codecs = pytest.importorskip("imagecodecs")
    pixels = RNG.integers(0, 65535, (8, 9, 3)).astype(np.uint16)
    data = codecs.png_encode(pixels)
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "b.png", exif=exif(6))
    other = (tmp_path / "b.png").read_bytes()
    where = other.index(b"eXIf") - 4
    chunk = other[where : where + 12 + int.from_bytes(other[where : where + 4], "big")]
    (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])  # after the header
    assert np.array_equal(read_frames(tmp_path / "a.png")[0][:], np.rot90(pixels, -1))


def blob():
    """An image (60, 80) with one bright square, and its label."""
    label = np.zeros((60, 80), np.uint8)
    label[5:25, 8:30] = 255
    return np.where(label > 0, 180, 60).astype(np.uint8), label


@pytest.mark.parametrize("turned", ["image", "label", "both"])
def test_orientation_of_images_and_labels_agrees_and_one_line_says_so(work, capfd, turned):
    image, label = blob()
    for folder in ("images", "labels"):
        (work / folder).mkdir()
    for number in range(10):
        orientation = 2 + number % 7
        swapped, up, back = TURNS[orientation]
        for folder, pixels, name in (("images", image, f"{number}.jpg"), ("labels", label, f"{number}.png")):
            is_turned = turned in ("both", folder.rstrip("s"))
            stored = pixels[:: -1 if up else 1, :: -1 if back else 1] if is_turned else pixels
            stored = stored.swapaxes(0, 1) if swapped and is_turned else stored
            options = {"exif": exif(orientation)} if is_turned else {}
            Image.fromarray(np.ascontiguousarray(stored)).save(work / folder / name, quality=98, **options)
    assert main(["--input", "images", "--label", "labels"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "EXIF orientation" in line]
    assert len(lines) == (2 if turned == "both" else 1) and "and 9 more file(s)" in lines[0]
    for path in sorted((work / "datasets/em/train").glob("?????.npy")):
        sample = np.load(path)
        assert sample.shape == (60, 80)
        assert sample["input"][sample["label"] == 1].mean() > 178 and sample["input"][sample["label"] == 0].mean() < 62


def test_info_shows_the_turned_size(work, capfd):
    Image.fromarray(blob()[0]).save("a.jpg", exif=exif(6))
    assert main(["--info", "a.jpg"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[1].startswith("  note: turned as its EXIF orientation says")
    assert lines[-2] == "  read as 1 image(s) of 80 x 60 px, 1 channel(s) of uint8"


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientation_that_does_not_exist_is_none(tmp_path, orientation):
    Image.fromarray(blob()[0]).save(tmp_path / "a.png", exif=exif(orientation))
    tifffile.imwrite(tmp_path / "a.tif", blob()[0], extratags=[(274, "H", 1, orientation, True)])
    for name in ("a.png", "a.tif"):
        assert np.array_equal(read_frames(tmp_path / name)[0][:][..., 0], blob()[0])
