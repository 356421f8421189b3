import numpy as np
import pytest
import tifffile
from examples import RNG, stack
from microscopes import write_czi, write_lif
from PIL import Image
from zarrs import write_plate

from run_make_database import main


def info(capfd, *argv):
    """Lines about files; no database is made."""
    capfd.readouterr()
    assert main(["--info", *map(str, argv)]) == 0
    return capfd.readouterr().out.splitlines()


def greys(pixels, channel):
    low, high = np.percentile(pixels[:, :, channel], (0.1, 99.9))
    return f"{low:.4g} to {high:.4g}"


def test_info_prints_axes_channels_and_pixel_size_of_a_tiff(work, capfd):
    pixels = RNG.integers(0, 255, (2, 3, 2, 8, 9)).astype(np.uint16)
    metadata = {
        "axes": "TZCYX",
        "Channel": {"Name": ["DAPI", "GFP"]},
        "PhysicalSizeX": 0.5,
        "PhysicalSizeY": 0.5,
        "TimeIncrement": 2,
    }
    tifffile.imwrite("a.ome.tif", pixels, metadata=metadata)
    assert info(capfd, "a.ome.tif") == [
        "a.ome.tif: TIFF (ome)",
        '  series 0 "Image0": T 2, Z 3, C 2, Y 8, X 9, uint16',
        "    channels: 0 DAPI, 1 GFP",
        "    pixel size: X 0.5, Y 0.5 micron, 2 s between two times",
        "  read as 6 image(s) of 8 x 9 px, 2 channel(s) of uint16",
        f"  grey values in use, of each channel: {'; '.join(greys(pixels, channel) for channel in range(2))}",
    ]
    chosen = ("--section", "1", "--channel", "GFP")
    assert info(capfd, "a.ome.tif", *chosen)[-2] == "  read as 2 image(s) of 8 x 9 px, 1 channel(s) of uint16"
    assert not (work / "datasets").exists()


def test_info_describes_every_format(work, capfd):
    np.save("a.npy", stack(2, 8))
    Image.fromarray(stack(1, 8)[0]).save("a.png")
    write_plate(work / "p.zarr", {"A/1/0": stack(1, 8)[0], "A/1/1": stack(1, 8)[0]})
    lines = info(capfd, "a.npy", "a.png", "p.zarr")
    assert [line for line in lines if line[0] != " "] == [
        "a.npy: NumPy array",
        "a.png: PNG",
        "p.zarr: OME-Zarr plate, 2 series",
    ]
    assert '  series 1 "A/1/1": C 1, Y 8, X 8, uint8' in lines
    assert [line for line in lines if "read as" in line] == [
        f"  read as {num} image(s) of 8 x 8 px, 1 channel(s) of uint8" for num in (2, 1, 2)
    ]


def test_info_lists_data_sets_if_one_must_be_chosen(work, capfd):
    h5py = pytest.importorskip("h5py")
    with h5py.File("a.h5", "w") as file:
        file["raw"], file["label"], file["names"] = stack(2, 8), stack(2, 8), b"text"
    lines = info(capfd, "a.h5")
    assert lines[0] == "a.h5: HDF5, 3 series" and '  series 1 "/names": shape () of object' in lines[3]
    assert lines[-1] == "  to be read, one must be chosen: holds 2 data sets: name one of them (a.h5:/label, a.h5:/raw)"
    assert info(capfd, "a.h5:/raw")[-2] == "  read as 2 image(s) of 8 x 8 px, 1 channel(s) of uint8"
    (work / "C:").mkdir()  # as Windows names a drive
    (work / "a.h5").rename("C:/a.h5")
    assert info(capfd, "C:/a.h5")[-1].startswith("  to be read, one must be chosen: holds 2 data sets")


def test_info_names_the_plug_in(work, capfd):
    pytest.importorskip("bioio_lif")
    write_lif(work / "a.lif", {"A": RNG.integers(0, 255, (2, 2, 8, 9)).astype(np.uint8), "B": stack(1, 8)[None]})
    lines = info(capfd, "a.lif")
    assert lines[0] == "a.lif: LIF (bioio-lif), 2 series" and "    channels: 0 Dye0, 1 Dye1" in lines
    assert lines[-1].startswith("  read as 2 image(s) of 8 x 9 px, 2 channel(s) of uint8; 1 image(s) of 8 x 8 px, 1")


def test_info_of_a_damaged_file_is_one_line_after_the_others(work, capfd):
    (work / "a.tif").write_bytes(b"II*\0" + bytes(4))
    Image.fromarray(stack(1, 8)[0]).save("b.png")
    assert main(["--info", "."]) == 1
    out, err = capfd.readouterr()
    assert out.splitlines()[0] == "b.png: PNG"
    assert len(err.splitlines()) == 1 and err.startswith("error: a.tif: ")


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp"])
def test_info_refuses_a_truncated_picture_though_its_header_is_complete(work, capfd, ending):
    name = f"a.{ending}"
    for folder in (work, work / "whole"):
        folder.mkdir(exist_ok=True)
        Image.fromarray(stack(1, 64)[0]).save(folder / name)
    (work / name).write_bytes((work / name).read_bytes()[:2000])
    assert main(["--info", f"**/{name}"]) == 1
    out, err = capfd.readouterr()
    assert out.splitlines()[0].startswith(f"{name}: ") and out.count("read as 1 image(s) of 64 x 64 px") == 1
    assert err.startswith(f"error: {name}: damaged or truncated") and len(err.splitlines()) == 1


def test_info_does_not_decode_a_large_picture_and_tells_so(work, capfd, monkeypatch):
    monkeypatch.setattr("images.info.HARMLESS", 2**20)
    Image.fromarray(np.zeros((1024, 1025), np.uint8)).save("a.png")
    (work / "a.png").write_bytes((work / "a.png").read_bytes()[:-100])
    assert info(capfd, "a.png")[-1].endswith("of uint8; not checked for damage, since an image has over 1 MiB")


def test_info_of_a_damaged_czi_is_one_line_too(work, fails, caplog):
    pytest.importorskip("bioio_czi")
    write_czi(work / "a.czi", RNG.integers(0, 255, (1, 1, 1, 8, 9)).astype(np.uint8))
    (work / "a.czi").write_bytes((work / "a.czi").read_bytes()[:900])
    assert "a.czi: can't be read as an image, is damaged" in fails(main, ["--info", "a.czi"])
    assert not [record for record in caplog.records if record.name.startswith("bioio")]  # a shell would print them


def test_info_refuses_what_a_file_does_not_have(work, fails):
    np.save("a.npy", stack(2, 8))
    assert "a.npy: no section 2: it has 2, 0 to 1" in fails(main, ["--info", "a.npy", "--section", "2"])
    assert "--section x" in fails(main, ["--info", "a.npy", "--section", "x"], status=2)
    assert "none.tif: no such file" in fails(main, ["--info", "none.tif"])
