"""Pixel sizes in every dress that files give them in; a size that is not given is unknown, never invented."""

from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image
from zarrs import write_zarr

from images.calibration import tiff_sizes
from images.readers import list_frames, read_geometry

PIXELS = np.zeros((8, 8), np.uint8)
STACK = np.zeros((2, 8, 8), np.uint8)
OME = """<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image><Pixels DimensionOrder="XYZCT"
Type="uint8" SizeX="8" SizeY="8" SizeZ="1" SizeC="1" SizeT="1" {}><TiffData/></Pixels></Image></OME>"""
METASERIES = """<MetaData><PlaneInfo><prop id="spatial-calibration-state" type="bool" value="{}"/>
<prop id="spatial-calibration-x" type="float" value="0.65"/><prop id="spatial-calibration-y" type="float" value="0.65"/>
<prop id="spatial-calibration-units" type="string" value="um"/></PlaneInfo></MetaData>"""
HELIOS = "[User]\r\nUser=a\r\n[Scan]\r\nPixelWidth=2e-09\r\nPixelHeight=3e-09\r\n"
ZEISS = "0\r\n" * 3 + "AP_IMAGE_PIXEL_SIZE\r\nImage Pixel Size = 3.5 nm\r\n"
PHILIPS = '<DataObject ObjectType="DPUfsImport"><Attribute Name="DICOM_PIXEL_SPACING">&quot;0.00025&quot;</Attribute>'


def ome(**entries):
    return {
        "description": OME.format(" ".join(f'{name}="{value}"' for name, value in entries.items())),
        "metadata": None,
    }


def imagej(resolution, **lines):
    text = "ImageJ=1.53t\n" + "".join(f"{name}={value}\n" for name, value in lines.items())
    return {"description": text, "metadata": None, "resolution": resolution}


XY = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}
NM = {"PhysicalSizeXUnit": "nm", "PhysicalSizeYUnit": "nm"}
SIZE = {"X": 0.25, "Y": 0.5}
SQUARE = {"X": 0.25, "Y": 0.25}
TIFFS = {  # how a TIFF is written, and the pixel size [µm] that it gives, or why it gives none
    "no tags": (None, "no tags"),
    "tifffile": ({}, "no unit"),
    "1 per inch": ({"resolution": (1, 1), "resolutionunit": "INCH"}, "prints"),
    "72 dpi": ({"resolution": (72, 72), "resolutionunit": "INCH"}, "72 dpi"),
    "96 dpi": ({"resolution": (96, 96), "resolutionunit": "INCH"}, "96 dpi"),
    "300 dpi": ({"resolution": (300, 300), "resolutionunit": "INCH"}, "300 dpi"),
    "600 dpi": ({"resolution": (600, 600), "resolutionunit": "INCH"}, "600 dpi"),
    "1200 dpi": ({"resolution": (1200, 1200), "resolutionunit": "INCH"}, "1200 dpi"),
    "72 dpi in cm": ({"resolution": (28.346, 28.346), "resolutionunit": "CENTIMETER"}, "72 dpi"),
    "1 per cm": ({"resolution": (1, 1), "resolutionunit": "CENTIMETER"}, "prints"),
    "no unit": ({"resolution": (40_000, 20_000), "resolutionunit": "NONE"}, "no unit"),
    "per cm": ({"resolution": (40_000, 20_000), "resolutionunit": "CENTIMETER"}, SIZE),
    "per inch": ({"resolution": (101_600, 50_800), "resolutionunit": "INCH"}, SIZE),
    "imagej micron": (imagej((4, 2), unit="micron"), SIZE),
    "imagej escaped": (imagej((4, 2), unit="\\u00B5m"), SIZE),
    "imagej escaped Greek": (imagej((4, 2), unit="\\u03BCm"), SIZE),
    "imagej um": (imagej((4, 2), unit="um"), SIZE),
    "imagej Microns": (imagej((4, 2), unit="Microns"), SIZE),
    "imagej nm": (imagej((0.004, 0.002), unit="nm"), SIZE),
    "imagej mm": (imagej((4000, 2000), unit="mm"), SIZE),
    "imagej cm": (imagej((40_000, 20_000), unit="cm"), SIZE),
    "imagej m": (imagej((4_000_000, 2_000_000), unit="m"), SIZE),
    "imagej pm": (imagej((4e-6, 2e-6), unit="pm"), SIZE),
    "imagej angstrom": (imagej((4e-4, 2e-4), unit="\\u00C5"), SIZE),
    "imagej inch": (imagej((101_600, 50_800), unit="inch"), SIZE),
    "imagej yunit": (imagej((4, 0.002), unit="micron", yunit="nm"), SIZE),
    "imagej zunit": (imagej((4, 2), unit="micron", spacing=0.003, zunit="mm"), SIZE | {"Z": 3}),
    "imagej other zunit": (imagej((4, 2), unit="micron", spacing=3, zunit="slice"), SIZE),
    "imagej pixel": (imagej((4, 2), unit="pixel"), "'pixel'"),
    "imagej without unit": (imagej((1, 1)) | {"resolutionunit": "NONE"}, "no unit"),
    "ome": (ome(**XY), SIZE),
    "ome nm": (ome(PhysicalSizeX=250, PhysicalSizeY=500, **NM), SIZE),
    "ome Greek": (ome(**XY, PhysicalSizeXUnit="&#956;m", PhysicalSizeYUnit="&#956;m"), SIZE),
    "ome angstrom": (ome(PhysicalSizeX=2500, PhysicalSizeY=0.5, PhysicalSizeXUnit="&#197;"), SIZE),
    "ome pixel": (ome(**XY, PhysicalSizeXUnit="pixel", PhysicalSizeYUnit="pixel"), "'pixel'"),
    "ome without sizes": (ome() | {"resolution": (72, 72), "resolutionunit": "INCH"}, "72 dpi"),
    "metaseries": (
        {"description": METASERIES.format("On"), "software": "MetaSeries", "metadata": None},
        {"X": 0.65, "Y": 0.65},
    ),
    "metaseries uncalibrated": (
        {"description": METASERIES.format("Off"), "software": "MetaSeries", "metadata": None},
        "no unit",
    ),
    "aperio": ({"description": "Aperio Image Library v1\n8x8|AppMag = 40|MPP = 0.25", "metadata": None}, SQUARE),
    "ventana": ({"description": '<iScan ScanRes="0.25" Magnification="40">', "metadata": None}, SQUARE),
    "philips": ({"description": PHILIPS, "metadata": None}, SQUARE),
    "fei": ({"extratags": [(34682, 2, 0, HELIOS, True)], "metadata": None}, {"X": 0.002, "Y": 0.003}),
    "zeiss": ({"extratags": [(34118, 2, 0, ZEISS, True)], "metadata": None}, {"X": 0.0035, "Y": 0.0035}),
}


@pytest.mark.parametrize("name", TIFFS)
def test_pixel_size_of_a_tiff_is_read_or_unknown(tmp_path, name):
    options, expected = TIFFS[name]
    if options is None:
        Image.fromarray(PIXELS).save(tmp_path / "a.tif")  # tifffile always writes tags of the resolution
    else:
        tifffile.imwrite(tmp_path / "a.tif", PIXELS, photometric="minisblack", **options)
    check(read_geometry(list_frames(tmp_path / "a.tif")), expected)


def check(geometry, expected):
    if isinstance(expected, str):
        assert not {"X", "Y"} & geometry.pixel.keys() and expected in geometry.unknown
    else:
        assert geometry.pixel == pytest.approx(expected, rel=1e-4) and not geometry.unknown


MICROSCOPES = {  # what tifffile gives of files that it can't write
    "lsm": ({"lsm_metadata": {"VoxelSizeX": 2.5e-7, "VoxelSizeY": 5e-7, "VoxelSizeZ": 1e-6}}, SIZE | {"Z": 1}),
    "stk": (
        {
            "stk_metadata": {
                "SpatialCalibration": 1,
                "XCalibration": (1, 4),
                "YCalibration": (1, 2),
                "CalibrationUnits": "um",
            }
        },
        SIZE,
    ),
    "stk uncalibrated": ({"stk_metadata": {"SpatialCalibration": 0, "XCalibration": (1, 1)}}, "no tags"),
    "micromanager": ({"micromanager_metadata": {"Summary": {"PixelSize_um": 0.25}}}, SQUARE),
    "micromanager uncalibrated": ({"micromanager_metadata": {"Summary": {"PixelSize_um": 0}}}, "no tags"),
    "sis": ({"sis_metadata": {"pixelsizex": 2.5e-7, "pixelsizey": 5e-7}}, SIZE),
    "tvips": ({"tvips_metadata": {"PixelSizeX": 250, "PixelSizeY": 500}}, SIZE),
    "fluoview": (
        {
            "fluoview_metadata": {
                "Dimensions": [["X", 8, 0, 0.25, "um"], ["Y", 8, 0, 0.5, "um"], ["Z", 2, 0, 1.0, "um"]]
            }
        },
        SIZE | {"Z": 1},
    ),
}


@pytest.mark.parametrize("name", MICROSCOPES)
def test_tiff_sizes_reads_the_entries_of_microscopes(name):
    entries, expected = MICROSCOPES[name]
    page = SimpleNamespace(tags=SimpleNamespace(valueof=lambda code: None), description="")
    kinds = ("ome", "imagej", "lsm", "stk", "metaseries", "micromanager", "fei", "sem", "sis", "tvips", "fluoview")
    none = {f"{kind}_metadata": None for kind in kinds}
    sizes, why = tiff_sizes(SimpleNamespace(pages=[page], **none | entries), 0)
    assert expected in why if isinstance(expected, str) else sizes == pytest.approx(expected)


def scale(*factors):
    return {"coordinateTransformations": [{"type": "scale", "scale": factors}]}


ZARRS = {
    "micron": ("micrometer", scale(2, 0.5, 0.25), {}, SIZE | {"Z": 2}),
    "angstrom": ("angstrom", scale(20_000, 5000, 2500), {}, SIZE | {"Z": 2}),
    "of all levels": ("micrometer", scale(1, 5, 2.5), scale(2, 0.1, 0.1), SIZE | {"Z": 2}),
    "of all levels alone": ("micrometer", {}, scale(2, 0.5, 0.25), SIZE | {"Z": 2}),
    "no unit": ("", scale(1, 1, 1), {}, "no unit"),
    "no scale": ("micrometer", {}, {}, "gives none"),
}


@pytest.mark.parametrize("name", ZARRS)
def test_pixel_size_of_a_zarr_is_read_or_unknown(tmp_path, name):
    unit, of_level, of_all, expected = ZARRS[name]
    axes = [{"name": axis, "type": "space"} | ({"unit": unit} if unit else {}) for axis in "zyx"]
    write_zarr(tmp_path / "a.zarr", STACK, [{"axes": axes, "datasets": [{"path": "0"} | of_level]} | of_all])
    check(read_geometry(list_frames(tmp_path / "a.zarr")), expected)


@pytest.mark.parametrize(("size", "expected"), [((2, 0.5, 0.25), SIZE | {"Z": 2}), (None, "gives none")])
def test_pixel_size_of_an_hdf5_file_is_read_or_unknown(tmp_path, size, expected):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("volume", data=STACK)
        if size:
            data.attrs["element_size_um"] = size
    check(read_geometry(list_frames(tmp_path / "a.h5")), expected)
