"""Draw the figure of a test: one column per image, with rows for input, label and output.

python display_result.py --dir_result ./results --scope unet --name_data em --num 5
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arguments import parse
from config import PREDICT, Config, DisplayFlags
from evaluation.pictures import (
    COLOURS,
    COLOURS_OF_SEVERAL,
    KINDS,
    NOT_ANNOTATED,
    Colour,
    Pictures,
    classes_of,
    error_picture,
    greyed_out,
    palette,
    picture_name,
)
from evaluation.tables import RESULTS, sorting_score
from exchange import reading
from files import atomic_write
from utils import UserError, echo, folder_hint, is_out_of_memory, natural_key, printable, program, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colours = dict[str, Colour]  # meaning or class -> colour
METRICS = "metrics.json"
MAX_SIDE = 1024  # [px] longest side of a picture in the figure, more than twice its size on the page


@program
def main(argv: list[str] | None = None) -> None:
    """Write the figure and print its path.

    Parameters
    ----------
    argv : list of str, optional
        Arguments without the program's name; default: those of the process.
    """
    flags = parse(DisplayFlags, argv, __doc__)
    folder = Path(flags.dir_result) / flags.scope / flags.name_data
    target, title = Path(flags.save or folder / "figure.png"), f"{flags.scope} / {flags.name_data}"
    with suppress(RuntimeError):  # a link to itself; writing to it will fail
        if any(target.resolve().is_relative_to((folder / name).resolve()) for name in RESULTS):
            raise UserError(f"--save {target} is one of the results that are shown: choose another file")
    with reading(folder, RESULTS, "choose another --scope or --name_data"):
        metrics = read_metrics(folder)
        names = metrics.worst(folder)[: flags.num] if flags.worst else None
        images = find_images(folder / "images", flags.num, names)
        titles = {name: metrics.title(name) if flags.overlay or flags.worst else metrics.file(name) for name in images}
        columns = {titles[name]: {kind: _read(path) for kind, path in files.items()} for name, files in images.items()}
    if flags.worst:
        title += f"\nhighest {metrics.worst_by.replace('_', ' ')} first"
    background = metrics.background if flags.overlay else None
    draw(columns, title, target, show=flags.show, background=background, classes=metrics.colours)
    echo(f"figure of {len(columns)} images: {target}")
    echo(flags.next_step(Config, **PREDICT))


@dataclass(frozen=True)
class Metrics:
    """Scores of a test."""

    scores: dict[str, dict[str, float]]  # of each image by its name; empty if the test wrote none
    foreground: str | None  # the foreground class; None for several classes
    background: int  # index of the background class
    colours: Colours  # of each class by its name; empty for two classes, which are black and white
    files: dict[str, str]  # short and unique name of the file of each image

    @property
    def worst_by(self) -> str:
        """Score that `--worst` sorts by; empty without one."""
        return sorting_score(self.scores.values())

    def worst(self, folder: Path) -> list[str]:
        """Names of the images with this score, the highest first."""
        by = self.worst_by
        if not by:
            advice = "test labelled images with main.py --mode test"
            raise UserError(f"--worst on: no scores in {folder / METRICS}: {advice}")
        scored = [name for name, row in self.scores.items() if by in row]
        return sorted(scored, key=lambda name: self.scores[name][by], reverse=True)

    def file(self, name: str) -> str:
        """Name of the file of an image; without one, of the image."""
        return self.files.get(name, name)

    def title(self, name: str) -> str:
        """Name of an image, and below it the pixel error and the Dice score of the foreground, or of all classes."""
        row, name = self.scores.get(name, {}), self.file(name)
        all_dice = {key: value for key, value in row.items() if key.startswith("dice_")}
        of_foreground = f"dice_{self.foreground}"
        dice = [value for key, value in all_dice.items() if self.foreground is None or key == of_foreground]
        if "pixel_error" not in row or not dice:
            return name
        return f"{name}\npixel error {row['pixel_error']:.4f}, Dice {np.mean(dice):.3f}"


def read_metrics(folder: Path) -> Metrics:
    """Scores of a test; none if it wrote no metrics.json."""
    path = folder / METRICS
    try:
        content = json.loads(path.read_text("utf-8"))
        scores = {row["image"]: {k: v for k, v in row.items() if isinstance(v, float)} for row in content["images"]}
        names = list(content.get("classes", {}))
        background = names.index(content["background"]) if content.get("background") in names else 0
        colours = dict(zip(names, palette(len(names)).tolist(), strict=True)) if len(names) > 2 else {}
        return Metrics(scores, content.get("foreground"), background, colours, _file_names(content["images"]))
    except FileNotFoundError:
        return Metrics({}, None, 0, {}, {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: can't be read ({error}): run main.py --mode test again") from error


def _file_names(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Name of the original file of each image, short; after the number of the image where two are the same."""
    names = {row["image"]: shortened(printable(row["source"])) for row in rows if row.get("source")}
    count = Counter(names.values())
    return {image: name if count[name] == 1 else f"{image} {name}" for image, name in names.items()}


def find_images(folder: Path, num: int, names: list[str] | None = None) -> dict[str, dict[str, Path]]:
    """Picture files that there are of some images by name and kind; by default of the first `num` images."""
    outputs = sorted(folder.glob(picture_name("*", "output")), key=lambda path: natural_key(path.name))[:num]
    if not outputs:
        hint = folder_hint(folder.parent, ("--scope", "--name_data"), lambda other: (other / folder.name).is_dir())
        advice = "run main.py --mode test first, or check --scope and --name_data"
        raise UserError(f"no result images in {folder}: {hint}{advice}")
    if names is None:
        names = [path.name.removesuffix(picture_name("", "output")) for path in outputs]
    return {
        name: {kind: path for kind in KINDS if (path := folder / picture_name(name, kind)).exists()} for name in names
    }


def draw(
    columns: dict[str, Pictures], title: str, target: Path, *, show: bool, background: int | None, classes: Colours
) -> None:
    """Draw the figure of pictures by their titles, write it in the format of the suffix, and `show` it in a window.

    With a class of the background there are rows of outlines and errors; the legend has the colours of the classes.
    """
    import matplotlib

    if not show:
        matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [*KINDS] if background is None else [*KINDS, "outlines", "errors"]
    if not any("label" in pictures for pictures in columns.values()):
        rows = [row for row in rows if row not in ("label", "errors")]
    figure = plt.figure(figsize=(2.4 * len(columns) + 0.4, 2.7 * len(rows) - 0.3), layout="constrained")
    try:
        suffix, types = target.suffix[1:].lower(), figure.canvas.get_supported_filetypes().keys() - {"pgf"}  # LaTeX
        if suffix not in types:
            raise UserError(f"--save {target}: matplotlib can't write this type: use {', '.join(sorted(types))}")
        figure.suptitle(title, parse_math=False)
        _legend(figure, classes | _fill(figure, columns, rows, background))
        with atomic_write(target) as file, warnings.catch_warnings(action="ignore"):  # letters missing in the font
            figure.savefig(file, format=suffix, dpi=150)
        if show:
            _show(figure, target)
    finally:
        plt.close(figure)


def _show(figure: Figure, target: Path) -> None:
    """Open a window with the figure, which was written to a file."""
    from matplotlib import pyplot as plt
    from matplotlib.backend_bases import FigureManagerBase

    if type(figure.canvas.manager) is FigureManagerBase:  # of canvases without a window
        echo(f"warning: --show: no window can be opened on this machine: see {target}", sys.stderr)
    else:
        plt.show()


def _fill(figure: Figure, columns: dict[str, Pictures], rows: list[str], background: int | None) -> Colours:
    """Draw the rows and one column per image; return the meaning of colours."""
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    colours: Colours = {}
    smaller: dict[str, Any] = {"fontsize": 9} if any("\n" in title or len(title) > 12 for title in columns) else {}
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, row in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(row)
    for cells, (title, pictures) in zip(axes.T, columns.items(), strict=True):
        cells[0].set_title(title, parse_math=False, **smaller)
        column = dict(zip(rows, cells, strict=True))
        for kind in pictures.keys() & column.keys():
            column[kind].imshow(pictures[kind], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        label = pictures.get("label")
        if label is not None and (label == NOT_ANNOTATED).reshape(*label.shape[:2], -1).all(-1).any():
            colours["not annotated"] = (NOT_ANNOTATED,) * 3
        if background is not None:
            colours |= _overlay(column, title, pictures, background)
    return colours


def _overlay(axes: dict[str, Axes], title: str, pictures: Pictures, background: int) -> Colours:
    """Draw outlines and errors of an image; return the meaning of their colours."""
    if not {"input", "output"} <= pictures.keys():
        return {}
    if len({picture.shape[:2] for picture in pictures.values()}) > 1:
        raise UserError(f"image {title.splitlines()[0]}: its pictures differ in size: run main.py --mode test again")
    image, output = pictures["input"], classes_of(pictures["output"])[0]
    of = COLOURS if pictures["output"].ndim == 2 else COLOURS_OF_SEVERAL
    colours = {"output (added)" if "errors" in axes else "output": of["output"]}
    label, valid = classes_of(pictures["label"]) if "label" in pictures else (output, None)
    axes["outlines"].imshow(greyed_out(image, valid), interpolation="nearest")
    if valid is not None:
        _outline(axes["outlines"], np.ma.masked_array(label, ~valid), background, of["label"])
        axes["errors"].imshow(error_picture(image, label, output, background, valid, of), interpolation="nearest")
        colours |= {"label (missed)": of["label"]}
        colours |= {"wrong class": of["confused"]} if "confused" in of else {}
    _outline(axes["outlines"], np.ma.masked_array(output), background, of["output"])
    return colours


def _outline(axis: Axes, classes: np.ma.MaskedArray, background: int, colour: Colour) -> None:
    """Draw the borders of the classes (H, W) but the background, as lines of one width whatever the image's size."""
    y, x = (np.arange(-1, length + 1) for length in classes.shape)
    unknown = np.pad(np.ma.getmaskarray(classes), 1)  # no line where the annotation ends
    for k in np.unique(classes.compressed()):
        if k != background:
            inside = np.pad(classes.data == k, 1)  # lines close at the border of the image
            mask = np.ma.masked_array(inside.astype(np.uint8), unknown)
            axis.contour(x, y, mask, [0.5], colors=f"#{bytes(colour).hex()}", linewidths=0.8)


def _legend(figure: Figure, colours: Colours) -> None:
    """Name the colours below the figure, which grows by that: first the classes, then outlines and errors."""
    from matplotlib.patches import Patch

    last = ["label (missed)", "output (added)", "wrong class", "not annotated"]
    texts = sorted(colours, key=lambda text: last.index(text) if text in last else -1)
    if not texts:
        return
    patches = [Patch(facecolor=f"#{bytes(colours[text]).hex()}", edgecolor="black") for text in texts]
    short = [shortened(text) for text in texts]
    num_column = max(1, min(len(texts), int(figure.get_figwidth() / (0.1 * max(map(len, short)) + 0.5))))  # [inch]
    figure.set_figheight(figure.get_figheight() + 0.25 * -(-len(texts) // num_column))
    legend = figure.legend(patches, short, loc="outside lower center", ncols=num_column)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _read(path: Path) -> np.ndarray:
    """Picture as (H, W) or (H, W, 3) uint8; a large one is reduced to every n-th row and column."""
    from PIL import Image

    if not path.is_file():
        raise UserError(f"{path}: not a file: run main.py --mode test again")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:  # about large pictures
            pixels = np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds of exceptions for damaged pictures
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: can't be read ({error}): run main.py --mode test again") from error
    step = -(-max(pixels.shape[:2]) // MAX_SIDE)  # rounded up
    return pixels[::step, ::step].copy()


if __name__ == "__main__":
    sys.exit(main())
