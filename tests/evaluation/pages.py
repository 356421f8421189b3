"""Results of a test made by hand, and their page."""

import numpy as np
import torch
from PIL import Image
from test_ensemble import INFO

from evaluation.fates import ObjectMap, total
from evaluation.pictures import OBJECTS, label_picture, save_images, wrong_pixels
from evaluation.prediction_page import write_prediction_page
from evaluation.results_page import Card, Run, write_index
from images.readers import list_frames
from prediction.predictor import Member, Predictor
from prediction.preview import Preview, _png

SIZE = 64


def scene(number):
    """Input, class indices and probability of class 1: a square of 20 px, found `number` px too far to the right."""
    label = np.zeros((SIZE, SIZE), np.uint8)
    label[16:36, 8:28] = 1
    probability = np.full((SIZE, SIZE), 30, np.uint8)
    probability[16:36, 8 + number : 28 + number] = 200
    return np.full((SIZE, SIZE), 120, np.uint8), label, probability


def run_of(title="unet / em", **changes):
    facts = {"command": "python main.py --mode test", "split": "test"}
    values = {
        "legend": "",
        "facts": facts,
        "checkpoints": [],
        "commands": ["python main.py"],
        "flags": {},
        "charts": {},
    }
    return Run(title=title, **values | changes)


def summary_of(classes=("background", "cell"), background="background", mean=None):
    two = len(classes) == 2
    return {
        "classes": {name: number for number, name in enumerate(classes)},
        "foreground": next(name for name in classes if name != background) if two else None,
        "background": background,
        "pixel_threshold": 0.5 if two else None,
        "segment_threshold": 0.7 if two else None,
        "mean": mean or {"loss": 0.2, "pixel_error": 0.05, "dice_cell": 0.9},
        "objects": None,
        "majority_class": background,
        "majority": {"pixel_error": 0.1},
    }


def write_two_classes(folder, num=3, *, background="background", charts=None, **changes):
    """Page of images of two classes, of which number k is k px off; the last one is partly annotated."""
    cards = []
    for number in range(num):
        pixels, label, probability = scene(number % 9)
        valid = np.arange(SIZE) < (40 if number == num - 1 else SIZE)
        valid = np.broadcast_to(valid, label.shape)
        objects = ObjectMap(label.shape)
        objects.add(label, (probability > 178).astype(np.uint8))
        pictures = {"input": pixels, "label": label_picture(label, 2, valid), "output": probability}
        pictures[OBJECTS] = objects.picture
        save_images(folder / "images", number, pictures)
        is_inverted = background == "cell"
        inside, output = (label == 0, 255 - probability) if is_inverted else (label == 1, probability)
        wrong = wrong_pixels(inside, output, valid)
        error = wrong[127] / valid.sum()
        scores = {"loss": 0.1 + 0.1 * (number % 2), "pixel_error": error, "dice_cell": 1 - error}
        card = Card(f"{number:04d}", f"{number:05d}.npy", label.shape, scores, f"cell_{'abc'[number % 3]}{number}.tif")
        changed = {
            "wrong": wrong,
            "annotated": float(valid.mean()),
            "objects": objects.counts,
            "pixel_size": None if number else (0.5, 0.5),
        } | changes
        cards.append(Card(**vars(card) | changed))
    summary = summary_of(background=background) | {"objects": total([card.objects for card in cards])}
    write_index(folder, folder, run_of(charts=charts or {}), summary, cards)
    return (folder / "index.html").as_uri()


def write_three_classes(folder, annotated=SIZE):
    """Page of one image with a nucleus in a cell, of which the output takes a half for cell.

    The first columns, so many, are annotated.
    """
    label = np.zeros((SIZE, SIZE), np.uint8)
    label[8:56, 8:56] = 1
    label[20:40, 20:40] = 2
    output = label.copy()
    output[20:40, 30:40] = 1
    output[8:56, 48:56] = 0
    pixels = np.full((SIZE, SIZE), 120, np.uint8)
    valid = np.broadcast_to(np.arange(SIZE) < annotated, label.shape)
    pictures = {"label": label_picture(label, 3, valid), "output": label_picture(output, 3)}
    save_images(folder / "images", 0, {"input": pixels} | pictures)
    names = ("background", "cell", "nucleus")
    summary = summary_of(names) | {
        "confusion_matrix": {"names": list(names), "counts": [[9, 1, 0], [1, 8, 1], [0, 5, 5]]}
    }
    card = Card("0000", "00000.npy", label.shape, {"pixel_error": 0.1}, annotated=annotated / SIZE)
    write_index(folder, folder, run_of(), summary, [card])
    return (folder / "index.html").as_uri()


def write_unlabelled(folder):
    """Page of one image of two classes without a label."""
    pixels, _, probability = scene(0)
    save_images(folder / "images", 0, {"input": pixels, "output": probability})
    summary = summary_of() | {"mean": {}, "majority": {}}
    write_index(folder, folder, run_of(), summary, [Card("0000", "00000.npy", pixels.shape, {})])
    return (folder / "index.html").as_uri()


def write_prediction(folder):
    """Page of a prediction of two images, the second of which is the more uncertain; each has a square outlined."""
    pixels, label, _ = scene(0)
    palette = np.full((256, 3), (230, 159, 0), np.uint8)
    for k in range(2):
        Image.fromarray(pixels).save(folder / f"a_very_long_name_of_an_image_{k}.png")
    frames = list_frames(str(folder))
    previews = [
        Preview(
            k, pixels.shape, 0.1 + 0.5 * k, _png(pixels), _png(label, palette), np.ones(k + 1, int), np.full(k + 1, 400)
        )
        for k in (1, 0)
    ]
    network = Predictor((Member(torch.nn.Identity(), INFO),), 0.5, torch.device("cpu"), background=0)
    write_prediction_page(folder / "index.html", previews, frames, network, {"command": "python main.py"})
    return (folder / "index.html").as_uri()
