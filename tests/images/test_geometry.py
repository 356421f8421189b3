import pytest
import tifffile
from examples import stack
from zarrs import write_zarr

from images.readers import list_frames, read_geometry

OME = """<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image><Pixels DimensionOrder="XYZCT"
Type="uint8" SizeX="8" SizeY="8" SizeZ="2" SizeC="1" SizeT="1" PhysicalSizeZ="{}"><TiffData/></Pixels></Image></OME>"""


@pytest.mark.parametrize("kind", ["imagej", "imagej, µm", "ome", "ome, nm", "baseline", "none"])
def test_geometry_has_the_size_of_a_pixel(tmp_path, kind):
    options = {
        "imagej": {"imagej": True, "resolution": (4, 2), "metadata": {"axes": "ZYX", "unit": "micron", "spacing": 3}},
        "imagej, µm": {"imagej": True, "resolution": (4, 2), "metadata": {"axes": "ZYX", "unit": "\\u00B5m"}},
        "ome": {"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}},
        "ome, nm": {
            "ome": True,
            "metadata": {"axes": "ZYX", "PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5},
        },
        "baseline": {"resolution": (40_000, 20_000), "resolutionunit": "CENTIMETER"},
        "none": {},
    }[kind]
    tifffile.imwrite(tmp_path / "a.tif", stack(2, 8), photometric="minisblack", **options)
    g = read_geometry(list_frames(tmp_path / "a.tif"))
    assert (g.axes, g.lengths) == ("Z", (2,))
    expected = {} if kind == "none" else {"X": 0.25, "Y": 0.5} | ({"Z": 3} if kind == "imagej" else {})
    assert g.pixel == expected and bool(g.unknown) == (kind == "none")


def test_geometry_has_the_time_between_frames_and_their_names(tmp_path):
    pixels = stack(6, 8).reshape(3, 2, 8, 8)
    names = [f"{time} {channel}" for time in range(3) for channel in "ab"]
    imagej = {"axes": "TCYX", "finterval": 2.5, "Labels": names}
    tifffile.imwrite(tmp_path / "a.tif", pixels, imagej=True, metadata=imagej)
    geometry = read_geometry(list_frames(tmp_path / "a.tif"))
    assert (geometry.axes, geometry.interval, geometry.labels) == ("T", 2.5, ("0 a", "1 a", "2 a"))
    ome = {"axes": "TCYX", "TimeIncrement": 250, "TimeIncrementUnit": "ms"}
    tifffile.imwrite(tmp_path / "b.ome.tif", pixels, metadata=ome)
    assert read_geometry(list_frames(tmp_path / "b.ome.tif")).interval == 0.25
    space = [{"name": axis, "unit": "micrometer"} for axis in "yx"]
    axes = [{"name": "t", "unit": "minute"}, {"name": "c"}, *space]
    write_zarr(tmp_path / "c.zarr", pixels, [{"axes": axes, "datasets": [{"path": "0"} | scale(0.5, 1, 2, 2)]}])
    geometry = read_geometry(list_frames(tmp_path / "c.zarr"))
    assert (geometry.interval, geometry.pixel, geometry.labels) == (30, {"Y": 2, "X": 2}, ())


@pytest.mark.parametrize("size", ["abc", "0", "-1", "nan", "inf", "1</OME>"])
@pytest.mark.parametrize("text", ["ImageJ=1.53t\nimages=2\nslices=2\nunit=1\nspacing={}\n", OME])
def test_geometry_has_no_size_that_is_no_number(tmp_path, text, size):
    tifffile.imwrite(
        tmp_path / "a.tif", stack(2, 8), photometric="minisblack", description=text.format(size), metadata=None
    )
    g = read_geometry(list_frames(tmp_path / "a.tif"))
    assert "Z" not in g.pixel


def scale(*factors):
    return {"coordinateTransformations": [{"type": "scale", "scale": factors}]}
