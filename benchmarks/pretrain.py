"""Train a network that comes along, pretrained/NAME.pth, by the recipe of docs/pretrained.md.

    python benchmarks/pretrain.py nuclei --data ../shared/nuclei2018 --output pretrained/nuclei.pth
    python benchmarks/pretrain.py em --data ../shared/isbi2012 --output pretrained/em.pth

All images train, so that there are no scores: those on the card are of other data. The file has the averaged weights
alone, in 16 bits, and no state of the optimiser: it can begin a training, but not be resumed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from quality import ROOT, program

sys.path.insert(0, str(ROOT))
from checkpoint import Checkpoint, list_newest

DATABASES = {
    "nuclei": ["--input", "images", "--label", "labels", "--objects", "on", "--class_names", "background,nucleus"],
    "em": ["--input", "train-volume.tif", "--label", "train-labels.tif", "--class_names", "membrane,cell"],
}
# other microscopes have other pixels, lamps and cameras
RECIPES = {
    "nuclei": "--zoom 2 --contrast 0.4 --brightness 0.4 --gamma 0.3 --blur 1 --noise 0.2",
    "em": "--zoom 1.5 --contrast 0.3 --brightness 0.3 --gamma 0.3 --blur 1 --noise 0.2",
}
CERTAINTY = 0.8  # chosen on other data, see docs/pretrained.md: all of it trains, none validates
EPOCHS = {"nuclei": 60, "em": 100}


def main() -> None:
    """Make the database, train, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--data", type=Path, required=True, help="folder of the images")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--num_epoch", type=int, default=0, help="epochs (0: those of the recipe)")
    parser.add_argument("--nch_ker", type=int, default=16)
    parser.add_argument("--flags", default="", help="additional flags of main.py")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = [args.data.resolve() / each if (args.data / each).exists() else each for each in DATABASES[args.name]]
        place = ["--name_data", args.name]
        program("run_make_database.py", Path(folder), *place, *flags, "--num_val", 0, "--num_test", 0)
        length = ["--nch_ker", args.nch_ker, "--num_epoch", args.num_epoch or EPOCHS[args.name]]
        recipe = [*RECIPES[args.name].split(), *args.flags.split()]
        program("main.py", Path(folder), "--mode", "train", *place, "--gpu_ids", -1, *length, *recipe)
        write_small(list_newest(Path(folder, "checkpoints", "unet", args.name))[0], args.output)


def write_small(path: Path, output: Path) -> None:
    """Write a checkpoint with the averaged weights alone; those of convolutions in 16 bits."""
    saved = Checkpoint.load(path)
    averaged = saved.network(path).state_dict()
    net = {name: value.half() if value.dim() > 1 else value for name, value in averaged.items()}
    small = replace(saved, net=net, average=None, optim={}, scaler={}, losses=[], batch_settings={}, best_epoch=0)
    replace(small, certainty=CERTAINTY).save(output)
    worst = max(float((value - net[name]).abs().max()) for name, value in averaged.items())
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB, weights rounded by at most {worst:.1e}")


if __name__ == "__main__":
    main()
