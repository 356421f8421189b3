import re
import sys

import numpy as np
import pytest
import tifffile
from examples import RNG
from microscopes import write_czi, write_lif, write_nd2
from PIL import Image

from images.bioio import Planes
from images.readers import list_frames, read_geometry
from images.selection import Choice
from run_make_database import main
from utils import UserError

pytest.importorskip("bioio")


def volume(*shape):
    return RNG.integers(0, 60000, shape).astype(np.uint16)


def test_czi_is_read_by_planes_with_axes_pixel_size_and_channels(tmp_path):
    pytest.importorskip("bioio_czi")
    pixels = volume(2, 3, 2, 20, 30)
    write_czi(tmp_path / "a.czi", pixels, ("DAPI", "GFP"), 0.5e-6)
    (tmp_path / "a.czi").rename(tmp_path / "scan.dat")  # known by its first bytes
    frames = list_frames(tmp_path / "scan.dat")
    assert [frame.stack for frame in frames] == [0, 0, 0, 3, 3, 3]
    for frame, expected in zip(frames, pixels.reshape(6, 2, 20, 30), strict=True):
        assert np.array_equal(frame.read(), expected.transpose(1, 2, 0))
    g = read_geometry(frames)
    assert (g.axes, g.lengths, g.unknown, g.channels) == ("TZ", (2, 3), "", ("DAPI", "GFP"))
    assert g.pixel == pytest.approx({"X": 0.5, "Y": 0.5, "Z": 2})
    (chosen,) = list_frames(tmp_path / "scan.dat", Choice("gfp", "", "1"))[1:]
    assert np.array_equal(chosen.read()[..., 0], pixels[1, 1, 1])


COLOURS = RNG.integers(0, 255, (3, 20, 30, 3)).astype(np.uint8)  # Z, Y, X and three different channels


def write_colour_czi(path, tiles):
    czi = pytest.importorskip("pylibCZIrw.czi")
    with czi.create_czi(str(path)) as file:
        for z, section in enumerate(COLOURS):
            for part in np.split(section, tiles, axis=1):
                left = 0 if part is section else int((section == part[0, 0]).all(-1).argmax() % 30)
                file.write(np.ascontiguousarray(part[..., ::-1]), plane={"Z": z}, location=(left, 0))  # blue first
        file.write_metadata("a")


@pytest.mark.parametrize("kind", ["tile.czi", "mosaic.czi", "a.lif", "a.nd2"])
def test_colours_of_microscopes_are_red_green_and_blue(tmp_path, kind):
    pytest.importorskip(f"bioio_{kind[-3:]}")
    path = tmp_path / kind
    if kind.endswith("czi"):
        write_colour_czi(path, {"tile.czi": 1, "mosaic.czi": 2}[kind])
    elif kind == "a.lif":
        write_lif(path, {"grey": volume(2, 1, 20, 30), "colour": ("ZYXS", COLOURS)})
    else:
        write_nd2(path, COLOURS[0].transpose(2, 0, 1).astype(np.uint16), colours=True)
    frames = list_frames(path)[-3:]
    for frame, pixels in zip(frames, COLOURS, strict=kind != "a.nd2"):
        assert np.array_equal(frame.read(), pixels) and np.array_equal(frame.open()[3:9], pixels[3:9])


def test_scenes_that_the_metadata_lack_are_not_lost_in_silence(tmp_path, capsys):
    pytest.importorskip("bioio_czi")
    czi = pytest.importorskip("pylibCZIrw.czi")
    with czi.create_czi(str(tmp_path / "a.czi")) as file:
        for scene in range(2):
            file.write(volume(20, 30, 1), scene=scene, location=(100 * scene, 0))
        file.write_metadata("a")
    assert len(list_frames(tmp_path / "a.czi")) == 1
    assert "a.czi: 2 scenes, of which its metadata name 1" in capsys.readouterr().out


def test_lif_images_are_series(tmp_path):
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


def test_lif_series_are_each_read_or_have_a_problem(tmp_path, capsys):
    pytest.importorskip("bioio_lif")
    grey, spectrum, section, both = volume(2, 2, 20, 30), volume(4, 20, 30), volume(25, 30), volume(2, 4, 20, 30)
    images = {
        "grey": grey,
        "spectrum": ("λYX", spectrum),
        "xz": ("ZX", section),
        "both": ("CλYX", both),
        "line": ("X", volume(30)),
    }
    write_lif(tmp_path / "a.lif", images)
    frames = list_frames(tmp_path / "a.lif")
    assert [frame.series for frame in frames] == [
        "grey",
        "grey",
        "spectrum",
        "xz",
        *(f"both λ{number}" for number in range(4)),
    ]
    assert np.array_equal(frames[2].read(), spectrum.transpose(1, 2, 0))
    assert np.array_equal(frames[2].open()[3:9], spectrum.transpose(1, 2, 0)[3:9])
    assert np.array_equal(frames[3].read()[..., 0], section)
    assert read_geometry(frames[3:4]).pixel == pytest.approx({"X": 0.5, "Y": 2})
    assert np.array_equal(frames[5].read(), both[:, 1].transpose(1, 2, 0))
    out = capsys.readouterr().out
    assert "a.lif: series line is left out: axes" in out and len(out.splitlines()) == 1
    assert len(list_frames(tmp_path / "a.lif", Choice(series="grey"))) == 2 and not capsys.readouterr().out
    with pytest.raises(UserError, match=r"a\.lif, line: axes X: "):
        list_frames(tmp_path / "a.lif", Choice(series="line"))


@pytest.mark.parametrize("axes", ["TZ", "ZC"])
def test_aborted_czi_is_refused_but_its_planes_are_read_by_section(tmp_path, axes):
    pytest.importorskip("bioio_czi")
    czi, pixels = pytest.importorskip("pylibCZIrw.czi"), volume(2, 4, 20, 30)
    with czi.create_czi(str(tmp_path / "a.czi")) as file:
        for first, second in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]:
            plane = {"T": first, "Z": second} if axes == "TZ" else {"C": first, "Z": second}
            file.write(pixels[first, second][..., None], plane=plane)
        file.write_metadata("a")
    num, there = (8, "0-3") if axes == "TZ" else (4, "0-1")
    with pytest.raises(UserError, match=f"a.czi: 2 of {num} images are missing: .* by --section {there}$") as refused:
        list_frames(tmp_path / "a.czi")
    assert "damaged" not in str(refused.value)
    frames = list_frames(tmp_path / "a.czi", Choice(section=there))
    expected = pixels.reshape(8, 20, 30, 1)[:6] if axes == "TZ" else pixels[:, :2].transpose(1, 2, 3, 0)
    assert np.array_equal(np.stack([frame.read() for frame in frames]), expected)


@pytest.mark.parametrize("lacks", ["scale", "channels"])
def test_czi_without_scale_or_channels_is_read(tmp_path, lacks):
    pytest.importorskip("bioio_czi")
    pixels, path = volume(1, 2, 1, 20, 30), tmp_path / "a.czi"
    write_czi(path, pixels, ("DAPI",), 0.5e-6)
    data, channel = path.read_bytes(), b"C" + bytes(7) + b"\1" + bytes(3)  # a dimension that begins at 0 and has size 1
    data = data.replace(b"Scaling>", b"Sca_ing>") if lacks == "scale" else data.replace(channel, b"B" + channel[1:])
    path.write_bytes(data)
    frames = list_frames(path)
    assert np.array_equal(np.stack([frame.read() for frame in frames])[..., 0], pixels[0, :, 0])
    assert read_geometry(frames).axes == "Z" and ("X" in read_geometry(frames).pixel) == (lacks == "channels")


def test_nd2_is_read(tmp_path):
    pytest.importorskip("bioio_nd2")
    pixels = volume(2, 20, 30)
    write_nd2(tmp_path / "a.nd2", pixels)
    (frame,) = list_frames(tmp_path)
    assert np.array_equal(frame.read(), pixels.transpose(1, 2, 0))
    g = read_geometry([frame])
    assert (g.pixel["X"], g.pixel["Y"], g.channels) == (0.5, 0.5, ("Dye0", "Dye1"))


def test_nd2_without_calibration_has_no_pixel_size(tmp_path):
    pytest.importorskip("bioio_nd2")
    write_nd2(tmp_path / "a.nd2", volume(2, 20, 30), um=1.0, calibrated=False)
    geometry = read_geometry(list_frames(tmp_path))
    assert geometry.pixel == {} and geometry.unknown == "the file gives none"


def test_planes_are_decoded_once_and_no_others(tmp_path, monkeypatch):
    pytest.importorskip("bioio_lif")
    write_lif(tmp_path / "a.lif", {"A": volume(4, 1, 200, 30)})
    frames, indices = list_frames(tmp_path / "a.lif"), []
    read = Planes.__getitem__
    monkeypatch.setattr(Planes, "__getitem__", lambda self, index: indices.append(index) or read(self, index))
    image = frames[2].open()
    for top in range(0, 200, 40):
        assert image[top : top + 40].shape == (40, 30, 1)
    assert [index[0] for index in indices] == [slice(2, 3)]


@pytest.mark.parametrize("missing", ["bioio", "bioio_lif"])
def test_missing_package_is_named(tmp_path, monkeypatch, missing):
    write_lif(tmp_path / "a.lif", {"A": volume(1, 1, 20, 30)})
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r"a\.lif: LIF needs the packages bioio and bioio-lif: pip install bioio"):
        list_frames(tmp_path / "a.lif")


NAMED = {
    "a.mrxs": "a MIRAX slide: .* the pixels lie in the folder .*: export it as OME-TIFF with QuPath",
    "a.vsi": "an Olympus slide: this file is its overview.* pip install bioio bioio-bioformats",
    "a.ims": "an Imaris file, whose arrays are larger than the image.*: export it as OME-TIFF",
    "a.NEF": "a raw picture of a camera: as a TIFF this file is its preview",
    "a.lof": "a part of a Leica project",
    "a.oib": "an Olympus FluoView file",
    "a.nii.gz": "a NIfTI file",
    "a.geojson": "outlines of QuPath, no image",
}


@pytest.mark.parametrize("name", NAMED)
def test_refusal_calls_a_kind_that_is_not_read_by_its_name(tmp_path, work, fails, name):
    if name == "a.mrxs":
        Image.fromarray(COLOURS[0]).save(tmp_path / name, format="jpeg")
    elif name in ("a.vsi", "a.NEF"):
        tifffile.imwrite(tmp_path / name, COLOURS[0])
    elif name == "a.ims":
        with pytest.importorskip("h5py").File(tmp_path / name, "w") as file:
            file["DataSet/ResolutionLevel 0/TimePoint 0/Channel 0/Data"] = volume(8, 16, 16)
    else:
        (tmp_path / name).write_bytes((b"\x70\0\0\0" if name == "a.lof" else b"") + b"no image" * 99)
    line = fails(main, ["--info", name])
    assert re.search(f"{name}: {NAMED[name]}", line) and "damaged" not in line


def test_refusal_names_the_plug_in_that_is_not_installed(tmp_path):
    (tmp_path / "a.dv").write_bytes(b"no image" * 99)
    with pytest.raises(UserError, match=r"a\.dv: .* pip install bioio bioio-dv"):
        list_frames(tmp_path / "a.dv")


@pytest.mark.parametrize("length", [40, 300, 1500])
@pytest.mark.parametrize("kind", ["czi", "lif", "nd2"])
def test_damaged_files_of_microscopes_are_refused(tmp_path, kind, length):
    pytest.importorskip(f"bioio_{kind}")
    path = tmp_path / f"a.{kind}"
    if kind == "lif":
        write_lif(path, {"A": volume(1, 1, 20, 30)})
    else:
        write_nd2(path, volume(1, 20, 30)) if kind == "nd2" else write_czi(path, volume(1, 1, 1, 20, 30))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=path.name):
        list_frames(path)[0].read()
