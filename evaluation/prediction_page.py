"""The page of a prediction, `index.html`: images with the outlines of their objects, the most uncertain ones first."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.curves import ticks
from evaluation.results_page import Card, render
from files import atomic_write
from images.readers import Frame, geometries_of
from images.writers import PREDICTED
from prediction.predictor import Predictor
from prediction.preview import Preview
from utils import printable

MEANINGS = {
    "uncertainty": "mean entropy of the probability: 0 is certain, 1 is as likely one class as another",
    "objects": "number of objects in the image",
    "median_area": "median area of the objects [px]",
}
WIDTH, HEIGHT, NUM_BIN = 460, 130, 24  # [px] of the histogram, and its bars


def write_prediction_page(
    path: Path, previews: list[Preview], frames: list[Frame], predictor: Predictor, facts: dict[str, str]
) -> None:
    """Write `index.html`, which needs no other file, of the previews in their order; the last may have no pictures."""
    shown, names = [each for each in previews if each.picture], predictor.info.class_names
    cards = {each.frame: _card(each, frames[each.frame]) for each in shown}
    classes = np.concatenate([each.classes for each in previews])
    counts = {
        names[k]: int((classes == k).sum()) for k in range(len(names)) if k != predictor.background and len(classes)
    }
    area = np.concatenate([each.area for each in previews])
    page = render(
        "prediction.html",
        title="Prediction",
        generator=PREDICTED,
        layers="objects",
        facts=facts,
        num=len(previews),
        cards=list(cards.values()),
        names=["uncertainty", *(["objects", "median_area"] if len(area) else [])],
        counts=counts,
        histogram=_histogram(area) if len(area) else None,
        pictures={
            cards[each.frame].image: {"input": _address(each.picture), "objects": _address(each.outlines)}
            for each in shown
        },
        data=_data(shown, cards),
    )
    with atomic_write(path, "w") as file:
        file.write(page)


def _card(preview: Preview, frame: Frame) -> Card:
    """An image as the page shows it."""
    scores: dict[str, float] = {"uncertainty": preview.uncertainty}
    if len(preview.area):
        scores |= {"objects": len(preview.area), "median_area": float(np.median(preview.area))}
    pixel_size = geometries_of([frame])[0].pixel_size
    return Card(f"{preview.frame:04d}", "", preview.shape, scores, printable(frame.name), pixel_size)


def _data(shown: list[Preview], cards: dict[int, Card]) -> dict[str, Any]:
    """Values for the script."""
    images = {}
    for each in shown:
        card = cards[each.frame]
        images[card.image] = {
            "title": card.title,
            "short": card.short,
            "objects": "",
            "about": f"image {each.frame + 1}, {card.shape[0]} x {card.shape[1]} px",
            "height": card.shape[0],
            "width": card.shape[1],
            "pixelSize": card.pixel_size and card.pixel_size[1],
            "scores": card.scores,
            "wrong": [],
            "valid": card.shape[0] * card.shape[1],
        }
    return {
        "classes": [],
        "colours": {"label": "#000000", "output": "#000000"},  # the script outlines nothing: the pictures have outlines
        "notAnnotated": 128,
        "threshold": None,
        "counts": ["objects"],  # scores that are whole numbers
        "lowIsGood": list(MEANINGS),
        "meanings": MEANINGS,
        "mainScores": list(MEANINGS),
        "directions": ("highest first", "lowest first"),
        "sortedBy": "uncertainty",
        "images": images,
    }


def _histogram(area: np.ndarray) -> dict[str, Any]:
    """Bars and ticks of the histogram of the areas [px], without the largest hundredth in an SVG."""
    high = float(np.percentile(area, 99)) + 1
    counts, edges = np.histogram(area, NUM_BIN, (0, high))
    scale = WIDTH / high
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "bars": [
            (
                f"{left * scale:.1f}",
                f"{HEIGHT * (1 - count / counts.max()):.1f}",
                f"{HEIGHT * count / counts.max():.1f}",
            )
            for left, count in zip(edges, counts.tolist(), strict=False)
        ],
        "bar": f"{WIDTH / NUM_BIN - 1:.1f}",
        "ticks": [(f"{tick * scale:.1f}", text) for tick, text in ticks(0, high)],
        "above": int((area > high).sum()),
        "median": float(np.median(area)),
    }


def _address(png: bytes) -> str:
    """Address that holds a PNG itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
