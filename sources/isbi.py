"""Download of the ISBI 2012 challenge's EM stack."""

from __future__ import annotations

import hashlib
import shutil
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
from tqdm import tqdm

from files import make_folder, publish
from images.readers import forget_files, list_frames
from utils import UserError, echo

URL = "https://downloads.imagej.net/ISBI-2012-challenge.zip"
PIXELS = {  # SHA-256 of the pixels, (30, 512, 512) uint8 in C order
    "train-volume.tif": "200da3d452d726e6c9ca1ce04b869d4edb727320d23b516d01cce707dc8c4760",
    "train-labels.tif": "a7cb64000a1a7e542682927e19c91339f58f9f178e0bcce4e207371116f0ca36",
    "test-volume.tif": "1b58fa7ec1d0ff9d39a855622db3ff66a97863036339b0d04be51b2f5a99b0e9",
}
MAX_BYTES = 2**26  # largest stack in the zip; those of the challenge have 8 MB
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)  # the last: a newer version of zip
TERMS = (
    "ISBI 2012 EM stack: free to use for the purpose of generating or testing non-commercial image segmentation\n"
    "software; publications cite TrakEM2 and Cardona et al. 2010, PLoS Biology 8(10):e1000502."
)


def download(folder: Path, url: str = "") -> None:
    """Download the challenge's zip, by default from `URL`, and put its stacks into a folder once all are verified."""
    echo(TERMS)
    url, temporary = url or URL, folder / ".isbi"
    make_folder(temporary)
    try:
        _fetch(url, temporary / "zip")
        with zipfile.ZipFile(temporary / "zip") as zipped:
            for name, expected in PIXELS.items():
                _extract(zipped, name, temporary / name, url)
                if pixel_hash(temporary / name) != expected:
                    what = f"{name} is not the challenge's stack (the SHA-256 of its pixels differs)"
                    raise UserError(f"{url}: {what}: nothing is saved: check --url")
        for name in PIXELS:
            publish(temporary / name, folder / name)
    except DAMAGED as error:
        raise UserError(f"{url}: not a valid zip ({error}): run the command again, or check --url") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fetch(url: str, path: Path) -> None:
    """Save what a URL holds in a file, with a progress bar."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer, path.open("wb") as file:
            size = int(answer.headers.get("Content-Length", 0))
            with tqdm.wrapattr(file, "write", total=size or None, desc="download", disable=None) as counted:
                shutil.copyfileobj(answer, counted)
        if path.stat().st_size < size:
            raise OSError(f"the connection broke at {path.stat().st_size} of {size} bytes")
    except (OSError, ValueError, HTTPException) as error:  # the last two: not a URL, not HTTP
        raise UserError(f"can't download {url}: {error}: check the network, then run the command again") from error


def _extract(zipped: zipfile.ZipFile, name: str, path: Path, url: str) -> None:
    """Unpack a file, in whichever folder of the archive it is."""
    members = [member for member in zipped.infolist() if Path(member.filename).name.lower() == name]
    if not members:
        raise UserError(f"{url}: no {name} in the zip, only {', '.join(zipped.namelist()[:9])}: check --url")
    member = members[0]
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"{name} is encrypted, or not compressed by deflate")
    if member.file_size > MAX_BYTES:
        size = f"{member.file_size / 1e6:.0f} MB"
        raise UserError(f"{url}: {name} unpacks to {size}, the challenge's stack has 8 MB: check --url")
    with zipped.open(member) as source, path.open("wb") as file:
        shutil.copyfileobj(source, file)


def pixel_hash(path: Path) -> str:
    """SHA-256 of the pixels of a stack, (N, H, W) in C order."""
    digest = hashlib.sha256()
    for frame in list_frames(path):
        digest.update(np.ascontiguousarray(frame.read()).data)
    forget_files()  # Windows can't rename a memory-mapped file
    return digest.hexdigest()


def is_there(folder: Path) -> bool:
    """Whether a folder contains the challenge's stacks already."""
    return all((folder / n).is_file() and pixel_hash(folder / n) == pixels for n, pixels in PIXELS.items())
