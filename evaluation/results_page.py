"""The page of a test, `index.html`, from the template in `templates/`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from evaluation.curves import Chart
from evaluation.fates import counts_text
from evaluation.pictures import (
    COLOURS,
    COLOURS_OF_SEVERAL,
    FATES,
    KINDS,
    NOT_ANNOTATED,
    OBJECTS,
    palette,
    picture_name,
)
from evaluation.tables import LOW_IS_GOOD, Scores, columns, main_scores, meaning_of, sorting_score
from utils import printable, shortened

TEMPLATES = Path(__file__).parent / "templates"
MAIN = ("loss", "pixel_error", "dice_", "v_rand", "v_info", "object_f1")  # what the scores begin with that stand first
DIRECTIONS = ("worst first", "best first")


@dataclass(frozen=True)
class Card:
    """An image as the page shows it."""

    image: str  # its number
    sample: str  # name of its sample
    shape: tuple[int, int]  # height and width [px]
    scores: Scores  # empty without a label
    name: str = ""  # of the original file; empty if it is not known
    pixel_size: tuple[float, float] | None = None  # height and width of a pixel [µm]
    wrong: list[int] = field(default_factory=list)  # `wrong_pixels`; empty with more than two classes
    annotated: float = 1.0  # fraction of its pixels
    objects: dict[str, int] = field(default_factory=dict)  # counts of `ObjectMap`

    @property
    def title(self) -> str:
        """Name of the original file, otherwise of the sample."""
        return printable(self.name or self.sample)

    @property
    def short(self) -> str:
        """The title on one line."""
        return shortened(self.title)

    def about(self, *, has_label: bool) -> str:
        """Line below the scores."""
        text = f"image {self.image}, {self.sample}, {self.shape[0]} x {self.shape[1]} px"
        if self.annotated < 1:
            text += f", {100 * self.annotated:.1f} % annotated"
        return text if self.scores else f"{text}, {'not annotated' if has_label else 'no label'}"

    @property
    def scale_bar(self) -> tuple[float, str] | None:
        """Length in percent of the width, and text, of a bar of a round length; None without a pixel size."""
        if self.pixel_size is None:
            return None
        width = self.shape[1] * self.pixel_size[1]
        length = round_below(width / 4)
        return 100 * length / width, with_unit(length)


@dataclass(frozen=True)
class Run:
    """How a test was made."""

    title: str  # name of the networks and of the database
    legend: str  # text with the classes and thresholds
    facts: dict[str, Any]  # names and values of the command
    checkpoints: list[tuple[str, Path]]  # name and file of each
    commands: list[str]  # of each training, with the flags that differ from their defaults
    flags: dict[str, Any]  # all flags of the training as typed, and their values
    charts: dict[str, list[Chart]]  # training curves of each network
    hints: list[str] = field(default_factory=list)  # what the scores show, and what to do


def round_below(value: float) -> float:
    """Greatest of 1, 2, 5, 10, ... and their decimal fractions up to a positive value.

    >>> [round_below(value) for value in (0.07, 4.9, 5, 130)]
    [0.05, 2.0, 5.0, 100.0]
    """
    power = 10.0 ** np.floor(np.log10(value) + 1e-9)
    return max(float(f"{step * power:.6g}") for step in (1, 2, 5) if step * power <= value * (1 + 1e-9))


def with_unit(micron: float) -> str:
    """Length in nm, µm or mm.

    >>> with_unit(0.05), with_unit(20.0), with_unit(2000.0)
    ('50 nm', '20 µm', '2 mm')
    """
    unit, size = ("nm", 1e3) if micron < 1 else ("µm", 1) if micron < 1000 else ("mm", 1e-3)
    return f"{micron * size:g} {unit}"


def write_index(folder: Path, target: Path, run: Run, summary: dict[str, Any], cards: Sequence[Card]) -> None:
    """Write `index.html`, which needs nothing but the pictures next to it, in a folder that becomes `target` later."""
    names = columns(card.scores for card in cards)
    pictures = {card.image: picture_links(folder, card) for card in cards}
    by = sorting_score(card.scores for card in cards)
    data = _data(summary, cards, pictures, by)
    baselines = {f"all {summary['majority_class']}": summary["majority"], "Otsu": summary.get("baseline_otsu")}
    page = render(
        "index.html",
        title=run.title,
        layers="veil errors label-line output-line",
        run=run,
        summary=summary,
        baselines={name: scores for name, scores in baselines.items() if scores},
        cards=sorted(cards, key=lambda card: card.scores.get(by, -np.inf), reverse=True),
        names=names,
        mean_names=columns([summary["mean"]]),
        main_means=main_scores([summary["mean"]])[0],
        fewer=summary.get("scored_images", {}),
        partial=any(card.annotated < 1 for card in cards),
        checkpoints=[(name, link_to(path, target)) for name, path in run.checkpoints],
        pictures=pictures,
        classes=data["classes"],
        thresholds={kind: _in_8_bits(summary[f"{kind}_threshold"]) for kind in ("pixel", "segment")},
        data=data,
    )
    (folder / "index.html").write_text(page, "utf-8", "backslashreplace")


def render(template: str, **values: Any) -> str:
    """A template with the style and script of all pages, and the values of the page."""
    page, style, script = load_template(template)
    return page.render(style=style, script=script, **values)


@cache
def load_template(name: str) -> tuple[Template, Markup, Markup]:
    """A template, and the style and script of all pages."""
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    # without blanks, since there may be many numbers, and keys in their order
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    style, script = (Markup((TEMPLATES / name).read_text("utf-8")) for name in ("style.css", "script.js"))
    return environment.get_template(name), style, script


def class_legend(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Name of each class, its colour in the pictures as `#rrggbb`, and whether it is the background."""
    names = list(summary["classes"])
    colours = [[0] * 3, [255] * 3] if len(names) == 2 else palette(len(names)).tolist()
    return [
        {"name": printable(name), "colour": "#" + bytes(colour).hex(), "background": name == summary["background"]}
        for name, colour in zip(names, colours, strict=True)
    ]


def picture_links(folder: Path, card: Card) -> dict[str, str]:
    """Address of each picture of an image that there is."""
    names = {kind: f"images/{picture_name(card.image, kind)}" for kind in (*KINDS, OBJECTS)}
    return {kind: name for kind, name in names.items() if (folder / name).exists()}


def link_to(path: Path, target: Path) -> str:
    """Address of a file, relative to a folder where both are on one drive."""
    try:
        return quote(Path(os.path.relpath(path.resolve(), target.resolve())).as_posix())
    except ValueError:  # Windows, on another drive
        return path.resolve().as_uri()


def _in_8_bits(threshold: float | None) -> int | None:
    """Value of a picture above which a probability is above a threshold."""
    return None if threshold is None else min(254, int(255 * threshold))


def _data(
    summary: dict[str, Any], cards: Sequence[Card], pictures: dict[str, dict[str, str]], by: str
) -> dict[str, Any]:
    """Values for the script."""
    colours = COLOURS if len(summary["classes"]) == 2 else COLOURS_OF_SEVERAL
    return {
        "classes": class_legend(summary),
        "colours": {name: f"#{bytes(colour).hex()}" for name, colour in colours.items()},
        "notAnnotated": NOT_ANNOTATED,
        "threshold": _in_8_bits(summary["pixel_threshold"]),
        "fates": {name: f"#{bytes(colour).hex()}" for name, colour in FATES.items()},
        "lowIsGood": LOW_IS_GOOD,
        "meanings": {name: meaning_of(name) for name in columns([summary["mean"], *(card.scores for card in cards)])},
        "mainScores": MAIN,
        "directions": DIRECTIONS,
        "sortedBy": by,
        "images": {
            card.image: {
                "title": card.title,
                "short": card.short,
                "objects": f"objects: {counts_text(card.objects)}" if card.objects else "",
                "about": card.about(has_label="label" in pictures[card.image]),
                "height": card.shape[0],
                "width": card.shape[1],
                "pixelSize": card.pixel_size and card.pixel_size[1],
                "scores": card.scores,
                "wrong": card.wrong,
                "valid": round(card.shape[0] * card.shape[1] * card.annotated),
            }
            for card in cards
        },
    }
