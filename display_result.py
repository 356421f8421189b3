"""Draw the figure of a test: rows of input, label and output, a column for each image.

python display_result.py --dir_result ./results --scope unet --name_data em --num 5
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from config import DisplayFlags, parse
from report import KINDS
from utils import UserError, atomic_write, natural_key, program, say


@program
def main(argv: list[str] | None = None) -> None:
    """Write the figure, and say where it is.

    Parameters
    ----------
    argv : list of str, optional
        Arguments without the program's name; default: those of the process.
    """
    flags = parse(DisplayFlags, argv, __doc__)
    folder = Path(flags.dir_result) / flags.scope / flags.name_data
    columns = find_images(folder / "images", flags.num)
    goal = Path(flags.save or folder / "figure.png")
    draw(columns, f"{flags.scope} / {flags.name_data}", goal, flags.show)
    say(f"figure of {len(columns)} images: {goal}")


def find_images(folder: Path, num: int) -> list[dict[str, Path]]:
    """Files of the first images of a test, by kind; a kind that is missing is left out.

    Raises
    ------
    UserError
        There are none.
    """
    outputs = sorted(folder.glob("*-output.png"), key=lambda path: natural_key(path.name))[:num]
    if not outputs:
        raise UserError(
            f"no result images in {folder}: run main.py --mode test first, or check --scope and --name_data"
        )
    stems = [path.name.removesuffix("output.png") for path in outputs]
    columns = [{kind: folder / f"{stem}{kind}.png" for kind in KINDS} for stem in stems]
    return [{kind: path for kind, path in column.items() if path.exists()} for column in columns]


def draw(columns: list[dict[str, Path]], title: str, goal: Path, show: bool) -> None:
    """Draw the figure and write it.

    Parameters
    ----------
    columns : list of dict
        File of each kind, for each image.
    title : str
        Heading.
    goal : Path
        Its ending is the type.
    show : bool
        Open a window as well.

    Raises
    ------
    UserError
        matplotlib doesn't write files of that type, or a picture is damaged.
    """
    import matplotlib

    if not show:
        matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(KINDS), len(columns), figsize=(2.4 * len(columns) + 0.4, 7.8), squeeze=False, layout="constrained"
    )
    types = figure.canvas.get_supported_filetypes()
    if goal.suffix[1:].lower() not in types:
        raise UserError(f"--save {goal}: matplotlib writes no such type: use {', '.join(sorted(types))}")
    for column, files in zip(axes.T, columns, strict=True):
        for axis, kind in zip(column, KINDS, strict=True):
            axis.set(xticks=[], yticks=[])
            if kind in files:
                axis.imshow(_read(files[kind]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        column[0].set_title(files["output"].name.removesuffix("-output.png"))
    for axis, kind in zip(axes[:, 0], KINDS, strict=True):
        axis.set_ylabel(kind)
    figure.suptitle(title)
    with atomic_write(goal) as file:
        figure.savefig(file, format=goal.suffix[1:].lower(), dpi=150)
    if show:
        plt.show()
    plt.close(figure)


def _read(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error}): run main.py --mode test again") from error


if __name__ == "__main__":
    sys.exit(main())
