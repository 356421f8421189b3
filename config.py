"""Every flag once: name, type, default, help, group and rule. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from flags import (
    COUNT,
    DRAWN,
    EPOCH,
    FOLD,
    FRACTION,
    GPU_LIST,
    NUMBER,
    OUTPUT_NAME,
    SCALE,
    SWITCH,
    TILE,
    UNIT,
    Flags,
    at_least,
    between,
    check_name,
    flag,
    positive_up_to,
    up_to,
)
from utils import FlagError

OF_OBJECTS = ("cells", "table", "overlay", "rois")  # outputs that need objects
WHAT = ("probability", "mask", "labels", *OF_OBJECTS)
OF_THRESHOLD = ("mask", "labels", *OF_OBJECTS)  # outputs that need the threshold of two classes
WHAT_LIST = (
    lambda value: set(value.split(",")) <= set(WHAT),
    f"choose from {', '.join(WHAT)}, with commas and without spaces",
)
COMPRESSION = ("auto", "zlib", "none")
NORM = ("bnorm", "inorm", "gnorm", "none")
LOSS = ("auto", "bce", "wbce", "dice", "bce+dice")
BY = ("image", "data")
AMP = ("auto", "off", "bf16", "fp16")
AUTO_SWITCH = ("auto", *SWITCH)
INIT = ("normal", "xavier", "kaiming", "orthogonal")
BEST_SCORE = ("loss", "pixel_error", "dice", "v_info")
PHANTOM = ("em", "nuclei", "rare")
SETS = ("train", "val", "test")
SPLIT = ("auto", "contiguous", "random", "region")
MAX_SHOWN = 40  # images in a figure, which is then 14460 px wide; WebP allows 16383
NO_LABEL = "none"
PRETRAINED = ("nuclei", "em")  # trained networks that come along, see docs/pretrained.md
LAPTOP = {"nch_ker": 16, "max_minutes": 10}  # a training that a laptop does while you wait
# after a test, to correct the labels of new images and add them
PREDICT: dict[str, Any] = {"mode": "predict", "input": "IMAGES", "output": "segmented"}
PREDICT |= {"what": "labels,overlay"}
# flags of a test that predict needs, too
AS_TESTED = ("epoch", "threshold", "background", "min_size", "fill_holes", "certainty")
CHANNEL = "numbers or names of the channels to read, comma-separated, from 0 (default: all)"
SERIES = "numbers or names of the series, scenes or wells to read, comma-separated, from 0 (default: all)"
SECTION = "sections of each stack to read: numbers and ranges from 0, such as 3 or 0,2,5 or 0-9 or 0:10 (default: all)"
MODES = ("train", "test", "predict", "export")
# modes in which flags have an effect, by group and by name; those of a training may be given to all, as in one script
MODES_OF_GROUP = {"predict": ("predict",), "export": ("export",)}
MODES_OF: dict[str, tuple[str, ...]] = {
    "output": ("predict", "export"),
    "split": ("test",),
    "min_size": ("predict", "test"),
    "fill_holes": ("predict", "test"),
    "certainty": ("predict", "test"),
    "threshold": ("test", "predict", "export"),
    "pretrained": ("predict", "export"),
}
OF_FILTER = ("min_size", "fill_holes", "certainty", "link")
# flags that change some outputs of predict only
NEEDED_BY: dict[str, tuple[str, ...]] = dict.fromkeys(OF_FILTER, (*OF_OBJECTS, "labels"))
NEEDED_BY |= {"threshold": OF_THRESHOLD, "numbers": ("overlay",)}


def find_network(path: str | PathLike) -> Path:
    """Path of a checkpoint, or of a folder of some; of a network that comes along its name, if nothing else has it."""
    path = Path(path)
    if str(path) in PRETRAINED and not path.exists():
        return Path(__file__).parent / "pretrained" / f"{path}.pth"
    return path


@dataclass(frozen=True)
class Config(Flags):
    """All flags of `main.py`.

    Examples
    --------
    >>> Config(nch_ker=4).nch_ker
    4
    """

    program = "main.py"
    beginner = ("mode", "name_data", "gpu_ids", "nch_ker", "max_minutes", "input", "output", "what")

    mode: str = flag("train", "train, test, predict or export", "run", choices=MODES)
    scope: str = flag("unet", "name of the experiment, a folder; test, predict, export: several with commas", "run")
    name_data: str = flag("em", "name of the database, a folder", "run")
    dir_data: str = flag("./datasets", "folder of the databases", "run")
    dir_checkpoint: str = flag("./checkpoints", "folder of the checkpoints", "run")
    dir_log: str = flag("./log", "folder of arg.txt and the TensorBoard events", "run")
    dir_result: str = flag("./results", "folder of the test results", "run")
    gpu_ids: str = flag("0", "comma-separated GPU numbers, one process each; -1: CPU; mps: Apple's", "run", GPU_LIST)
    seed: int = flag(0, "random seed", "run", up_to(2**63 - 1))
    dist_timeout: float = flag(600.0, "timeout for other processes [s]", "run", positive_up_to(1e7))
    train_continue: bool = flag(True, "resume from the newest checkpoint, or --epoch; off: a new training", "run")
    epoch: int | str = flag(0, "epoch to load, also by predict and export (0 = newest), or best", "run", **EPOCH)

    nch_in: int = flag(0, "input channels (0 = from the data)", "model", up_to(10_000))
    nch_out: int = flag(0, "output channels (0 = 1 for two classes, else one per class)", "model", up_to(1000))
    nch_ker: int = flag(64, "channels of the first level", "model", between(1, 4096))
    num_level: int = flag(4, "number of levels: times that height and width are halved", "model", between(1, 6))
    norm: str = flag("bnorm", "normalisation after each convolution", "model", choices=NORM)
    pool: str = flag("avg", "pooling between the levels", "model", choices=("avg", "max"))
    dropout: float = flag(0.0, "dropout probability at the bottom of the network", "model", FRACTION)
    init: str = flag("kaiming", "initialisation of the weights", "model", choices=INIT)
    init_from: str = flag(
        "",
        f"checkpoint, or folder of some, or {' or '.join(PRETRAINED)}, whose weights to begin with where they fit",
        "model",
    )

    num_epoch: int = flag(300, "number of epochs, each with --num_crop crops", "training", between(1, COUNT))
    num_crop: int = flag(
        0, "crops per epoch (0 = one per image, more of large ones, at least 24)", "training", up_to(10**6)
    )
    max_minutes: float = flag(0.0, "minutes to train instead of --num_epoch (0 = off)", "training", up_to(1e7))
    batch_size: int = flag(4, "number of crops per step, over all processes", "training", between(1, 2**20))
    lr: float = flag(2e-3, "learning rate", "training", positive_up_to(1e30), alias="lr_G")
    beta1: float = flag(0.9, "beta1 of Adam and AdamW; momentum of SGD and RMSprop", "training", FRACTION)
    loss: str = flag(
        "auto",
        "bce: cross entropy; wbce: with the weight map of the U-Net paper; dice: 1 - Dice; bce+dice: sum of both; "
        "auto: wbce for two classes, bce for more",
        "training",
        choices=LOSS,
    )
    balance: bool = flag(False, "wbce: weight each class by the inverse of its frequency", "training")
    w0: float = flag(3.0, "wbce: additional weight between two touching objects", "training", up_to(1e6))
    sigma: float = flag(5.0, "wbce: width of the region with additional weight [px]", "training", between(0.1, 10))
    consistency: float = flag(
        0.0,
        "if pixels are not annotated, weight of the difference from the averaged network (0 = off)",
        "training",
        up_to(1e6),
    )
    optim: str = flag("adamw", "optimiser", "training", choices=("adam", "adamw", "sgd", "rmsprop"))
    schedule: str = flag("cosine", "learning rate over the run", "training", choices=("constant", "cosine"))
    warmup: float = flag(0.0, "fraction of the training with rising learning rate", "training", FRACTION)
    clip: float = flag(0.0, "clip the gradient norm (0 = off)", "training", up_to(1e9))
    amp: str = flag("auto", "mixed precision, not of exports (auto = bfloat16 if supported)", "training", choices=AMP)
    compile: str = flag("auto", "torch.compile (auto = in long trainings on a GPU)", "training", choices=AUTO_SWITCH)
    average: float = flag(0.99, "decay of the weight EMA (0 = off)", "training", FRACTION)
    best_score: str = flag("loss", "validation score by which an epoch is the best", "training", choices=BEST_SCORE)
    patience: int = flag(0, "end after so many epochs without a better score (0 = off)", "training", up_to(COUNT))

    ny_load: int = flag(256, "height of a training crop [px]", "data", between(1, 2**20))
    nx_load: int = flag(256, "width of a training crop [px]", "data", between(1, 2**20))
    normalize: str = flag(
        "image", "normalise by mean and standard deviation of each image, or of the training set", "data", choices=BY
    )
    cache_gb: float = flag(2.0, "keep a database up to this size in memory [GB]", "data", up_to(1e6))
    num_workers: int = flag(2, "number of processes that read a database not kept in memory", "data", up_to(1024))

    flip: bool = flag(True, "random flips", "augmentation")
    turn: bool = flag(True, "random quarter turns; half turns if the crop is not square", "augmentation")
    rotate: float = flag(0.0, "largest angle of a random rotation [degrees] (0 = off)", "augmentation", up_to(180))
    zoom: float = flag(1.0, "largest factor of a random zoom, in and out (1 = off)", "augmentation", between(1, 4))
    elastic: float = flag(10.0, "standard deviation of the displacement [px] (0 = off)", "augmentation", up_to(100))
    elastic_share: float = flag(0.5, "fraction of the crops with elastic displacement", "augmentation", up_to(1))
    elastic_grid: int = flag(3, "number of nodes per side of the elastic grid", "augmentation", between(2, 256))
    brightness: float = flag(0.2, "random shift in standard deviations (0 = off)", "augmentation", up_to(100))
    contrast: float = flag(0.2, "random factor in 1 +- this value (0 = off)", "augmentation", FRACTION)
    gamma: float = flag(0.0, "largest logarithm of a random gamma (0 = off)", "augmentation", up_to(5))
    blur: float = flag(0.0, "largest sigma of a random Gaussian blur [px] (0 = off)", "augmentation", up_to(20))
    noise: float = flag(0.0, "random noise in standard deviations (0 = off)", "augmentation", up_to(100))

    input: str = flag("", "images, stacks, folders, patterns or Zarr, in natural order", "predict", nargs="+")
    output: str = flag(
        "", "file (.tif, .npy, .zarr, .png, .csv, .zip) or folder to write; file of an export", "predict", OUTPUT_NAME
    )
    what: str = flag("probability", f"outputs, comma-separated: {', '.join(WHAT)}", "predict", WHAT_LIST)
    pretrained: str = flag(
        "", "network that comes along, instead of a checkpoint", "predict", choices=("", *PRETRAINED)
    )
    page: bool = flag(True, "write a page, index.html, into a folder", "predict")
    unlabelled_only: bool = flag(False, "leave out files whose images are all in the database", "predict")
    channel: str = flag("", CHANNEL, "predict")
    series: str = flag("", SERIES, "predict")
    section: str = flag("", SECTION, "predict")
    dtype: str = flag("uint8", "type of the probability: 0 to 255, or 0 to 1", "predict", choices=("uint8", "float32"))
    compression: str = flag("auto", "of TIFFs (auto = zlib for mask and cells)", "predict", choices=COMPRESSION)
    numbers: bool = flag(True, "draw the numbers of the objects into the overlay", "predict")
    link: float = flag(
        0.0, "objects of adjacent sections that overlap by this IoU get one number (0 = off)", "predict", up_to(1)
    )
    scale: str = flag(
        "1",
        "resample images for the network to be so many times larger, or to its training's pixels: auto",
        "predict",
        SCALE,
    )

    format: str = flag("onnx", "format of the export", "export", choices=("onnx", "torchscript", "bioimageio"))
    author: str = flag("", "bioimageio: authors of the network, comma-separated", "export")
    license: str = flag("", "bioimageio: SPDX identifier of the network's licence, such as CC-BY-4.0", "export")

    split: str = flag("test", "samples to test", "test", choices=("test", "val", "train"))
    tta: bool = flag(True, "test-time augmentation (8 flips and quarter turns) in test and predict", "test")
    tile: int = flag(
        0,
        "height of a tile in validation, test and predict [px], a multiple of 16 and at least 64; the width is four "
        "times the height (0 = by memory)",
        "test",
        TILE,
    )
    background: str = flag("", "background class, which has no objects, by name or value (default: as trained)", "test")
    threshold: float | None = flag(
        None, "probability above which a pixel is foreground (default: chosen in the training)", "test", UNIT, **NUMBER
    )
    min_size: int = flag(-1, "drop smaller objects [px] (-1 = by the training labels)", "test", between(-1, 10**12))
    fill_holes: str = flag("auto", "fill holes (auto = by the training labels)", "test", choices=AUTO_SWITCH)
    certainty: float | None = flag(
        None, "drop objects whose probability is nowhere above this (default: as trained)", "test", UNIT, **NUMBER
    )

    num_freq_disp: int = flag(10, "number of epochs between two pictures in TensorBoard", "log", between(1, COUNT))
    num_freq_score: int = flag(50, "number of epochs between two scorings of segments", "log", between(1, COUNT))
    num_freq_save: int = flag(50, "number of epochs between two checkpoints", "log", between(1, COUNT))

    def __post_init__(self) -> None:
        super().__post_init__()
        for scope in self.scopes:
            check_name("--scope", scope)
        if len({*self.scopes}) < len(self.scopes):
            raise FlagError(f"--scope {self.scope}: names a network twice: name each once")
        self._check_mode()
        self._check_what()
        if self.mode == "train" and len(self.scopes) > 1:
            raise FlagError(f"--scope {self.scope}: --mode train trains one network: name one scope, without a comma")

    def _check_mode(self) -> None:
        """Refuse a flag that has no effect in this mode: without --mode predict its flags would start a training."""
        for item in fields(self):
            modes: tuple[str, ...] = MODES_OF.get(item.name) or MODES_OF_GROUP.get(item.metadata["group"]) or MODES
            if self.mode not in modes and (given := self.given(item.name)):
                advice = "add it" if self.mode == MODES[0] else f"change --mode {self.mode}"
                raise FlagError(
                    f"{given}: applies to --mode {' or '.join(modes)}: {advice}, or leave --{item.name} out"
                )
        if self.mode == MODES[0] and not self.train_continue and (given := self.given("epoch")):
            raise FlagError(f"{given}: applies to --train_continue on: add it, or leave --epoch out")

        if self.pretrained and (given := self.given("scope", "epoch")):
            raise FlagError(f"--pretrained {self.pretrained} {given}: each names a network: leave one out")

    def _check_what(self) -> None:
        """Refuse flags of outputs that predict does not write."""
        what = {*self.what.split(",")} if self.mode == "predict" else {*WHAT}
        for name, outputs in NEEDED_BY.items():
            if (given := self.given(name)) and not what & {*outputs}:
                applies = f"applies to {'objects' if name in OF_FILTER else ', '.join(outputs)}"
                raise FlagError(f"{given}: {applies}: add {outputs[0]} to --what {self.what}")

    @property
    def given_filter(self) -> dict[str, Any]:
        """`--min_size`, `--fill_holes` and `--certainty`, where they are not left out."""
        given: dict[str, Any] = {} if self.min_size < 0 else {"min_size": self.min_size}
        given |= {} if self.fill_holes == "auto" else {"fill_holes": self.fill_holes == SWITCH[0]}
        return given | ({} if self.certainty is None else {"certainty": self.certainty})

    @property
    def scopes(self) -> list[str]:
        """Each name in `--scope`: more than one for an ensemble."""
        return self.scope.split(",")

    @property
    def checkpoint_folders(self) -> list[Path]:
        """Folder of the checkpoints of each scope, or the file of a pretrained network."""
        if self.pretrained:
            return [find_network(self.pretrained)]
        return [replace(self, scope=scope).folder("checkpoint") for scope in self.scopes]

    def folder(self, name: str) -> Path:
        """Folder of this run: `data`, `checkpoint`, `log` or `result`; databases belong to no scope."""
        scope = () if name == "data" else (self.scope,)
        return Path(getattr(self, f"dir_{name}"), *scope, self.name_data)


OF_LABELS = ("unlabelled", "threshold", "objects", "background", "foreground", "ignore", "class_names", "fold")
# flags without effect on another source
OF_SOURCE = {"phantom": "synthetic", "size": "synthetic", "url": "download", "to": "add", "replace": "add"}
KEPT_BY_ADD = ("overwrite", "unlabelled", "threshold", "objects", "foreground", "class_names", "context")
OF_SPLIT = ("num_val", "num_test", "split", "fold", "seed")


@dataclass(frozen=True)
class DatabaseFlags(Flags):
    """All flags of `run_make_database.py`."""

    program = "run_make_database.py"
    beginner = ("name_data", "input", "label", "class_names", "objects", "ignore", "split", "info")

    dir_data: str = flag("./datasets", "folder of the databases", "database")
    name_data: str = flag("em", "name of the database, a folder", "database")
    overwrite: bool = flag(False, "replace an existing database", "database")

    input: str = flag("", "images: stacks, folders, patterns (default: train-volume.tif)", "source", nargs="+")
    label: str = flag("", "label images, or none (default: train-labels.tif)", "source", nargs="+")
    add: str = flag("", "annotated images to add to the database; --label names their labels", "source", nargs="+")
    to: str = flag("train", "--add: set that the images are added to", "source", choices=SETS)
    replace: bool = flag(False, "--add: images that are in the database get their new labels", "source")
    unlabelled: str = flag("", "images without labels that the training learns from, too", "source", nargs="+")
    labelled_only: bool = flag(False, "leave out images without a label", "source")
    channel: str = flag("", CHANNEL, "source")
    series: str = flag("", SERIES, "source")
    section: str = flag("", SECTION, "source")
    info: str = flag("", "print what these files hold and how they are read, and make nothing", "source", nargs="+")
    threshold: float | None = flag(None, "make two classes: label values above it are class 1", "source", **NUMBER)
    objects: bool = flag(False, "the labels number the objects: make two classes, background and object", "source")
    background: str = flag("", "label value, palette index or r,g,b of class 0 (default: the lowest)", "source")
    foreground: str = flag("", "label value of class 1, if there are two classes (default: the higher)", "source")
    ignore: str = flag("", "label value, palette index or r,g,b of pixels that are not annotated", "source")
    class_names: str = flag("", "names of the classes in the order of their values, comma-separated", "source")
    synthetic: int = flag(0, "sections to draw and use (no value = 30)", "source", up_to(10_000), **DRAWN)
    phantom: str = flag("em", "what to draw; rare: nuclei on 2 % of the pixels", "source", choices=PHANTOM)
    size: int = flag(256, "height and width of a synthetic section [px]", "source", between(32, 2**14))
    download: bool = flag(False, "download and use the ISBI 2012 EM stack", "source")
    url: str = flag("", "URL of that stack (default: of downloads.imagej.net)", "source")

    context: int = flag(0, "neighbouring sections per side as extra channels (2.5D)", "source", up_to(64))

    num_val: int = flag(-1, "number of validation samples (-1 = a tenth, at least one)", "split", at_least(-1))
    num_test: int = flag(-1, "number of test samples (-1 = a tenth, at least one)", "split", at_least(-1))
    split: str = flag(
        "auto",
        "blocks, random sections, or regions of each image; auto: blocks, or as in the database that is replaced",
        "split",
        choices=SPLIT,
    )
    fold: str = flag("", "K/N: test the K-th of N parts, validate on the one before it", "split", FOLD)
    seed: int = flag(0, "seed of the random split and of the synthetic images", "split", up_to(2**63 - 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_source()
        self._check_split()
        if self.add:
            self._check_add()
        if self.label == NO_LABEL:
            self._check_unlabelled()

    def _check_source(self) -> None:
        """Refuse several sources of the images, and a flag of a source that is not used."""
        sources = [f"--{name}" for name in ("info", "input", "add", "synthetic", "download") if getattr(self, name)]
        if len(sources) > 1:
            raise FlagError(f"{' and '.join(sources)}: each says which images to use: give one of them")
        if (self.synthetic or self.download) and self.label not in ("", NO_LABEL):
            raise FlagError(f"{self.given('label')}: the images of {sources[0]} have labels: leave it out")
        for name, source in OF_SOURCE.items():
            if self.given(name) and not getattr(self, source):
                raise FlagError(f"{self.given(name)}: applies to --{source} only: add that, or leave --{name} out")

    def _check_add(self) -> None:
        """Refuse flags of what stays as it is when images are added, and images without labels."""
        if given := self.given(*KEPT_BY_ADD, *OF_SPLIT):
            raise FlagError(f"--add {given}: the classes, channels and sets of the database stay: leave {given} out")
        if self.label in ("", NO_LABEL):
            raise FlagError(f"{self.given('add')}: images that are added need labels: give --label LABELS")

    def _check_split(self) -> None:
        """Refuse flags of the splits that don't go together."""
        numbers = self.given("num_val", "num_test")
        if self.fold and self.split == "region":
            raise FlagError(f"--fold {self.fold} --split region: folds are of whole images: leave one out")
        if self.fold and numbers:
            raise FlagError(f"--fold {self.fold} {numbers}: a fold has its own numbers: leave one out")
        if self.split == "region" and max(self.num_val, self.num_test) > 0:
            raise FlagError(f"--split region {numbers}: each image has one region per set: give 0 for none")

    def _check_unlabelled(self) -> None:
        """Refuse flags of labels and splits, which images without labels don't have."""
        names = [*OF_LABELS, *(["split"] if self.split == "region" else [])]
        names += [name for name in ("num_val", "num_test") if getattr(self, name) > 0]
        if given := self.given(*names):
            reason = "images without labels have no classes, and are all for the test"
            raise FlagError(f"--label {NO_LABEL} {given}: {reason}: leave one out")


@dataclass(frozen=True)
class DisplayFlags(Flags):
    """All flags of `display_result.py`."""

    program = "display_result.py"

    dir_result: str = flag("./results", "folder of the test results", "figure")
    scope: str = flag("unet", "name of the experiment, a folder", "figure")
    name_data: str = flag("em", "name of the database, a folder", "figure")
    num: int = flag(5, "number of images to show, 1 to 40", "figure", between(1, MAX_SHOWN))
    overlay: bool = flag(False, "add rows with outlines of label and output, and with errors", "figure")
    worst: bool = flag(False, "show the images with the highest pixel error", "figure")
    save: str = flag("", "file to write, in any format of matplotlib (default: figure.png)", "figure", OUTPUT_NAME)
    show: bool = flag(False, "also open a window", "figure")
