"""Make a database of .npy samples from image stacks or folders of images.

datasets/em/train-volume.tif and train-labels.tif:  python run_make_database.py --name_data em
two folders, or two stacks:  python run_make_database.py --name_data mine --input IMAGES --label LABELS
a synthetic stack:           python run_make_database.py --name_data demo --synthetic
more annotated images:       python run_make_database.py --name_data mine --add IMAGES --label LABELS
what a file holds:           python run_make_database.py --info FILE
synthetic nuclei:            python run_make_database.py --name_data nuclei --synthetic --phantom nuclei
"""

from __future__ import annotations

import sys

from arguments import parse
from config import DatabaseFlags
from utils import program


@program
def main(argv: list[str] | None = None) -> None:
    """Make a database as the flags say.

    Parameters
    ----------
    argv : list of str, optional
        Arguments without the program's name; default: those of the process.
    """
    flags = parse(DatabaseFlags, argv, __doc__)
    if flags.info:
        from images.info import show_info
        from images.selection import Choice

        return show_info(flags.info, Choice(flags.channel, flags.series, flags.section))
    from evaluation.database_page import show_database  # here, so that --help needs no torch
    from sources.adding import add_images
    from sources.database import make_database

    (add_images if flags.add else make_database)(flags, show_database)


if __name__ == "__main__":
    sys.exit(main())
