"""The page of a database, `index.html`: pairs of images and labels, classes, grey values, and what looks wrong."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from description import DataInfo, sample_origins
from evaluation.results_page import render
from evaluation.review import Review, Sample, review
from images.drawing import input_picture, outlines, overlay_picture, palette, picture_range
from samples import IGNORE, SampleFile
from utils import spread

NUM_DRAWN = 96  # samples, of all splits together
SIDE = 320  # [px] of a picture, at most
OUTLINE = (230, 159, 0)  # of the foreground of two classes
VEIL = 128  # grey of pixels that are not annotated
WIDTH, HEIGHT = 460, 150  # [px] of the histogram


@dataclass(frozen=True)
class Pair:
    """A sample as the page shows it."""

    title: str
    about: str
    picture: str  # address of the image with the outlines of its label
    label: str  # address of the label in colours; empty without one


def show_database(folder: Path, info: DataInfo, files: dict[str, list[Path]], notes: list[str]) -> list[str]:
    """Write the page of a database that was just made, and return what looks wrong: the notes, and what it finds."""
    found = review(info, files, partial(sample_origins, folder), notes)
    write_database_page(folder, found, _facts(info, found))
    return found.warnings


def _facts(info: DataInfo, found: Review) -> dict[str, str]:
    """What the images are, in words."""
    shapes = sorted({sample.shape for samples in found.samples.values() for sample in samples})
    sides = [f"{height} x {width}" for height, width in shapes[:5]]
    facts = {"height and width [px]": ", ".join(sides) + (" ..." if len(shapes) > 5 else "")}
    facts["channels"] = str(info.num_own) + (f", with {info.context} sections on each side" if info.context else "")
    profile = info.profile
    if profile:
        ranges = [f"{low:.4g} to {high:.4g}" for low, high in zip(profile.low, profile.high, strict=True)]
        facts["channels"] += f": {', '.join(profile.channels)}" if profile.channels else ", names unknown"
        facts["type"] = ", ".join(profile.dtypes) + (", grey saved as colour" if profile.is_grey else "")
        facts["type"] += ", the indices of a palette of colours" if profile.is_indexed else ""
        facts["grey values in use"] = "; ".join(ranges)
        size = " x ".join(f"{side:.4g}" for side in profile.pixel_size)
        facts["pixel size"] = f"{size} µm" if size else "unknown: the files give none"
    return facts


def write_database_page(folder: Path, found: Review, facts: dict[str, str]) -> None:
    """Write `index.html` into the folder of a database; it needs no other file."""
    num = max(NUM_DRAWN // max(len(found.samples), 1), 1)
    pairs = {
        split: [_pair(found.info, samples[n]) for n in spread(len(samples), num)]
        for split, samples in found.samples.items()
    }
    page = render(
        "database.html",
        facts=facts,
        warnings=found.warnings,
        classes=_classes(found),
        splits={split: len(samples) for split, samples in found.samples.items()},
        annotated={split: found.annotated(split) for split in found.samples if found.shares(split)},
        histogram=_histogram(found),
        pairs=pairs,
        partial=found.info.is_partial,
    )
    (folder / "index.html").write_text(page, "utf-8", "backslashreplace")


def colours_of(info: DataInfo) -> np.ndarray:
    """Colour (K, 3) of each class on the page."""
    return np.array([(0, 0, 0), OUTLINE], np.uint8) if info.num_class == 2 else palette(max(info.num_class, 1))


def _pair(info: DataInfo, sample: Sample) -> Pair:
    """Pictures of a sample, at most `SIDE` px wide and high."""
    image, label = SampleFile(sample.file).open()
    step = max(math.ceil(max(sample.shape) / SIDE), 1)
    pixels = np.asarray(image[::step, ::step, info.own_channels])
    picture = input_picture(pixels, picture_range(pixels))
    height, width = sample.shape
    about = f"{height} x {width} px"
    if label is None:
        return Pair(sample.name, about, _address(picture), "")
    classes = np.asarray(label[::step, ::step])
    valid, colours = classes != IGNORE, colours_of(info)
    classes = np.where(valid, classes, 0)
    drawn = overlay_picture(picture, outlines(classes), colours[classes])
    drawn[~valid] = drawn[~valid] // 2 + VEIL // 2
    flat = np.where(valid[..., None], colours[classes], VEIL).astype(np.uint8)
    return Pair(sample.name, about, _address(drawn), _address(flat))


def _address(picture: np.ndarray) -> str:
    """Address that holds a picture itself, as a PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _classes(found: Review) -> list[dict[str, Any]]:
    """Row of each class: colour, name, value in the labels, share in each split, number and size of its objects."""
    info, rows = found.info, []
    shares = {split: found.shares(split) for split in found.samples}
    for k in range(info.num_class):
        areas = found.areas(k) if k else np.zeros(0)
        size = [int(value) for value in np.percentile(areas, (5, 50, 95))] if len(areas) else []
        rows.append(
            {
                "name": info.class_names[k],
                "value": info.class_values[k],
                "colour": "#" + bytes(colours_of(info)[k]).hex(),
                "background": k == 0,
                "shares": {split: of_split[k] for split, of_split in shares.items() if of_split},
                "num_object": len(areas) or "",
                "size": size,
            }
        )
    return rows


def _histogram(found: Review) -> dict[str, Any]:
    """Points of the lines of the histogram in an SVG, with the least and the greatest grey value below."""
    edges, lines = found.histogram()
    top = max(line.max() for line in lines) or 1
    points = [
        " ".join(
            f"{n / (len(line) - 1) * WIDTH:.1f},{HEIGHT - value / top * (HEIGHT - 5):.1f}"
            for n, value in enumerate(line)
        )
        for line in lines
    ]
    names = found.info.class_names or ["all pixels"]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "lines": [{"name": name, "points": each} for name, each in zip(names, points, strict=True)],
        "low": f"{edges[0]:.4g}",
        "high": f"{edges[-1]:.4g}",
    }
