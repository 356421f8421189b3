"""Kinds of files that are not read, by the ending of their names: what they are, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from utils import UserError


class Kind(NamedTuple):
    """A kind of file."""

    what: str  # it is
    advice: str  # for users who have one
    package: str = ""  # plug-in of bioio that reads it


FIJI = "export it as OME-TIFF with Fiji (File > Import > Bio-Formats, then File > Save As > OME-TIFF)"
QUPATH = "export it as OME-TIFF with QuPath (File > Export images)"
LAS_X = "export it as TIFF or .lif with LAS X"
BIOFORMATS = "bioio-bioformats"

# Refused before their first bytes are asked, which are those of a TIFF, JPEG, LIF or HDF5 that is not the image itself
ELSEWHERE = {
    ".mrxs": Kind("a MIRAX slide: this file is its overview, the pixels lie in the folder of its name", QUPATH),
    ".vsi": Kind(
        "an Olympus slide: this file is its overview, the pixels lie in a folder next to it", QUPATH, BIOFORMATS
    ),
    ".ims": Kind("an Imaris file, whose arrays are larger than the image", f"{FIJI}, or from Imaris", BIOFORMATS),
    ".lof": Kind("a part of a Leica project", LAS_X, BIOFORMATS),
    ".lifext": Kind("an addition to a .lif: the image is in the .lif of that name", "name the .lif"),
    ".dcm": Kind("a DICOM file", "convert it to TIFF", BIOFORMATS),
}
CAMERA = ".3fr .arw .cr2 .dcr .dng .erf .fff .iiq .kdc .mef .mos .nef .nrw .pef .srw"
RAW = Kind("a raw picture of a camera: as a TIFF this file is its preview", "save it as TIFF or PNG")
ELSEWHERE |= dict.fromkeys(CAMERA.split(), RAW)

# Named if no reader knows their first bytes
UNREAD = {
    ".dv .r3d": Kind("a DeltaVision file", FIJI, "bioio-dv"),
    ".sldy": Kind("a SlideBook file", FIJI, "bioio-sldy"),
    ".sld": Kind("a SlideBook file", FIJI, BIOFORMATS),
    ".oib .oir": Kind("an Olympus FluoView file", FIJI, BIOFORMATS),
    ".oif": Kind("an Olympus FluoView file, which names the TIFFs in the folder next to it", FIJI, BIOFORMATS),
    ".zvi": Kind("a Zeiss AxioVision file", FIJI, BIOFORMATS),
    ".nd": Kind("a MetaMorph list of files", "name the .stk or .tif files next to it", BIOFORMATS),
    ".xdce": Kind("a list of the TIFFs of an InCell screen", "name the .tif files next to it", BIOFORMATS),
    ".ome": Kind("the metadata of an OME-TIFF in several files", "name one of its .ome.tif files", BIOFORMATS),
    ".xlef": Kind("a Leica project", LAS_X, BIOFORMATS),
    ".xlif": Kind("a part of a Leica project", LAS_X, BIOFORMATS),
    ".ndpis": Kind("a list of Hamamatsu slides, one for each channel", "name its .ndpi files", BIOFORMATS),
    ".vms .vmu": Kind("a Hamamatsu slide in several files", QUPATH),
    ".isyntax": Kind("a Philips slide", "export it as TIFF with the software of the scanner"),
    ".dm3 .dm4": Kind("a DigitalMicrograph file", FIJI, BIOFORMATS),
    ".mrc .rec": Kind("an MRC file of an electron microscope", FIJI, BIOFORMATS),
    ".nii .nii.gz": Kind("a NIfTI file", FIJI, BIOFORMATS),
    ".nrrd": Kind("an NRRD file", FIJI, BIOFORMATS),
    ".mha": Kind("a MetaImage file", "save it as TIFF"),
    ".mhd": Kind("a MetaImage header", "save the image as TIFF"),
    ".ics": Kind("an ICS file", FIJI, BIOFORMATS),
    ".mat": Kind("a MATLAB file", "save the array as TIFF (imwrite) or HDF5 (h5create, h5write)"),
    ".npz": Kind("an archive of NumPy arrays", "save one of them as .npy"),
    ".heic": Kind("an HEIF picture", "save it as PNG or TIFF"),
    ".zip": Kind("an archive", "unpack it"),
    ".gz": Kind("a compressed file", "unpack it"),
    ".roi": Kind("an outline of ImageJ, no image", "draw it into a label image, and save that as TIFF"),
    ".json .xml": Kind("text, no image", "export annotations as label images (PNG or TIFF)"),
    ".geojson": Kind("outlines of QuPath, no image", "export the annotations as label images (PNG or TIFF)"),
    ".csv": Kind("a table, no image", "name images"),
    ".txt": Kind("text, no image", "name images"),
    ".pdf": Kind("a document", "save its image as PNG or TIFF"),
    ".svg": Kind("a drawing", "save it as PNG or TIFF"),
    ".mp4 .avi .mov": Kind("a film", "save it as a TIFF stack with Fiji"),
}
UNREAD = {ending: kind for endings, kind in UNREAD.items() for ending in endings.split()}


def refusal(path: Path, ending: str = "") -> UserError:
    """Refusal of a file that no reader knows, by its name, or another ending that tells what it is."""
    name, kinds = ending or path.name.lower(), ELSEWHERE | UNREAD
    endings = [suffix for suffix in kinds if name.endswith(suffix)]
    if not endings:
        what = "no image of a known format; of a microscope, perhaps, for which bioio has a plug-in"
        return UserError(f"{path}: {what}: check the file, or pip install bioio and that plug-in")
    kind = kinds[max(endings, key=len)]
    plug_in = f", or pip install bioio {kind.package}" if kind.package else ""
    return UserError(f"{path}: {kind.what}; it is not read: {kind.advice}{plug_in}")


CONTENT = {  # bytes from an offset on of files that are named as images and are none
    (0, b"version https://git-lfs"): ("a pointer of Git LFS instead of the file", "git lfs pull"),
    (4, b"ftyphei"): ("an HEIF picture, as phones make them", "save it as PNG or TIFF"),
    (4, b"ftypmif1"): ("an HEIF picture", "save it as PNG or TIFF"),
    (0, b"\xff\x0a"): ("a JPEG XL picture", "save it as PNG or TIFF"),
    (4, b"JXL "): ("a JPEG XL picture", "save it as PNG or TIFF"),
    (0, b"%PDF"): ("a PDF document", "save its image as PNG or TIFF"),
    (0, b"PK\3\4"): ("a zip archive", "unpack it"),
    (0, b"\x1f\x8b"): ("a file compressed by gzip", "unpack it"),
    (0, b"<"): ("text, such as a web page", "download the image itself"),
    (0, b"{"): ("text", "name images"),
}


def check_content(path: Path) -> None:
    """Refuse a file that is named as an image, and whose first bytes are those of something else."""
    with path.open("rb") as file:
        first = file.read(32)
    if not first:
        raise UserError(f"{path}: an empty file: copy it again")
    for (offset, text), (what, advice) in CONTENT.items():
        if first[offset:].startswith(text):
            raise UserError(f"{path}: {what}, no image that is read: {advice}")
