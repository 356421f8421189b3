"""Size of a pixel and time between frames, as files give them: in micron and seconds, or unknown with the reason."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any
from xml.etree import ElementTree

# units found in files, in lower case and without a plural, in micron and in seconds
MICRON = {"m": 1e6, "meter": 1e6, "cm": 1e4, "centimeter": 1e4, "mm": 1e3, "millimeter": 1e3, "nm": 1e-3}
MICRON |= {"µm": 1.0, "um": 1.0, "µ": 1.0, "micron": 1.0, "micrometer": 1.0, "nanometer": 1e-3, "pm": 1e-6}
MICRON |= {
    "picometer": 1e-6,
    "å": 1e-4,
    "angstrom": 1e-4,
    "in": 25400.0,
    "inch": 25400.0,
    "inche": 25400.0,
    '"': 25400.0,
}
SECOND = {"s": 1.0, "sec": 1.0, "second": 1.0, "ms": 1e-3, "msec": 1e-3, "millisecond": 1e-3, "µs": 1e-6, "us": 1e-6}
SECOND |= {
    "microsecond": 1e-6,
    "ns": 1e-9,
    "nanosecond": 1e-9,
    "min": 60.0,
    "minute": 60.0,
    "h": 3600.0,
    "hour": 3600.0,
}
# letters that look alike: Greek mu and the sign micro, Å and the sign angstrom, each also as ImageJ escapes them
ALIKE = {"\u03bc": "µ", "\u212b": "Å", "\\u00B5": "µ", "\\u03BC": "µ", "\\u00C5": "Å", "\\u212B": "Å", "metre": "meter"}
PRINTED = {72, 75, 90, 96, 100, 120, 144, 150, 180, 200, 240, 300, 350, 360, 400, 600, 720, 1200, 2400}  # [dpi]
COARSE = 25.0  # [µm] of a pixel at 1016 dpi: larger ones in a tag of TIFF that is for printers are of a print

Sizes = dict[str, float]  # [µm] of a pixel along X, Y and Z


def micron(value: Any, unit: str) -> float:
    """A length in micron; 0 if it is not a positive number, or its unit is unknown.

    Examples
    --------
    >>> micron(4, "nm"), micron("0.5", "\u03bcm"), micron(2, "pixel"), micron(-1, "µm"), micron(1, "Micrometres")
    (0.004, 0.5, 0.0, 0.0, 1.0)
    """
    return positive(value) * MICRON.get(_plain(unit), 0.0)


def in_micron(sizes: Mapping[str, Any], units: Mapping[str, str]) -> tuple[Sizes, str]:
    """Pixel size [µm] along each axis whose length and unit are known, and why X and Y are not both known.

    Examples
    --------
    >>> in_micron({"X": 4, "Y": 4, "Z": 1}, {"X": "nm", "Y": "nm", "Z": "slice"}), in_micron({"X": 2}, {"X": "pixel"})
    (({'X': 0.004, 'Y': 0.004}, ''), ({}, "its unit is 'pixel'"))
    """
    known = {axis: micron(size, units.get(axis, "")) for axis, size in sizes.items()}
    known = {axis: size for axis, size in known.items() if size}
    if {"X", "Y"} <= known.keys():
        return known, ""
    along = [axis for axis in "XY" if axis not in known]
    unit = next((units[axis] for axis in along if positive(sizes.get(axis)) and units.get(axis)), "")
    why = (
        f"its unit is {unit!r}" if unit else "the file gives none" if not sizes else "the file gives no size or no unit"
    )
    return known, why


def in_seconds(interval: Any, unit: str) -> float | None:
    """Time between two frames [s]; None if it is not a positive number or its unit is unknown.

    Examples
    --------
    >>> in_seconds("250", "ms"), in_seconds(0, "s"), in_seconds(1, "frame")
    (0.25, None, None)
    """
    return positive(interval) * SECOND.get(_plain(unit), 0.0) or None


def positive(value: Any) -> float:
    """Value from a file as a number; 0 if it is not a number, not positive, or infinite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return number if 0 < number < math.inf else 0.0


def _plain(unit: str) -> str:
    """Unit with one spelling of its letters, in lower case and without a plural."""
    for letters, other in ALIKE.items():
        unit = unit.replace(letters, other)
    unit = unit.strip().strip("\0").lower()
    return unit if unit in ("s", "ms", "µs", "us", "ns") else unit.removesuffix("s")


def tiff_sizes(tif: Any, number: int) -> tuple[Sizes, str]:
    """Pixel size of a series of a TIFF, from the first of the entries of microscopes and programs that gives one."""
    for entry in ENTRIES:
        try:
            sizes, units = entry(tif, number)
        except Exception:  # metadata of another version, or damaged: they raise all kinds of exceptions
            continue
        if sizes:
            return in_micron(sizes, units)
    return _of_tags(tif)


def tiff_interval(tif: Any, number: int) -> float | None:
    """Time [s] between two frames of a series of a TIFF; None if it is not named."""
    if tif.ome_metadata:
        found = _ome_entries(tif, number)
        return in_seconds(found.get("TimeIncrement"), found.get("TimeIncrementUnit", "s"))
    imagej = tif.imagej_metadata or {}
    return in_seconds(imagej.get("finterval"), str(imagej.get("tunit", "s")))


def _ome_entries(tif: Any, number: int) -> Mapping[str, str]:
    """Entries of the element `Pixels` of a series."""
    images = ElementTree.fromstring(tif.ome_metadata).findall(".//{*}Pixels")
    return images[number].attrib if number < len(images) else {}


def _of_tags(tif: Any) -> tuple[Sizes, str]:
    """Pixel size from the tags of TIFF, which are there for printers: those of a print are none."""
    x, y, unit = (tif.pages[0].tags.valueof(code) for code in (282, 283, 296))
    if not (x and y):
        return {}, "the file has no tags of its resolution"
    per = {2: "inch", 3: "cm"}.get(2 if unit is None else int(unit), "")  # inch where there is no tag of the unit
    if not per:
        return {}, "its tags of the resolution have no unit"
    densities = {"X": _ratio(x), "Y": _ratio(y)}
    sizes, why = in_micron(
        {axis: 1 / density if density else 0 for axis, density in densities.items()}, dict.fromkeys("XY", per)
    )
    dpi = [round(25400 / size, 1) for size in sizes.values()]
    if any(size >= COARSE for size in sizes.values()) or any(
        abs(each - near) < 0.6 for each in dpi for near in PRINTED
    ):
        return {}, f"its resolution is one of prints, {dpi[0]:g} dpi"
    return sizes, why


def _ratio(value: Any) -> float:
    """Number of a tag that holds a numerator and a denominator."""
    numerator, denominator = value if isinstance(value, tuple) else (value, 1)
    return positive(numerator) / denominator if denominator else 0.0


Entry = tuple[Mapping[str, Any], Mapping[str, str]]  # length of a pixel along each axis, and its unit


def _of_ome(tif: Any, number: int) -> Entry:
    """OME-XML: `PhysicalSizeX` and the like, in micron unless a unit is named."""
    if not tif.ome_metadata:
        return {}, {}
    found = _ome_entries(tif, number)
    units = {axis: found.get(f"PhysicalSize{axis}Unit", "µm") for axis in "XYZ"}
    return {axis: found[f"PhysicalSize{axis}"] for axis in "XYZ" if f"PhysicalSize{axis}" in found}, units


def _of_imagej(tif: Any, _number: int) -> Entry:
    """ImageJ: pixels per unit in the tags, and the units in the description; `yunit` and `zunit` where they differ."""
    imagej = tif.imagej_metadata or {}
    unit = str(imagej.get("unit", ""))
    if not unit:
        return {}, {}
    x, y = (_ratio(tif.pages[0].tags.valueof(code) or 0) for code in (282, 283))
    sizes = {"X": x and 1 / x, "Y": y and 1 / y, "Z": imagej.get("spacing")}
    return sizes, {"X": unit, "Y": str(imagej.get("yunit", unit)), "Z": str(imagej.get("zunit", unit))}


def _of_lsm(tif: Any, _number: int) -> Entry:
    """Zeiss LSM [m]."""
    found = tif.lsm_metadata or {}
    return {axis: found[f"VoxelSize{axis}"] for axis in "XYZ" if found}, dict.fromkeys("XYZ", "m")


def _of_stk(tif: Any, _number: int) -> Entry:
    """MetaMorph STK: length of a pixel in its own units, if it was calibrated."""
    found = tif.stk_metadata or {}
    unit = str(found.get("CalibrationUnits", ""))
    sizes = {axis: _ratio(found[f"{axis}Calibration"]) for axis in "XY" if found.get("SpatialCalibration")}
    return sizes, dict.fromkeys("XY", unit)


def _of_metaseries(tif: Any, _number: int) -> Entry:
    """MetaSeries, of Molecular Devices."""
    plane = (tif.metaseries_metadata or {}).get("PlaneInfo", {})
    is_calibrated = plane.get("spatial-calibration-state", False)
    sizes = {axis: plane[f"spatial-calibration-{axis.lower()}"] for axis in "XY" if is_calibrated}
    return sizes, dict.fromkeys("XY", str(plane.get("spatial-calibration-units", "")))


def _of_micromanager(tif: Any, _number: int) -> Entry:
    """Micro-Manager [µm]; 0 where it is not calibrated."""
    summary = (tif.micromanager_metadata or {}).get("Summary", {})
    size = positive(summary.get("PixelSize_um", summary.get("PixelSizeUm")))
    return {axis: size for axis in "XY" if size}, dict.fromkeys("XY", "µm")


def _of_fei(tif: Any, _number: int) -> Entry:
    """FEI and Thermo Fisher electron microscopes [m]."""
    scan = (tif.fei_metadata or {}).get("Scan", {})
    sizes = {"X": scan.get("PixelWidth"), "Y": scan.get("PixelHeight")} if scan else {}
    return sizes, dict.fromkeys("XY", "m")


def _of_zeiss_sem(tif: Any, _number: int) -> Entry:
    """Zeiss electron microscopes: entries of a name, a value and a unit."""
    found = tif.sem_metadata or {}
    name, value, unit = (*(found.get("ap_image_pixel_size") or found.get("ap_pixel_size") or ()), "", "", "")[:3]
    return {axis: value for axis in "XY" if name}, dict.fromkeys("XY", str(unit))


def _of_sis(tif: Any, _number: int) -> Entry:
    """Olympus SIS [m]."""
    found = tif.sis_metadata or {}
    return {axis: found[f"pixelsize{axis.lower()}"] for axis in "XY" if found}, dict.fromkeys("XY", "m")


def _of_tvips(tif: Any, _number: int) -> Entry:
    """TVIPS cameras of electron microscopes [nm]."""
    found = tif.tvips_metadata or {}
    return {axis: found[f"PixelSize{axis}"] for axis in "XY" if found}, dict.fromkeys("XY", "nm")


def _of_fluoview(tif: Any, _number: int) -> Entry:
    """Olympus FluoView: name, length, origin, resolution and unit of each dimension."""
    found = (tif.fluoview_metadata or {}).get("Dimensions", ())
    dimensions = {str(each[0]).strip("\0 ").upper(): each for each in found}
    named = {axis: dimensions[axis] for axis in "XYZ" if axis in dimensions}
    return {axis: each[3] for axis, each in named.items()}, {axis: str(each[4]) for axis, each in named.items()}


def _of_slide(tif: Any, number: int) -> Entry:
    """First series of slides of Aperio (`MPP`), Philips (`DICOM_PIXEL_SPACING`) and Ventana (`ScanRes`)."""
    text = tif.pages[0].description
    patterns = {r"^Aperio.*\|\s*MPP\s*=\s*([\d.]+)": "µm", r"ScanRes\s*=\s*\"([\d.]+)\"": "µm"}
    patterns |= {r"DICOM_PIXEL_SPACING.*?&quot;([\d.eE-]+)&quot;": "mm"}
    for pattern, unit in patterns.items():
        if number == 0 and (found := re.search(pattern, text, re.DOTALL)):
            return dict.fromkeys("XY", found[1]), dict.fromkeys("XY", unit)
    return {}, {}


ENTRIES: tuple[Callable[[Any, int], Entry], ...] = (
    _of_ome,
    _of_imagej,
    _of_lsm,
    _of_stk,
    _of_metaseries,
    _of_micromanager,
    _of_fei,
    _of_zeiss_sem,
    _of_sis,
    _of_tvips,
    _of_fluoview,
    _of_slide,
)
