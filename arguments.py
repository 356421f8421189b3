"""Reads the command line of a program into its table of flags; advice on arguments that are no flag of it."""

from __future__ import annotations

import re
import sys
from dataclasses import fields

from config import Config, DatabaseFlags, DisplayFlags
from flags import UNKNOWN_FLAG, Flags, Table, at_home, make_parser, to_value
from utils import nearest

PROGRAMS: dict[str, type[Flags]] = {table.program: table for table in (Config, DatabaseFlags, DisplayFlags)}
# flags with a value that are paths, in which `~` is the home folder
OF_FOLDERS = ("dir_data", "dir_checkpoint", "dir_log", "dir_result")
PATHS = (*OF_FOLDERS, "init_from", "input", "add", "label", "info", "output", "save")
# words of other programs for a flag of this one, where no likeness tells
OTHER_WORDS = {
    "num_epoch": "epochs max_epochs iterations",
    "max_minutes": "minutes time max_time hours",
    "batch_size": "batch bs",
    "lr": "learning_rate",
    "gpu_ids": "gpu gpus device devices cuda cpu mps",
    "num_workers": "workers jobs",
    "nch_ker": "filters features base_channels channels ngf",
    "nch_out": "classes num_classes n_classes",
    "num_level": "depth levels",
    "ny_load": "height crop crop_size patch patch_size image_size img_size imgsz",
    "nx_load": "width",
    "train_continue": "resume continue",
    "init_from": "weights pretrained model load",
    "average": "ema",
    "patience": "early_stopping",
    "amp": "fp16 half mixed_precision",
    "input": "images image img source",
    "label": "labels masks mask target targets",
    "output": "out dest",
    "name_data": "data dataset database name",
    "scope": "experiment exp project",
    "scale": "zoom resize rescale diameter pixel_size magnification",
    "num_val": "val validation val_split",
    "save": "output out figure",
}
# the flags of pytorch-UNET that this program has not; they have no effect there
OF_PYTORCH_UNET = {
    "ny_in": "images may have any size, --ny_load is the height of a training crop",
    "nx_in": "images may have any size, --nx_load is the width of a training crop",
    "ny_out": "an output is as high as its image, --ny_load is the height of a training crop",
    "nx_out": "an output is as wide as its image, --nx_load is the width of a training crop",
    "nch_load": "images have the channels of the database, --nch_in is their number",
    "data_type": "images of any type are read, --normalize says how they are scaled",
}


def _advice_on(argument: str, table: type[Flags]) -> str:
    """What to do about an argument that is no flag of a program."""
    name = re.sub(r"^\W+", "", argument)
    names = {item.name: item.name for item in fields(table)}
    words = {word: flag for flag, words in OTHER_WORDS.items() if flag in names for word in words.split()}
    key = name.lower().replace("-", "_")
    meant = names.get(key) or words.get(key)
    if not meant and key in OF_PYTORCH_UNET and table is Config:
        return f"a flag of pytorch-UNET without effect: leave it out: {OF_PYTORCH_UNET[key]}"
    for program, other in PROGRAMS.items():
        if not meant and key in {item.name for item in fields(other)}:
            return f"a flag of {program}"
    begun = [flag for flag in names if flag.startswith(key)]
    meant = meant or (begun[0] if len(begun) == 1 else nearest(name, names))
    return f"did you mean --{meant}" if meant else "no flag is like it"


def parse(table: type[Table], argv: list[str] | None, description: str | None) -> Table:
    """Fill a table of flags from the command line; argparse ends the program with 2 (a wrong flag) or 0 (`--help`)."""
    parser = make_parser(table, description)
    typed, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if unknown:
        named = dict.fromkeys(each.partition("=")[0] for each in unknown if re.match(UNKNOWN_FLAG, each))
        advice = [f"{each}: {_advice_on(each, table)}" for each in named] or ["a value without a flag"]
        parser.error(f"unknown arguments {' '.join(unknown)}: {'; '.join(advice)}")
    values = {item.name: to_value(item, getattr(typed, item.name)) for item in fields(table)}
    return table(**{name: at_home(value) if name in PATHS else value for name, value in values.items()})
