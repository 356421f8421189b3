"""Download of the ISBI 2012 challenge's EM stack."""

from __future__ import annotations

import hashlib
import lzma
import shutil
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
from tqdm import tqdm

from files import explain_write_errors, make_folder, publish
from images.readers import forget_files, list_frames
from images.rows import listed
from utils import UserError, echo

URL = "https://downloads.imagej.net/ISBI-2012-challenge.zip"
PIXELS = {  # SHA-256 of the pixels, (30, 512, 512) uint8 in C order
    "train-volume.tif": "200da3d452d726e6c9ca1ce04b869d4edb727320d23b516d01cce707dc8c4760",
    "train-labels.tif": "a7cb64000a1a7e542682927e19c91339f58f9f178e0bcce4e207371116f0ca36",
    "test-volume.tif": "1b58fa7ec1d0ff9d39a855622db3ff66a97863036339b0d04be51b2f5a99b0e9",
}
# what zipfile raises: RuntimeError for a password or an unknown compression, OSError for damaged bzip2
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError)
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
            member_of = {Path(member).name.lower(): member for member in zipped.namelist()}  # in whichever folder
            for name, expected in PIXELS.items():
                if name not in member_of:
                    raise UserError(f"{url}: no {name} in the zip, only {listed(zipped.namelist(), 9)}: check --url")
                content = zipped.read(member_of[name])
                with explain_write_errors(folder):
                    (temporary / name).write_bytes(content)
                if pixel_hash(temporary / name) != expected:
                    what = f"{name} is not the challenge's stack (the SHA-256 of its pixels differs)"
                    raise UserError(f"{url}: {what}: nothing is saved: check --url")
        with explain_write_errors(folder):
            for name in PIXELS:
                publish(temporary / name, folder / name)
    except DAMAGED as error:
        raise UserError(f"{url}: can't be unpacked ({error}): run the command again, or check --url") from error
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
