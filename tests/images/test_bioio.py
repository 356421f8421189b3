import sys

import numpy as np
import pytest
from microscopes import write_czi, write_lif, write_nd2
from samples import RNG

from images.bioio import Planes
from images.readers import list_frames, read_geometry
from images.selection import Choice
from utils import UserError

pytest.importorskip("bioio")


def volume(*shape):
    return RNG.integers(0, 60000, shape).astype(np.uint16)


def test_a_czi_is_read_by_planes_with_axes_pixel_size_and_channels(tmp_path):
    pytest.importorskip("bioio_czi")
    pixels = volume(2, 3, 2, 20, 30)
    write_czi(tmp_path / "a.czi", pixels, ("DAPI", "GFP"), 0.5e-6)
    (tmp_path / "a.czi").rename(tmp_path / "scan.dat")  # known by its first bytes
    frames = list_frames(tmp_path / "scan.dat")
    assert [frame.stack for frame in frames] == [0, 0, 0, 3, 3, 3]
    for frame, expected in zip(frames, pixels.reshape(6, 2, 20, 30), strict=True):
        assert np.array_equal(frame.read(), expected.transpose(1, 2, 0))
    g = read_geometry(frames)
    assert (g.axes, g.lengths, g.unit, g.channels) == ("TZ", (2, 3), "micron", ("DAPI", "GFP"))
    assert g.pixel == pytest.approx({"X": 0.5, "Y": 0.5, "Z": 2})
    (chosen,) = list_frames(tmp_path / "scan.dat", Choice("gfp", "", "1"))[1:]
    assert np.array_equal(chosen.read()[..., 0], pixels[1, 1, 1])


def test_colours_of_a_czi_are_red_green_blue_and_its_mosaic_is_stitched(tmp_path):
    pytest.importorskip("bioio_czi")
    czi = pytest.importorskip("pylibCZIrw.czi")
    pixels = RNG.integers(0, 255, (20, 30, 3)).astype(np.uint8)
    with czi.create_czi(str(tmp_path / "a.czi")) as file:
        file.write(np.ascontiguousarray(pixels[:, :15, ::-1]), location=(0, 0))  # in memory, blue comes first
        file.write(np.ascontiguousarray(pixels[:, 15:, ::-1]), location=(15, 0))
        file.write_metadata("a")
    (frame,) = list_frames(tmp_path / "a.czi")
    assert np.array_equal(frame.read(), pixels) and np.array_equal(frame.open()[3:9], pixels[3:9])


def test_scenes_of_which_the_metadata_say_nothing_are_not_lost_in_silence(tmp_path, capsys):
    pytest.importorskip("bioio_czi")
    czi = pytest.importorskip("pylibCZIrw.czi")
    with czi.create_czi(str(tmp_path / "a.czi")) as file:
        for scene in range(2):
            file.write(volume(20, 30, 1), scene=scene, location=(100 * scene, 0))
        file.write_metadata("a")
    assert len(list_frames(tmp_path / "a.czi")) == 1
    assert "a.czi: 2 scenes, of which its metadata name 1" in capsys.readouterr().out


def test_the_images_of_a_lif_are_series(tmp_path):
    pytest.importorskip("bioio_lif")
    images = {"Eye/A": volume(3, 2, 20, 30), "Eye/B": volume(3, 2, 20, 30), "Macro Image": volume(3, 2, 20, 30)}
    write_lif(tmp_path / "a.lif", images)
    frames = list_frames(tmp_path / "a.lif")
    assert [frame.name for frame in frames] == ["a-Eye-A"] * 3 + ["a-Eye-B"] * 3
    expected = np.concatenate(list(images.values()))
    for frame, pixels in zip(frames, expected, strict=False):
        assert np.array_equal(frame.read(), pixels.transpose(1, 2, 0))
    g = read_geometry(frames[3:])
    assert (g.axes, g.lengths, g.channels) == ("Z", (3,), ("Dye0", "Dye1"))
    assert g.pixel == pytest.approx({"X": 0.5, "Y": 0.5, "Z": 2})
    chosen = list_frames(tmp_path / "a.lif", Choice(series="Macro Image", section="2"))
    assert np.array_equal(chosen[0].read(), expected[8].transpose(1, 2, 0)) and len(chosen) == 1


def test_an_nd2_is_read(tmp_path):
    pytest.importorskip("bioio_nd2")
    pixels = volume(2, 20, 30)
    write_nd2(tmp_path / "a.nd2", pixels)
    (frame,) = list_frames(tmp_path)
    assert np.array_equal(frame.read(), pixels.transpose(1, 2, 0))
    g = read_geometry([frame])
    assert (g.pixel["X"], g.pixel["Y"], g.channels) == (0.5, 0.5, ("Dye0", "Dye1"))


def test_a_plane_is_decoded_once_and_no_other(tmp_path, monkeypatch):
    pytest.importorskip("bioio_lif")
    write_lif(tmp_path / "a.lif", {"A": volume(4, 1, 200, 30)})
    frames, places = list_frames(tmp_path / "a.lif"), []
    read = Planes.__getitem__
    monkeypatch.setattr(Planes, "__getitem__", lambda self, place: places.append(place) or read(self, place))
    image = frames[2].open()
    for top in range(0, 200, 40):
        assert image[top : top + 40].shape == (40, 30, 1)
    assert [place[0] for place in places] == [slice(2, 3)]


@pytest.mark.parametrize("missing", ["bioio", "bioio_lif"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, missing):
    write_lif(tmp_path / "a.lif", {"A": volume(1, 1, 20, 30)})
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r"a\.lif: LIF needs the packages bioio and bioio-lif: pip install bioio"):
        list_frames(tmp_path / "a.lif")


def test_a_format_that_no_installed_plug_in_reads_is_said(tmp_path):
    (tmp_path / "a.dv").write_bytes(b"no image" * 99)
    with pytest.raises(UserError, match=r"a\.dv: .* pip install bioio bioio-dv"):
        list_frames(tmp_path / "a.dv")


@pytest.mark.parametrize("length", [40, 300, 1500])
@pytest.mark.parametrize("kind", ["czi", "lif", "nd2"])
def test_a_damaged_file_is_refused(tmp_path, kind, length):
    pytest.importorskip(f"bioio_{kind}")
    path = tmp_path / f"a.{kind}"
    if kind == "lif":
        write_lif(path, {"A": volume(1, 1, 20, 30)})
    else:
        write_nd2(path, volume(1, 20, 30)) if kind == "nd2" else write_czi(path, volume(1, 1, 1, 20, 30))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=path.name):
        list_frames(path)[0].read()
