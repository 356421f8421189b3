"""Draw the figure of a test: one column per image, with rows for input, label and output.

python display_result.py --dir_result ./results --scope unet --name_data em --num 5
"""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from config import DisplayFlags, parse
from evaluation.page import RESULTS
from evaluation.pictures import KINDS, Pictures, picture_name
from files import atomic_write, reading
from utils import UserError, is_out_of_memory, natural_key, program, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 1024  # [px] longest side of a picture in the figure, more than twice its size on the page


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
    goal = Path(flags.save or folder / "figure.png")
    _check_goal(goal, folder)
    with reading(folder, RESULTS, "choose another --scope or --name_data"):
        columns = find_images(folder / "images", flags.num)
        pictures = {name: {kind: _read(path) for kind, path in files.items()} for name, files in columns.items()}
    draw(pictures, f"{flags.scope} / {flags.name_data}", goal, flags.show)
    say(f"figure of {len(columns)} images: {goal}")


def _check_goal(goal: Path, folder: Path) -> None:
    """Refuse to replace one of the results."""
    with suppress(RuntimeError):  # a link to itself; writing to it will fail
        if any(goal.resolve().is_relative_to((folder / name).resolve()) for name in RESULTS):
            raise UserError(f"--save {goal} is one of the results that are shown: choose another file")


def find_images(folder: Path, num: int) -> dict[str, dict[str, Path]]:
    """Picture files of the first `num` images of a test, by image name and kind; missing files are left out.

    Raises
    ------
    UserError
        The folder has no result images.
    """
    outputs = sorted(folder.glob(picture_name("*", "output")), key=lambda path: natural_key(path.name))[:num]
    if not outputs:
        raise UserError(
            f"no result images in {folder}: run main.py --mode test first, or check --scope and --name_data"
        )
    names = [path.name.removesuffix(picture_name("", "output")) for path in outputs]
    return {
        name: {kind: path for kind in KINDS if (path := folder / picture_name(name, kind)).exists()} for name in names
    }


def draw(pictures: dict[str, Pictures], title: str, goal: Path, show: bool) -> None:
    """Draw the figure and write it.

    Parameters
    ----------
    pictures : dict
        For each image name, its pictures by kind.
    title : str
        Heading.
    goal : Path
        File to write; its suffix selects the format.
    show : bool
        Whether to open a window as well.

    Raises
    ------
    UserError
        matplotlib can't write that format.
    """
    import matplotlib

    if not show:
        matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(2.4 * len(pictures) + 0.4, 7.8), layout="constrained")
    try:
        types = figure.canvas.get_supported_filetypes().keys() - {"pgf"}  # needs LaTeX
        if goal.suffix[1:].lower() not in types:
            raise UserError(f"--save {goal}: matplotlib can't write this type: use {', '.join(sorted(types))}")
        _fill(figure, pictures, title)
        with atomic_write(goal) as file, warnings.catch_warnings(action="ignore"):  # letters missing in the font
            figure.savefig(file, format=goal.suffix[1:].lower(), dpi=150)
        if show:
            plt.show()
    finally:
        plt.close(figure)


def _fill(figure: Figure, pictures: dict[str, Pictures], title: str) -> None:
    """Draw one row per kind and one column per image."""
    axes = figure.subplots(len(KINDS), len(pictures), squeeze=False)
    for column, (name, kinds) in zip(axes.T, pictures.items(), strict=True):
        for axis, kind in zip(column, KINDS, strict=True):
            axis.set(xticks=[], yticks=[])
            if kind in kinds:
                axis.imshow(kinds[kind], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        column[0].set_title(name, parse_math=False)
    for axis, kind in zip(axes[:, 0], KINDS, strict=True):
        axis.set_ylabel(kind)
    figure.suptitle(title, parse_math=False)


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
