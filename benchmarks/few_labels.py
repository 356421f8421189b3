"""Train on few annotations of the ISBI 2012 stack and score by the protocol of benchmarks/README.md.

    python benchmarks/few_labels.py --variant windows --minutes 10 --seeds 3

Sections 21-23 validate and 24-29 test, all annotated. Of the training sections, `windows` keeps one annotated window of
128 x 128 px in each of 0-20 (6 % of the pixels), `cut` trains on the same windows as small images, `full` on all
labels, `three` on sections 8-10 alone, `mosaic` on one image of 3072 x 3072 px that is put together from 0-20, 15 of
them twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import tifffile
from quality import program, run, run_parser, table

WINDOW, UNKNOWN, NUM_TRAIN = 128, 128, 21
Stack = np.ndarray


def main() -> None:
    """Do what the flags say."""
    parser = run_parser(__doc__, "few_labels")
    parser.add_argument("--variant", choices=VARIANTS, default="windows")
    args = parser.parse_args()
    args.work = args.work / args.variant
    if not (args.work / "datasets").is_dir():
        args.work.mkdir(parents=True, exist_ok=True)
        make_database(args)
    print(table([run(args, "default", seed) for seed in range(args.seeds)]))


def make_database(args: argparse.Namespace) -> None:
    """Write the images and labels of a variant, and make its database."""
    images, labels = (tifffile.imread(args.data / f"train-{name}.tif") for name in ("volume", "labels"))
    samples = [*VARIANTS[args.variant](images[:NUM_TRAIN], labels[:NUM_TRAIN])]
    samples += zip(images[NUM_TRAIN:], labels[NUM_TRAIN:], strict=True)
    for number, pair in enumerate(samples):
        for name, image in zip(("images", "labels"), pair, strict=True):
            (args.work / name).mkdir(exist_ok=True)
            tifffile.imwrite(args.work / name / f"{number:02d}.tif", image)
    flags = ["--input", "images", "--label", "labels", "--num_val", 3, "--num_test", 6]
    flags += ["--ignore", UNKNOWN] if args.variant == "windows" else []
    program("run_make_database.py", args.work, *flags, "--class_names", "membrane,cell")


def corners(images: Stack) -> list[tuple[int, int]]:
    """Top left corner of the window of each section."""
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(0, np.array(image.shape) - WINDOW + 1)) for image in images]


def windows(images: Stack, labels: Stack) -> list[tuple[Stack, Stack]]:
    """Whole sections with one annotated window each."""
    partial = np.full_like(labels, UNKNOWN)
    for section, label, (top, left) in zip(partial, labels, corners(images), strict=True):
        place = np.s_[top : top + WINDOW, left : left + WINDOW]
        section[place] = label[place]
    return [*zip(images, partial, strict=True)]


def cut(images: Stack, labels: Stack) -> list[tuple[Stack, Stack]]:
    """The same windows as images of their own."""
    places = [np.s_[top : top + WINDOW, left : left + WINDOW] for top, left in corners(images)]
    return [(image[place], label[place]) for image, label, place in zip(images, labels, places, strict=True)]


def mosaic(images: Stack, labels: Stack) -> list[tuple[Stack, Stack]]:
    """One image of six by six sections."""
    rows = np.arange(36).reshape(6, 6) % len(images)
    return [tuple(np.block([[stack[number] for number in row] for row in rows]) for stack in (images, labels))]


VARIANTS: dict[str, Callable[[Stack, Stack], list[tuple[Stack, Stack]]]] = {
    "windows": windows,
    "cut": cut,
    "full": lambda images, labels: [*zip(images, labels, strict=True)],
    "mosaic": mosaic,
    "three": lambda images, labels: [*zip(images[8:11], labels[8:11], strict=True)],
}


if __name__ == "__main__":
    main()
