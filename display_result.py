"""Draw the figure of a test: one column per image, with rows for input, label and output.

python display_result.py --dir_result ./results --scope unet --name_data em --num 5
"""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from config import DisplayFlags, parse
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
from files import atomic_write, reading
from utils import UserError, echo, folder_hint, is_out_of_memory, natural_key, program

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = "metrics.json"
LONGEST = 24  # letters of a name in the legend
SHOWN = 1024  # [px] longest side of a picture in the figure, more than twice its size on the page


class Column(NamedTuple):
    """An image in the figure: its title and its pictures by kind."""

    title: str
    pictures: Pictures


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
    _check_target(target, folder)
    with reading(folder, RESULTS, "choose another --scope or --name_data"):
        metrics = read_metrics(folder)
        names = metrics.worst(folder)[: flags.num] if flags.worst else None
        found = find_images(folder / "images", flags.num, names)
        columns = {name: {kind: _read(path) for kind, path in files.items()} for name, files in found.items()}
    if flags.worst:
        title += f"\nhighest {metrics.worst_by.replace('_', ' ')} first"
    scored = flags.overlay or flags.worst
    titled = [Column(metrics.title(name) if scored else name, pictures) for name, pictures in columns.items()]
    draw(titled, title, target, flags.show, metrics.background if flags.overlay else None, metrics.colours)
    echo(f"figure of {len(columns)} images: {target}")


@dataclass(frozen=True)
class Metrics:
    """Scores of a test.

    Attributes
    ----------
    scores : dict
        Scores of each image by its name; empty if the test wrote none.
    foreground : str or None
        The foreground class; None for several classes.
    background : int
        Index of the background class.
    colours : dict of str to Colour
        Colour of each class by its name; empty for two classes, which are black and white.
    """

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    foreground: str | None = None
    background: int = 0
    colours: dict[str, Colour] = field(default_factory=dict)

    @property
    def worst_by(self) -> str:
        """Score that `--worst` sorts by; empty without one."""
        return sorting_score(self.scores.values())

    def worst(self, folder: Path) -> list[str]:
        """Names of the images with this score, the highest first.

        Raises
        ------
        UserError
            The test has no scores.
        """
        by = self.worst_by
        if not by:
            raise UserError(
                f"--worst on: no scores in {folder / METRICS}: test labelled images with main.py --mode test"
            )
        scored = [name for name, row in self.scores.items() if by in row]
        return sorted(scored, key=lambda name: self.scores[name][by], reverse=True)

    def title(self, name: str) -> str:
        """Name of an image, and below it the pixel error and the Dice score of the foreground, or of all classes."""
        row = self.scores.get(name, {})
        of = None if self.foreground is None else f"dice_{self.foreground}"
        dice = [value for key, value in row.items() if (key.startswith("dice_") if of is None else key == of)]
        if "pixel_error" not in row or not dice:
            return name
        return f"{name}\npixel error {row['pixel_error']:.4f}, Dice {np.mean(dice):.3f}"


def read_metrics(folder: Path) -> Metrics:
    """Scores of a test; none if it wrote no metrics.json."""
    path = folder / METRICS
    try:
        found = json.loads(path.read_text("utf-8"))
        scores = {row["image"]: {k: v for k, v in row.items() if isinstance(v, float)} for row in found["images"]}
        names = list(found.get("classes", {}))
        background = names.index(found["background"]) if found.get("background") in names else 0
        colours = dict(zip(names, palette(len(names)).tolist(), strict=True)) if len(names) > 2 else {}
        return Metrics(scores, found.get("foreground"), background, colours)
    except FileNotFoundError:
        return Metrics()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: can't be read ({error}): run main.py --mode test again") from error


def _check_target(target: Path, folder: Path) -> None:
    """Refuse to replace one of the results."""
    with suppress(RuntimeError):  # a link to itself; writing to it will fail
        if any(target.resolve().is_relative_to((folder / name).resolve()) for name in RESULTS):
            raise UserError(f"--save {target} is one of the results that are shown: choose another file")


def find_images(folder: Path, num: int, names: list[str] | None = None) -> dict[str, dict[str, Path]]:
    """Picture files of the images `names` of a test, by image name and kind; missing files are left out.

    Without names, those of the first `num` images.

    Raises
    ------
    UserError
        The folder has no result images.
    """
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
    columns: list[Column],
    title: str,
    target: Path,
    show: bool,
    overlay: int | None = None,
    classes: dict[str, Colour] | None = None,
) -> None:
    """Draw the figure and write it.

    Parameters
    ----------
    columns : list of Column
        The images.
    title : str
        Heading.
    target : Path
        File to write; its suffix selects the format.
    show : bool
        Whether to open a window as well.
    overlay : int, optional
        Add rows with outlines and errors, for this class of the background.
    classes : dict of str to Colour, optional
        Colour of each class in the pictures, for the legend.

    Raises
    ------
    UserError
        matplotlib can't write that format.
    """
    import matplotlib

    if not show:
        matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.backend_bases import FigureManagerBase

    rows = _rows(columns, overlay is not None)
    figure = plt.figure(figsize=(2.4 * len(columns) + 0.4, 2.7 * len(rows) - 0.3), layout="constrained")
    try:
        types = figure.canvas.get_supported_filetypes().keys() - {"pgf"}  # needs LaTeX
        if target.suffix[1:].lower() not in types:
            raise UserError(f"--save {target}: matplotlib can't write this type: use {', '.join(sorted(types))}")
        _legend(figure, (classes or {}) | _fill(figure, columns, rows, title, overlay))
        with atomic_write(target) as file, warnings.catch_warnings(action="ignore"):  # letters missing in the font
            figure.savefig(file, format=target.suffix[1:].lower(), dpi=150)
        if show and type(figure.canvas.manager) is FigureManagerBase:  # of canvases without a window
            echo(f"warning: --show: no window can be opened on this machine: see {target}", sys.stderr)
        elif show:
            plt.show()
    finally:
        plt.close(figure)


def _rows(columns: list[Column], overlay: bool) -> list[str]:
    """What the rows show: each kind of picture, and overlays if wanted; without any label what does without."""
    rows = [*KINDS, "outlines", "errors"] if overlay else [*KINDS]
    labelled = any("label" in column.pictures for column in columns)
    return [row for row in rows if labelled or row not in ("label", "errors")]


def _fill(figure: Figure, columns: list[Column], rows: list[str], title: str, overlay: int | None) -> dict[str, Colour]:
    """Draw the rows and one column per image; return what colours mean."""
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    colours: dict[str, Colour] = {}
    smaller: dict[str, Any] = {"fontsize": 9} if any("\n" in column.title for column in columns) else {}
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for cells, (name, kinds) in zip(axes.T, columns, strict=True):
        column = dict(zip(rows, cells, strict=True))
        for kind in kinds.keys() & column.keys():
            column[kind].imshow(kinds[kind], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        if "label" in kinds and (kinds["label"] == NOT_ANNOTATED).reshape(*kinds["label"].shape[:2], -1).all(-1).any():
            colours["not annotated"] = (NOT_ANNOTATED,) * 3
        if overlay is not None:
            colours |= _overlay(column, name, kinds, overlay)
        cells[0].set_title(name, parse_math=False, **smaller)
    for axis, kind in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(kind)
    figure.suptitle(title, parse_math=False)
    return colours


def _overlay(axes: dict[str, Axes], name: str, pictures: Pictures, background: int) -> dict[str, Colour]:
    """Draw outlines and errors of an image; return what its colours mean."""
    if not {"input", "output"} <= pictures.keys():
        return {}
    if len({picture.shape[:2] for picture in pictures.values()}) > 1:
        raise UserError(f"image {name.split()[0]}: its pictures differ in size: run main.py --mode test again")
    shown, output = pictures["input"], classes_of(pictures["output"])[0]
    of = COLOURS if pictures["output"].ndim == 2 else COLOURS_OF_SEVERAL
    colours = {"output (added)" if "errors" in axes else "output": of["output"]}
    if "label" in pictures:
        label, valid = classes_of(pictures["label"])
        axes["outlines"].imshow(greyed_out(shown, valid), interpolation="nearest")
        _outline(axes["outlines"], np.ma.masked_array(label, ~valid), background, of["label"])
        axes["errors"].imshow(error_picture(shown, label, output, background, valid, of), interpolation="nearest")
        colours |= {"label (missed)": of["label"]}
        colours |= {"wrong class": of["confused"]} if "confused" in of else {}
    else:
        axes["outlines"].imshow(greyed_out(shown, None), interpolation="nearest")
    _outline(axes["outlines"], output, background, of["output"])
    return colours


def _outline(axis: Axes, classes: np.ndarray, background: int, colour: Colour) -> None:
    """Draw the borders of the classes (H, W) but the background, as lines of one width whatever the image's size."""
    y, x = (np.arange(-1, length + 1) for length in classes.shape)
    missing = np.pad(np.ma.getmaskarray(classes), 1)  # no line where the annotation ends
    for k in np.unique(np.ma.getdata(classes)[~np.ma.getmaskarray(classes)]):
        if k != background:
            inside = np.pad(np.ma.getdata(classes) == k, 1)  # lines close at the border of the image
            mask = np.ma.masked_array(inside.astype(np.uint8), missing)
            axis.contour(x, y, mask, [0.5], colors=f"#{bytes(colour).hex()}", linewidths=0.8)


def _legend(figure: Figure, colours: dict[str, Colour]) -> None:
    """Say below the figure, which grows by that, what the colours mean: first the classes, then outlines and errors."""
    from matplotlib.patches import Patch

    last = ["label (missed)", "output (added)", "wrong class", "not annotated"]
    texts = sorted(colours, key=lambda text: last.index(text) if text in last else -1)
    if not texts:
        return
    patches = [Patch(facecolor=f"#{bytes(colours[text]).hex()}", edgecolor="black") for text in texts]
    shown = [text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}\u2026" for text in texts]
    num_column = max(1, min(len(texts), int(figure.get_figwidth() / (0.1 * max(map(len, shown)) + 0.5))))  # [inch]
    figure.set_figheight(figure.get_figheight() + 0.25 * -(-len(texts) // num_column))
    legend = figure.legend(patches, shown, loc="outside lower center", ncols=num_column)
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
    step = -(-max(pixels.shape[:2]) // SHOWN)  # rounded up
    return pixels[::step, ::step].copy()


if __name__ == "__main__":
    sys.exit(main())
