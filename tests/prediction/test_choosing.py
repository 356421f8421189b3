"""What predict makes of the parts of a file that are chosen."""

import numpy as np
import pytest
import tifffile
from PIL import Image
from zarrs import write_plate

import main
from images.readers import list_frames, read_geometry


def segment(*argv):
    return main.main(["--mode", "predict", "--gpu_ids", "-1", "--tta", "off", *argv])


def noise(*shape):
    return np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)


def test_channel_and_sections_of_a_stack(trained, work, fails):
    pixels = noise(5, 2, 32, 48)
    metadata = {"axes": "ZCYX", "Channel": {"Name": ["DAPI", "GFP"]}, "PhysicalSizeX": 0.5, "PhysicalSizeZ": 2}
    metadata["PhysicalSizeY"] = 0.25
    tifffile.imwrite("in.ome.tif", pixels, metadata=metadata)
    tifffile.imwrite("expected.tif", pixels[[1, 3], 1], photometric="minisblack")
    assert segment("--input", "expected.tif", "--output", "expected.npy") == 0
    chosen = ("--channel", "GFP", "--section", "1,3")
    assert segment("--input", "in.ome.tif", "--output", "out.tif", *chosen) == 0
    assert np.array_equal(tifffile.imread("out.tif"), np.load("expected.npy"))
    g = read_geometry(list_frames(work / "out.tif"))
    assert (g.axes, g.lengths) == ("Z", (2,)) and g.pixel == pytest.approx({"X": 0.5, "Y": 0.25, "Z": 4})
    for flags, line in (
        (("--channel", "RFP"), "no channel RFP: it has 2, 0 (DAPI), 1 (GFP)"),
        (("--channel", "1", "--section", "5"), "no section 5: it has 5, 0 to 4"),
        ((), "2 channel(s), the network was trained on 1"),
    ):
        assert line in fails(main.main, ["--mode", "predict", "--input", "in.ome.tif", "--output", "b.tif", *flags])


def test_data_set_of_hdf5_is_segmented(trained, work):
    h5py = pytest.importorskip("h5py")
    pixels = noise(3, 32, 48)
    with h5py.File("in.h5", "w") as file:
        file["raw"], file["other"] = pixels, pixels
        file["raw"].attrs["element_size_um"] = [0.05, 0.004, 0.004]
    tifffile.imwrite("in.tif", pixels, photometric="minisblack")
    assert segment("--input", "in.tif", "--output", "expected.npy") == 0
    assert segment("--input", "in.h5:/raw", "--output", "out.tif") == 0
    assert np.array_equal(tifffile.imread("out.tif"), np.load("expected.npy"))
    assert read_geometry(list_frames(work / "out.tif")).pixel["Z"] == pytest.approx(0.05)


def test_outputs_of_a_plate_are_named_by_well_and_field(trained, work):
    fields = {"A/1/0": noise(2, 32, 48), "B/2/0": noise(32, 48)}
    write_plate(work / "p.zarr", fields)
    assert segment("--input", "p.zarr", "--output", "out") == 0
    names = sorted(path.name for path in (work / "out").iterdir() if path.suffix == ".png")
    assert names == ["p-A-1-0-0000.png", "p-A-1-0-0001.png", "p-B-2-0.png"]
    assert segment("--input", "p.zarr", "--series", "B/2/0", "--output", "one.png") == 0
    assert np.array_equal(Image.open("one.png"), Image.open("out/p-B-2-0.png"))
    assert segment("--input", "p.zarr", "--output", "out.tif") == 0
    assert read_geometry(list_frames(work / "out.tif")).labels == ("A/1/0", "A/1/0", "B/2/0")
