"""What a person looks at: pictures, index.html, score tables, the progress of a training, its curves."""

from __future__ import annotations

import colorsys
import csv
import html
import io
import json
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from files import atomic_write
from utils import printable, say

Pictures = dict[str, np.ndarray]  # kind -> (H, W) or (H, W, 3) uint8
Scores = dict[str, float]  # name of a score -> value
MAIN_SCORES = ("image", "loss", "pixel_error"), ("v_rand", "v_info", "object_f1")  # before and after those of Dice
KINDS = ("input", "label", "output")
RESULTS = ["images", "index.html", "metrics.json", "metrics.csv"]  # of a test, replaced together


def palette(num_class: int) -> np.ndarray:
    """Fixed colours of the classes, (num_class, 3) uint8; class 0 is black, the next seven are told apart by all.

    Source of the first eight: Wong 2011, doi 10.1038/nmeth.1618; further hues go by the golden ratio.

    Examples
    --------
    >>> palette(2).tolist()
    [[0, 0, 0], [230, 159, 0]]
    """
    wong = ["000000", "e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7"]
    colours = [tuple(bytes.fromhex(colour)) for colour in wong]
    for k in range(len(wong), num_class):
        rgb = colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.5 + 0.5 * (k % 2), 0.95)
        colours.append(tuple(round(255 * value) for value in rgb))
    return np.array(colours[:num_class], np.uint8)


def label_picture(label: np.ndarray, num_class: int) -> np.ndarray:
    """Picture of class indices (H, W): 0 and 255 for two classes, colours (H, W, 3) for more.

    Examples
    --------
    >>> label_picture(np.array([[0, 1]]), 2).tolist()
    [[0, 255]]
    """
    return (label * 255).astype(np.uint8) if num_class == 2 else palette(num_class)[label]


def probability_picture(probability: np.ndarray) -> np.ndarray:
    """Picture of the probabilities (K, H, W) of K classes: of class 1 in 8 bits, or of the likeliest of more."""
    if len(probability) == 2:
        return np.round(probability[1] * 255).astype(np.uint8)
    return label_picture(probability.argmax(0), len(probability))


def input_picture(pixels: np.ndarray, value_range: list[float]) -> np.ndarray:
    """Picture of grey values: (H, W, C) to (H, W), or to (H, W, 3) for three channels.

    Parameters
    ----------
    pixels : ndarray
        Grey values; of two or more than three channels the first is shown.
    value_range : list of float
        Grey values that become 0 and 255; the same for all images, so that no contrast is stretched.
    """
    low, high = value_range
    picture = np.clip((pixels - low) / ((high - low) or 1) * 255, 0, 255).round().astype(np.uint8)
    return picture if picture.shape[-1] == 3 else picture[..., 0]


def save_images(folder: Path, number: int, pictures: Pictures) -> None:
    """Write the pictures of one image as `0000-input.png`, `0000-label.png`, `0000-output.png`."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for kind, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{number:04d}-{kind}.png")


def write_metrics(folder: Path, summary: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write `metrics.json` and `metrics.csv`.

    Parameters
    ----------
    folder : Path
        Where the files go.
    summary : dict
        What the scores are of, their mean and the baseline; goes into the JSON.
    rows : list of dict
        One a image: `image`, `sample` and scores.
    """
    text = json.dumps(summary | {"images": rows}, indent=1, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n", "utf-8")
    with (folder / "metrics.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]) if rows else ["image"], restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        table.writerow({"image": "mean"} | summary["mean"])


def main_scores(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the scores that fit into 100 columns of a terminal; with more than three classes the mean of Dice.

    Examples
    --------
    >>> main_scores([{"image": "0000", "loss": 0.25, "dice_a": 0.5, "iou_a": 0.3}])
    [{'image': '0000', 'loss': 0.25, 'dice_a': 0.5}]
    """
    shown = []
    for row in rows:
        dice = {name: value for name, value in row.items() if name.startswith("dice_")}
        dice = {"dice": float(np.mean(list(dice.values())))} if len(dice) > 3 else dice
        first, last = ({name: row[name] for name in names if name in row} for names in MAIN_SCORES)
        shown.append(first | dice | last)
    return shown


def format_table(rows: list[dict[str, Any]]) -> str:
    """Text table of rows with the same keys.

    Examples
    --------
    >>> print(format_table([{"image": "0000", "loss": 0.25}, {"image": "mean", "loss": 0.25}]))
    image    loss
    0000   0.2500
    mean   0.2500
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def write_index(folder: Path, title: str, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write `index.html`: a row of pictures and scores for each image, and how they came about.

    Parameters
    ----------
    folder : Path
        Holds `images/`; the page refers to it by relative paths and works from the disk.
    title : str
        Heading.
    rows : list of dict
        As for `write_metrics`, the last ones without pictures (mean, baseline).
    facts : dict
        Names and values of the run's configuration and the command.
    """
    names = [name for name in rows[0] if name != "image"]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("image", *KINDS, *names))
    body = "\n".join(_index_row(folder, row, names) for row in rows)
    table = "\n".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>" for name, value in facts.items()
    )
    page = _PAGE.format(title=html.escape(title), head=head, body=body, facts=table)
    (folder / "index.html").write_text(page, "utf-8")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 14px sans-serif; margin: 1em; }}
table {{ border-collapse: collapse; margin-bottom: 2em; }}
th, td {{ padding: 4px 6px; text-align: center; border-bottom: 1px solid #ccc; }}
.facts th, .facts td {{ text-align: left; font-family: monospace; font-weight: normal; }}
img {{ width: 256px; image-rendering: pixelated; display: block; }}
</style>
</head>
<body>
<h1>{title}</h1>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
<h2>How it was made</h2>
<table class="facts">
<tbody>
{facts}
</tbody>
</table>
</body>
</html>
"""


def _index_row(folder: Path, row: dict[str, Any], names: list[str]) -> str:
    cells = [f"<td>{html.escape(str(row['image']))}</td>"]
    for kind in KINDS:
        name = f"images/{row['image']}-{kind}.png"
        picture = f'<img src="{html.escape(name)}" alt="{kind}">' if (folder / name).exists() else ""
        cells.append(f"<td>{picture}</td>")
    cells += [f"<td>{html.escape(_cell(row.get(name)))}</td>" for name in names]
    return f"<tr>{''.join(cells)}</tr>"


def write_arguments(path: Path, values: dict[str, Any]) -> None:
    """Write `arg.txt`, the readable table of a run's parameters."""
    width = max(map(len, values))
    with atomic_write(path, "w") as file:
        file.writelines(printable(f"{name.ljust(width)}  {value}") + "\n" for name, value in values.items())


def command_line(argv: list[str] | None = None) -> str:
    """Command that started this process, as one would type it, with further arguments."""
    return shlex.join(["python", *sys.argv, *(argv or [])])


class TrainingLog:
    """Progress and curves of a training: a bar on a terminal, plain lines elsewhere, TensorBoard events.

    Events are on the disk when a method returns, so that no checkpoint is ever ahead of its curves
    (tensorboardX's SummaryWriter queues them, and a killed run would lose the last two minutes). A disk that takes no
    more of them ends the curves with a warning, and not the training.

    Parameters
    ----------
    folder : Path
        Where the events go.
    first : int
        First epoch of this run. What an interrupted run wrote of epochs from it on is hidden.
    last : int or None
        Last epoch; None for a run that ends by the clock.
    progress : float
        Share of the run that was over before.
    """

    def __init__(self, folder: Path, first: int, last: int | None, progress: float) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tqdm import tqdm

        self.folder = folder
        self.writer: EventsWriter | None = EventsWriter(
            str(folder / "events"), f".{time.time_ns()}"
        )  # two runs may start in one second
        self._write(first, session_log={"status": "START"})
        self.bar = tqdm(total=last, initial=first - 1, unit="epoch", disable=None, dynamic_ncols=True)
        self.of = f"/{last}" if last else ""
        self.start, self.before = time.monotonic(), progress

    def _write(self, epoch: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        if self.writer is None:
            return
        try:
            self.writer.write_event(Event(wall_time=time.time(), step=epoch, **what))
            self.writer.flush()
        except OSError as error:
            with suppress(OSError):  # flushes once more
                self.writer._py_recordio_writer.close()
            self.writer = None
            what = f"cannot write {self.folder}: {error.strerror or error}"
            say(f"warning: {what}: the training goes on, its curves end at epoch {epoch - 1}", sys.stderr)

    def scalars(self, epoch: int, scores: Scores, progress: float) -> None:
        """Add one point to each curve, and show the progress, the share of the run that is over."""
        self._write(epoch, summary={"value": [{"tag": name, "simple_value": value} for name, value in scores.items()]})
        shown = {name: f"{value:.4g}" for name, value in scores.items() if name.split("/")[0] in _SHOWN}
        left = self._left(progress)
        self.bar.set_postfix(shown | {"left": left}, refresh=False)
        self.bar.update()
        if self.bar.disable:
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            say(f"epoch {epoch}{self.of}  {text}  {left} left")

    def images(self, epoch: int, pictures: Pictures) -> None:
        """Add pictures, (H, W) or (H, W, 3) uint8; tensorboardX itself writes grey as colours, seven times slower."""
        from PIL import Image

        for name, picture in pictures.items():
            png = io.BytesIO()
            Image.fromarray(picture).save(png, "PNG")
            height, width = picture.shape[:2]
            image = {"height": height, "width": width, "colorspace": 1 if picture.ndim == 2 else 3}
            image["encoded_image_string"] = png.getvalue()
            self._write(epoch, summary={"value": [{"tag": name, "image": image}]})

    def _left(self, progress: float) -> str:
        """Time to the end at the pace so far."""
        pace = (time.monotonic() - self.start) / max(progress - self.before, 1e-9)
        minutes, seconds = divmod(round(pace * (1 - progress)), 60)
        return f"{minutes}:{seconds:02d}"

    def close(self) -> None:
        """Write what is pending."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


class NoLog:
    """Stands for a `TrainingLog` in the processes that have none."""

    def scalars(self, *_: Any) -> None:
        """Do nothing."""

    def images(self, *_: Any) -> None:
        """Do nothing."""


_SHOWN = ("loss", "dice", "pixel_error", "images_per_second")
