"""Download of the ISBI 2012 challenge's EM stack."""

from __future__ import annotations

import hashlib
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from http.client import HTTPResponse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from files import make_folder, publish
from images.readers import forget_files, list_frames
from utils import UserError, echo

MAX_BYTES = 2**26  # largest stack in the zip; those of the challenge have 8 MB
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)  # the last: a newer version of zip
PIXELS = {  # SHA-256 of the pixels, (30, 512, 512) uint8 in C order
    "train-volume.tif": "200da3d452d726e6c9ca1ce04b869d4edb727320d23b516d01cce707dc8c4760",
    "train-labels.tif": "a7cb64000a1a7e542682927e19c91339f58f9f178e0bcce4e207371116f0ca36",
    "test-volume.tif": "1b58fa7ec1d0ff9d39a855622db3ff66a97863036339b0d04be51b2f5a99b0e9",
}
TERMS = (
    "ISBI 2012 EM stack: free to use for the purpose of generating or testing non-commercial image segmentation\n"
    "software; publications cite TrakEM2 and Cardona et al. 2010, PLoS Biology 8(10):e1000502."
)


def download(folder: Path, url: str) -> None:
    """Download the challenge's zip, and extract its stacks into a folder.

    Parameters
    ----------
    folder : Path
        Folder of the TIFF files. An interrupted download remains there as `.download` and is resumed.
    url : str
        URL of the zip.

    Raises
    ------
    UserError
        The URL can't be reached, or a file is missing or differs from the known one.
    """
    echo(TERMS)
    archive, unpacked = folder / ".download", folder / ".unpacked"
    fetch(url, archive)
    try:
        unpacked.mkdir(exist_ok=True)
        with zipfile.ZipFile(archive) as zipped:
            for name in PIXELS:
                _extract(zipped, name, unpacked / name, url)
        for name, expected in PIXELS.items():
            if pixel_hash(unpacked / name) != expected:
                what = f"{name} is not the known stack (the SHA-256 of its pixels differs)"
                raise UserError(f"{url}: {what}: nothing was kept")
        for name in PIXELS:
            publish(unpacked / name, folder / name)
    except DAMAGED as error:
        raise UserError(f"{url}: not a valid zip ({error}): the download was removed, run the command again") from error
    finally:  # a complete but wrong file must not be resumed
        shutil.rmtree(unpacked, ignore_errors=True)
        archive.unlink()


def fetch(url: str, path: Path) -> None:
    """Download a file with a progress bar; resume an incomplete one.

    Raises
    ------
    UserError
        The URL can't be reached, or the connection breaks; the incomplete file is kept.
    """
    start = path.stat().st_size if path.exists() else 0
    try:
        with _open(url, start) as answer:
            start = start if answer.status == 206 else 0
            size = int(answer.headers.get("Content-Length", 0)) + start
            make_folder(path.parent)
            with (
                path.open("ab" if start else "wb") as file,
                tqdm(
                    total=size or None, initial=start, unit="B", unit_scale=True, desc="download", disable=None
                ) as bar,
            ):
                while block := answer.read(1 << 16):
                    file.write(block)
                    bar.update(len(block))
        if size and path.stat().st_size < size:
            raise OSError(f"the connection broke at {path.stat().st_size} of {size} bytes")
    except (OSError, ValueError) as error:  # ValueError: not a URL
        raise UserError(f"can't download {url}: {error}: check the network, then run the command again") from error


def _open(url: str, start: int) -> HTTPResponse:
    """Response with a file from byte `start` on, or with all of it if the server refuses that range."""
    if start:
        try:
            return urllib.request.urlopen(urllib.request.Request(url, headers={"Range": f"bytes={start}-"}), timeout=30)
        except urllib.error.HTTPError as error:
            if error.code != 416:  # 416: the partial file is as long as the file, or longer
                raise
    return urllib.request.urlopen(url, timeout=30)


def _extract(zipped: zipfile.ZipFile, name: str, target: Path, url: str) -> None:
    """Unpack a file, wherever it is in the archive."""
    members = [member for member in zipped.namelist() if Path(member).name.lower() == name]
    if not members:
        raise UserError(f"{url}: no {name} in the zip, only {', '.join(zipped.namelist()[:9])}")
    info = zipped.getinfo(members[0])
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"{name} is encrypted, or not compressed by deflate")
    if info.file_size > MAX_BYTES:
        raise UserError(
            f"{url}: {name} unpacks to {info.file_size / 1e6:.0f} MB, the known stack has 8 MB: check --url"
        )
    with zipped.open(members[0]) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


def pixel_hash(path: Path) -> str:
    """SHA-256 of the pixels of a stack, (N, H, W) in C order."""
    digest = hashlib.sha256()
    for frame in list_frames(path):
        digest.update(np.ascontiguousarray(frame.read()).data)
    forget_files()  # Windows can't rename a memory-mapped file
    return digest.hexdigest()
