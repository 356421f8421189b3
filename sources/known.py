"""The samples of a database that is there, found by the pixels of their images."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from description import DataInfo, find_description, load_info
from progress import tracked
from rules import is_integer, is_list, is_table
from samples import SPLITS, SampleFile, digest_of, is_database, list_samples
from utils import UserError, folder_hint

Window = tuple[slice, slice]  # rows and columns of an image


class Place(NamedTuple):
    """Where an image is in a database, or a part of it."""

    split: str
    file: SampleFile
    window: Window  # of the image that is the sample

    def __str__(self) -> str:
        return f"{self.split} {self.file.input.stem}"


@dataclass(frozen=True)
class Known:
    """A database that is there."""

    info: DataInfo
    entries: dict[str, Any]  # of its dataset.json
    files: dict[str, list[SampleFile]]
    places: dict[bytes, list[Place]]  # by the hash of the pixels
    windows: dict[str, Window]  # of all places, each once
    first_rows: set[tuple[str, bytes]]  # window and hash of the first row of each sample: quicker to look for

    @classmethod
    def load(cls, folder: Path) -> Known:
        """Read all samples of a database."""
        path = find_description(folder)
        files = {s: list_samples(folder / s) if any((folder / s).glob("*.npy")) else [] for s in SPLITS}
        if path is None and not any(files.values()):
            hint = folder_hint(folder, ("--name_data",), is_database)
            raise UserError(f"{folder}: no database there: {hint}check --dir_data and --name_data")
        if path is None or any(not file.input.stem.isdecimal() for of in files.values() for file in of):
            raise UserError(f"{folder}: a database of pytorch-UNET's layout: make it with this program")
        if not any(files.values()):
            raise UserError(f"{folder}: its samples are gone: make the database again with --overwrite")
        info, entries = load_info(folder), json.loads(path.read_text("utf-8"))
        rules = {
            "samples": lambda of: is_table(of, lambda entries: is_list(entries, is_table)),
            "sources": lambda of: is_list(of, lambda entry: is_table(entry) and {"name", "sha256"} <= entry.keys()),
        }
        if damaged := [name for name, rule in rules.items() if name in entries and not rule(entries[name])]:
            raise UserError(f"{path}: {damaged[0]} is damaged: make the database again with --overwrite")
        places: dict[bytes, list[Place]] = defaultdict(list)
        first_rows = set()
        for split in SPLITS:
            windows = {str(entry.get("file")): _window(entry) for entry in entries.get("samples", {}).get(split, [])}
            for file in tracked(files[split], f"read, {split}"):
                place = Place(split, file, windows.get(file.input.name, _window({})))
                image = file.open()[0][..., info.own_channels]
                places[digest_of(image)].append(place)
                first_rows.add((repr(place.window), digest_of(image[:1])))
        windows = {repr(place.window): place.window for of in places.values() for place in of}
        return cls(info, entries, files, dict(places), windows, first_rows)

    def find(self, image: np.ndarray) -> list[Place]:
        """Samples that are an image (H, W, C) of one section, or a region of it."""
        found: list[Place] = []
        for name, window in self.windows.items():
            part = image[window]
            if (name, digest_of(part[:1])) in self.first_rows:
                found += [place for place in self.places.get(digest_of(part), []) if place.window == window]
        return found


def _window(entry: dict[str, Any]) -> Window:
    """Region that a sample is of its image, as its entry in the description tells it; all of it without one."""
    sides = (entry.get(name) for name in ("rows", "columns"))
    rows, columns = (slice(*side) if side and is_list(side, is_integer, 2) else slice(None) for side in sides)
    rows, columns = (side if side.stop is None else slice(side.start, side.stop + 1) for side in (rows, columns))
    return rows, columns
