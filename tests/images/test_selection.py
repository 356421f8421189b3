import numpy as np
import pytest
import tifffile
from examples import RNG, stack

from images.readers import list_frames, read_geometry, with_neighbours
from images.selection import Choice
from utils import FlagError, UserError

SECTIONS = {
    "3": [3], "0,2,5": [0, 2, 5], "5, 2,2": [2, 5], "0-2": [0, 1, 2], "0:2": [0, 1], "5:": [5, 6, 7], ":2": [0, 1],
    "::3": [0, 3, 6], "1:7:2": [1, 3, 5], "7,0-1": [0, 1, 7], "7-7": [7],
}  # fmt: skip


@pytest.mark.parametrize("text", SECTIONS)
def test_section_is_numbers_and_ranges(tmp_path, text):
    pixels = stack(8, 8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack")
    frames = list_frames(tmp_path / "a.tif", Choice(section=text))
    assert [frame.index for frame in frames] == SECTIONS[text]
    assert np.array_equal(np.stack([frame.read()[..., 0] for frame in frames]), pixels[SECTIONS[text]])


@pytest.mark.parametrize("text", ["8", "-1", "0,8", "4-8", "8:", "0:9", "5-2", "-3-2", "99999999999999999"])
def test_section_that_does_not_exist_is_refused_with_what_there_is(tmp_path, text):
    tifffile.imwrite(tmp_path / "a.tif", stack(8, 8), photometric="minisblack")
    with pytest.raises(UserError, match=r"a\.tif: no section .*: it has 8, 0 to 7"):
        list_frames(tmp_path / "a.tif", Choice(section=text))


@pytest.mark.parametrize("text", ["a", "1-", "1,,2", "1;2", "0:8:0", "1.5", "-", "-:5"])
def test_section_that_is_no_number_is_refused_before_a_file_is_read(text):
    with pytest.raises(FlagError, match="no number or range"):
        Choice(section=text)


def test_section_is_along_z_at_each_time(tmp_path):
    pixels = RNG.integers(0, 255, (2, 5, 8, 9)).astype(np.uint8)
    metadata = {"axes": "TZYX", "PhysicalSizeX": 0.1, "PhysicalSizeZ": 0.5, "TimeIncrement": 3}
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, metadata=metadata)
    frames = list_frames(tmp_path / "a.ome.tif", Choice(section="0,2,4"))
    assert [frame.index for frame in frames] == [0, 2, 4, 5, 7, 9]
    g = read_geometry(frames)
    assert (g.axes, g.lengths, g.pixel, g.interval) == ("TZ", (2, 3), {"X": 0.1, "Z": 1.0}, 3)
    g = read_geometry(list_frames(tmp_path / "a.ome.tif", Choice(section="0,1,4")))
    assert (g.lengths, g.pixel) == ((2, 3), {"X": 0.1})  # sections at uneven distances


def test_section_changes_the_time_between_images(tmp_path):
    metadata = {"axes": "TYX", "TimeIncrement": 3}
    tifffile.imwrite(tmp_path / "a.ome.tif", stack(7, 8), metadata=metadata)
    for text, interval in (("::2", 6), ("4", 3), ("0,1,4", None)):
        assert read_geometry(list_frames(tmp_path / "a.ome.tif", Choice(section=text))).interval == interval


def test_section_has_its_neighbours_in_the_file(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", stack(8, 8), photometric="minisblack")
    around = with_neighbours(list_frames(tmp_path / "a.tif", Choice(section="0,4")), 1)
    assert [[frame.index for frame in frames] for frames in around] == [[0, 0, 1], [3, 4, 5]]


def write_series(path):
    images = [stack(3, 8), stack(3, 8)]
    with tifffile.TiffWriter(path, ome=True) as tif:
        for number, pixels in enumerate(images):
            metadata = {"axes": "ZYX", "Name": f"pos {number}", "PhysicalSizeX": number + 1.0}
            tif.write(pixels, metadata=metadata, photometric="minisblack")
    return images


@pytest.mark.parametrize("text", ["1", "pos 1", "POS 1"])
def test_series_are_chosen_by_number_or_name(tmp_path, text):
    images = write_series(tmp_path / "a.ome.tif")
    assert len(list_frames(tmp_path / "a.ome.tif")) == 6
    frames = list_frames(tmp_path / "a.ome.tif", Choice(series=text, section="0,2"))
    assert [frame.index for frame in frames] == [3, 5]
    assert np.array_equal(frames[1].read()[..., 0], images[1][2])
    assert read_geometry(frames).pixel["X"] == 2


@pytest.mark.parametrize("text", ["2", "pos", "-1", "0,pos 2"])
def test_series_that_does_not_exist_is_refused_with_those_there_are(tmp_path, text):
    write_series(tmp_path / "a.ome.tif")
    with pytest.raises(UserError, match=r"no series .*: it has 2, 0 \(pos 0\), 1 \(pos 1\)"):
        list_frames(tmp_path / "a.ome.tif", Choice(series=text))


CHANNELS = {"2": [2], "2,0": [2, 0], "0-1": [0, 1], "DAPI": [0], "gfp,DAPI": [1, 0], "561": [2], "1:": [1, 2]}


@pytest.mark.parametrize("text", CHANNELS)
def test_channels_are_chosen_by_number_or_name_in_their_order(tmp_path, text):
    pixels = RNG.integers(0, 255, (4, 3, 8, 9)).astype(np.uint8)
    metadata = {"axes": "ZCYX", "Channel": {"Name": ["DAPI", "GFP", "561"]}}
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, metadata=metadata)
    frames = list_frames(tmp_path / "a.ome.tif", Choice(channel=text))
    expected = pixels[1, CHANNELS[text]].transpose(1, 2, 0)
    assert np.array_equal(frames[1].read(), expected) and frames[1].open().shape == expected.shape
    assert np.array_equal(frames[1].open()[2:5], expected[2:5])
    with pytest.raises(UserError, match=r"no channel mCherry: it has 3, 0 \(DAPI\), 1 \(GFP\), 2 \(561\)"):
        list_frames(tmp_path / "a.ome.tif", Choice(channel=f"{text},mCherry"))


def write_slide(path):
    """A file as Aperio's scanner writes it: image, thumbnail, lower resolution, label and macro."""
    pixels = RNG.integers(0, 255, (256, 300, 3)).astype(np.uint8)
    tiles = {"tile": (128, 128), "photometric": "rgb", "metadata": None}
    pictures = {"Aperio\r\nlabel 50x60": 1, "Aperio\r\nmacro 90x60": 9}
    with tifffile.TiffWriter(path) as tif:
        tif.write(pixels, description="Aperio Image Library v11\r\n300x256 |AppMag = 20", **tiles)
        tif.write(pixels[::4, ::4], description="Aperio thumbnail", photometric="rgb", metadata=None)
        tif.write(pixels[::2, ::2], **tiles)
        for number, (text, kind) in enumerate(pictures.items()):
            picture = np.full((60, 50, 3), number, np.uint8)
            tif.write(picture, description=text, subfiletype=kind, photometric="rgb", metadata=None)
    return pixels


def test_slide_label_and_thumbnail_are_only_read_if_they_are_named(tmp_path):
    pixels = write_slide(tmp_path / "a.svs")
    (frame,) = list_frames(tmp_path / "a.svs")
    assert np.array_equal(frame.read(), pixels)
    (frame,) = list_frames(tmp_path / "a.svs", Choice(series="label"))
    assert frame.read().shape == (60, 50, 3) and not frame.read().any()
    assert len(list_frames(tmp_path / "a.svs", Choice(series="0-3"))) == 4


def test_slide_files_are_one_stack_although_they_have_labels(tmp_path):
    for name in ("a.svs", "b.svs"):
        write_slide(tmp_path / name)
    around = with_neighbours(list_frames(tmp_path), 1)
    assert [[frame.path.stem for frame in frames] for frames in around] == [["a", "a", "b"], ["a", "b", "b"]]


def test_slide_is_read_although_its_label_is_damaged(tmp_path):
    pixels = write_slide(tmp_path / "a.svs")
    with tifffile.TiffFile(tmp_path / "a.svs", mode="r+b") as tif:
        tif.pages[3].tags["StripOffsets"].overwrite(10**9)
    (frame,) = list_frames(tmp_path / "a.svs")
    assert np.array_equal(frame.read(), pixels)
    with pytest.raises(UserError, match=r"a\.svs"):
        list_frames(tmp_path / "a.svs", Choice(series="label"))[0].read()
