"""What a database says of itself, which a checkpoint keeps of its training data, too. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from files import finish_exchange
from images.drawing import Range, grey_range, picture_channels
from images.rows import full_name
from images.statistics import Moments, ObjectSizes
from samples import DISTANCE, ENTRIES, IGNORE, SPLITS, SampleFile, check_values, list_samples, map_npy
from utils import UserError, printable

NORMALIZE = ("data", "image", "legacy")
NUM_SHOWN = 4096  # random pixels of each training image that the grey range of pictures is measured on
MAX_CLASS = 32  # more label values come from lossy compression, interpolation or numbered objects


@dataclass(frozen=True)
class DataInfo:
    """Description of a database, also stored in a checkpoint.

    Attributes
    ----------
    nch_in : int
        Number of input channels.
    class_values : list
        Value of each class in the label images: a number, or an [r, g, b] colour.
    class_names : list of str
        Name of each class. With two classes, class 1 is the foreground.
    class_share : list of float
        Fraction of the annotated training pixels of each class.
    mean, std : list of float
        Mean and standard deviation of each channel over the training split, in grey values.
    value_range : list of float, or list of such lists
        Grey values shown as black and white in a picture, of all channels of the section itself that are shown, or of
        each; see `images.drawing.grey_range`.
    normalize : {"data", "image", "legacy"}
        Normalise images by `mean` and `std`, each image by its own, or by data type as pytorch-UNET did. Chosen by the
        training, not by the database.
    context : int
        Number of neighbouring sections above, and as many below, in the input channels; the top section comes first.
    ignore : int, float, list of int or None
        Label value of pixels that are not annotated, whose class index is `IGNORE`; None: all pixels are annotated.
    min_size : list of int or None
        Area [px] of each class that hardly any training object falls below, see `ObjectSizes`; None in older files.
    fill_holes : list of bool or None
        Whether hardly any training object of each class has a hole; None in older files.
    class_mean : list of float or None
        Mean grey value of each class in the first channel of the section itself, over the annotated training pixels;
        None: a class has no pixels, or the database is of before this entry.
    """

    nch_in: int
    class_values: list
    class_names: list[str]
    class_share: list[float]
    mean: list[float]
    std: list[float]
    value_range: Range
    normalize: str = "data"
    context: int = 0
    ignore: float | list[int] | None = None
    min_size: list[int] | None = None
    fill_holes: list[bool] | None = None
    class_mean: list[float] | None = None

    @property
    def num_class(self) -> int:
        """Number of classes."""
        return len(self.class_values)

    @property
    def is_partial(self) -> bool:
        """Whether labels may contain pixels that are not annotated."""
        return self.ignore is not None

    @property
    def own_channels(self) -> slice:
        """Channels of the section itself, which lies between its neighbours."""
        return own_channels(self.nch_in, self.context)

    @property
    def num_own(self) -> int:
        """Number of channels of the section itself."""
        return len(range(self.nch_in)[self.own_channels])

    @classmethod
    def from_dict(cls, values: dict, origin: Path) -> DataInfo:
        """Description read from `dataset.json` or a checkpoint.

        Raises
        ------
        UserError
            An entry is missing or breaks its rule.
        """
        advice = "choose another checkpoint with --epoch" if origin.suffix == ".pth" else "make the database again"
        values = values if isinstance(values, dict) else {}
        missing = [item.name for item in fields(cls) if item.default is MISSING and item.name not in values]
        if missing:
            raise UserError(f"{origin}: no entry {', '.join(missing)}: {advice}")
        info = cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})
        if isinstance(info.class_values, list):  # earlier versions kept the values of bool labels as they are
            info = replace(info, class_values=[_class_value(value) for value in info.class_values])
        return info.checked(origin, advice)

    def checked(self, origin: Path, advice: str) -> DataInfo:
        """The same description, if it keeps its rules.

        Raises
        ------
        UserError
            An entry breaks its rule; the message ends with the advice.
        """
        for name, (holds, rule) in _RULES.items():
            if not holds(self):
                raise UserError(f"{origin}: {name} is {getattr(self, name)!r:.60}: must be {rule}: {advice}")
        return self


def own_channels(nch_in: int, context: int) -> slice:
    """Channels of a section itself among those of its neighbours, `context` on each side."""
    nch = nch_in // (2 * context + 1)
    return slice(context * nch, (context + 1) * nch)


def _is_number(value: Any, low: float = -3e38, high: float = 3e38) -> bool:
    """Whether a value is a finite number in a range, by default that of float32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _are_numbers(values: Any, num: int, low: float = -3e38, high: float = 3e38) -> bool:
    return _is_list(values, num) and all(_is_number(value, low, high) for value in values)


def _is_range(values: Any) -> bool:
    return _are_numbers(values, 2) and values[0] <= values[1]


def _is_list(values: Any, num: int) -> bool:
    return isinstance(values, list) and len(values) == num


def _is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and _is_number(value, low, high)


def _is_class_value(value: Any) -> bool:
    return isinstance(value, str) or _is_number(value) or _are_numbers(value, 3, 0, 255)


def _class_value(value: Any) -> Any:
    """Value of a class: for one of a bool label, or a float without a fraction, the whole number."""
    return int(value) if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()) else value


def _are_names(names: Any) -> bool:
    texts = isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)
    return texts and len({*names}) == len(names)


# test of each entry, which may rely on the entries before it, and its wording in messages
_RULES: dict[str, tuple[Callable[[DataInfo], bool], str]] = {
    "nch_in": (lambda info: _is_integer(info.nch_in, 1, 2**16), "a whole number of at least 1"),
    "class_values": (
        lambda info: (
            isinstance(info.class_values, list)
            and len(info.class_values) <= 256
            and all(_is_class_value(value) and info.class_values.count(value) == 1 for value in info.class_values)
        ),
        "a list of different numbers, colours or words",
    ),
    "class_names": (
        lambda info: _are_names(info.class_names) and len(info.class_names) == info.num_class,
        "a different printable name for each class",
    ),
    "class_share": (lambda info: _are_numbers(info.class_share, info.num_class, 0, 1), "a fraction for each class"),
    "mean": (lambda info: _are_numbers(info.mean, info.nch_in), "a number for each channel"),
    "std": (lambda info: _are_numbers(info.std, info.nch_in, 1e-37), "a positive number for each channel"),
    "normalize": (lambda info: info.normalize in NORMALIZE, f"one of {', '.join(NORMALIZE)}"),
    "context": (
        lambda info: _is_integer(info.context, 0, 2**15) and info.nch_in % (2 * info.context + 1) == 0,
        "a whole number such that 2 * context + 1 divides the number of channels",
    ),
    "value_range": (
        lambda info: (
            _is_range(info.value_range)
            or (_is_list(info.value_range, info.num_own) and all(map(_is_range, info.value_range)))
        ),
        "two numbers in order, or such a pair for each channel",
    ),
    "ignore": (
        lambda info: (
            info.ignore is None
            or (_is_class_value(info.ignore) and info.ignore not in info.class_values and info.num_class <= IGNORE)
        ),
        "a label value that no class has, or null",
    ),
    "min_size": (
        lambda info: (
            info.min_size is None
            or (_is_list(info.min_size, info.num_class) and all(_is_integer(n, 0, 2**62) for n in info.min_size))
        ),
        "a whole number of at least 0 for each class, or null",
    ),
    "fill_holes": (
        lambda info: (
            info.fill_holes is None
            or (_is_list(info.fill_holes, info.num_class) and all(isinstance(each, bool) for each in info.fill_holes))
        ),
        "true or false for each class, or null",
    ),
    "class_mean": (
        lambda info: info.class_mean is None or _are_numbers(info.class_mean, info.num_class),
        "a number for each class, or null",
    ),
}


def find_description(folder: Path) -> Path | None:
    """File with the description of a database; None for pytorch-UNET's layout, which has none.

    Raises
    ------
    UserError
        An entry is a file instead of a folder or the reverse, or the description of structured samples is missing.
    """
    finish_exchange(folder, ENTRIES)
    path = folder / "dataset.json"
    for entry in (folder / name for name in ENTRIES):
        if entry.exists() and not (entry.is_file() if entry == path else entry.is_dir()):
            what = "file" if entry == path else "folder"
            raise UserError(f"{entry}: not a {what}: move it elsewhere, and make the database again")
    if path.is_file():
        return path
    for split in SPLITS:
        samples = (file for file in (folder / split).glob("*.npy") if not file.name.endswith(DISTANCE))
        for file in islice(samples, 1):
            if map_npy(file).dtype.names:
                raise UserError(f"{folder}: samples without their dataset.json: make the database again")
    return None


def load_info(folder: Path) -> DataInfo:
    """Read the description of a database; without `dataset.json`, measure it on the training samples.

    Raises
    ------
    UserError
        There is no database, or `dataset.json` is damaged.
    """
    path = find_description(folder)
    if path:
        try:
            return DataInfo.from_dict(json.loads(path.read_text("utf-8")), path)
        except (ValueError, RecursionError) as error:
            reason = "too deep" if isinstance(error, RecursionError) else error
            raise UserError(f"{path}: not valid JSON ({reason}): make the database again") from error
    files = list_samples(folder / "train")
    values = sorted({value for file in files for value in _label_values(file)})
    if len(values) > MAX_CLASS:
        raise UserError(f"{folder}/train: {len(values)} label values, only {MAX_CLASS} are allowed: use class labels")
    values = [0, 255] if set(values) <= {0, 255} else values
    advice = "save the images and labels as numbers of another type"
    return describe((_checked_sample(file, values) for file in files), values).checked(folder / "train", advice)


def _label_values(file: SampleFile) -> list:
    """Values of the label of a sample of pytorch-UNET's layout."""
    label = _labelled(file)[1]
    if label.dtype.kind not in "buif" or (label.dtype.kind == "f" and not np.isfinite(label).all()):
        what = f"{label.dtype} with NaN or infinity" if label.dtype.kind == "f" else f"{label.dtype}"
        raise UserError(f"{file.label}: the label holds {what}: must be a finite number for each class: repair it")
    return [_class_value(value) for value in np.unique(label).tolist()]


def _checked_sample(file: SampleFile, class_values: list) -> tuple[np.ndarray, np.ndarray | None]:
    """Image and class indices of a sample that can be trained on."""
    image, label = file.open(class_values)
    check_values(file.input, image, label, len(class_values))
    return image, label


def identity(folder: Path) -> str:
    """Digest that tells a database from one that was made again: of its description, or the names and sizes of files.

    Sixteen hexadecimal digits. Copies of a database have the same.
    """
    path = find_description(folder)
    if path:
        content = path.read_bytes()
    else:
        files = sorted(file for split in SPLITS for file in (folder / split).glob("*.npy"))
        entries = [(file.parent.name, file.name, file.stat().st_size) for file in files]
        content = repr([entry for entry in entries if not entry[1].endswith(DISTANCE)]).encode()
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class Origin:
    """Where a sample comes from.

    Attributes
    ----------
    name : str
        Name of the image file, with the series, page, rows and columns where the sample is a part of it.
    pixel_size : (float, float) or None
        Height and width of a pixel [µm], if the file gives it.
    """

    name: str
    pixel_size: tuple[float, float] | None = None


def sample_origins(folder: Path, split: str) -> dict[str, Origin]:
    """Origin of the samples of a split by the names of their files, where the description of the database has it.

    Databases of earlier versions have no pixel size, and those of pytorch-UNET no origins.
    """
    path = find_description(folder)
    samples = json.loads(path.read_text("utf-8")).get("samples") if path else None
    if not isinstance(samples, dict):
        return {}
    entries = {
        name: [entry for entry in of if isinstance(entry, dict) and isinstance(entry.get("source"), str)]
        for name, of in samples.items()
        if isinstance(of, list)
    }
    stacks = {_series(entry) for of in entries.values() for entry in of if _index(entry)}  # of several pages
    return {str(entry.get("file")): _origin(entry, paged=_series(entry) in stacks) for entry in entries.get(split, [])}


def _series(entry: dict[str, Any]) -> tuple[str, str]:
    """File of a sample and series in it."""
    return entry["source"], str(entry.get("series"))


def _index(entry: dict[str, Any]) -> int:
    """Index of the image of a sample in its series, or in its file if that has one series; 0 if it is not known."""
    index = entry.get("frame_of_series" if isinstance(entry.get("series"), str) else "frame")
    return index if isinstance(index, int) else 0


def _origin(entry: dict[str, Any], *, paged: bool) -> Origin:
    """Origin as its entry in the description tells it."""
    series = entry.get("series")
    parts = [full_name(entry["source"], series) if isinstance(series, str) else entry["source"]]
    if paged:
        parts.append(f"page {_index(entry) + 1}")
    for name in ("rows", "columns"):
        if _are_numbers(entry.get(name), 2):
            parts.append("{} {} to {}".format(name, *entry[name]))
    size: Any = entry.get("pixel_size")
    return Origin(printable(", ".join(parts)), (size[0], size[1]) if _are_numbers(size, 2, 1e-9) else None)


def check_samples(files: list[SampleFile], info: DataInfo, *, labelled: bool) -> list[tuple[int, int]]:
    """Height and width of each sample [px]; each is opened once, and its channels are checked.

    Raises
    ------
    UserError
        A sample is damaged, has other channels than the database, or no label where `labelled` samples are needed.
    """
    shapes = []
    for file in files:
        image = (_labelled(file) if labelled else file.open())[0]
        if image.shape[2] != info.nch_in:
            raise UserError(f"{file.input}: {image.shape[2]} channels, expected {info.nch_in}: make the database again")
        shapes.append(image.shape[:2])
    return shapes


def _labelled(file: SampleFile) -> tuple[np.ndarray, np.ndarray]:
    image, label = file.open()
    if label is None:
        raise UserError(f"{file.input}: no label, so it can't be used for training: add it, or make the database again")
    return image, label


def describe(
    samples: Iterable[tuple[np.ndarray, np.ndarray | None]],
    class_values: list,
    class_names: list[str] | None = None,
    context: int = 0,
    moments: Moments | None = None,
) -> DataInfo:
    """Description of a training split, measured on its samples.

    Parameters
    ----------
    samples : iterable of (ndarray, ndarray or None)
        Image (H, W, C) and class indices (H, W) of each sample; at least one.
    class_values : list
        As in `DataInfo`.
    class_names : list of str, optional
        As in `DataInfo`; default: the values.
    context : int
        As in `DataInfo`.
    moments : Moments, optional
        Where the mean and standard deviation are measured, for a caller that wants the true one of a constant channel.
    """
    moments = moments or Moments()
    sizes, classes, shown = ObjectSizes(len(class_values)), _ClassPixels(len(class_values)), _ShownPixels()
    for image, label in samples:
        moments.add(image)
        own = image[..., own_channels(image.shape[2], context)]
        shown.add(own)
        if label is not None:
            sizes.add(label)
            classes.add(own[..., 0], label)
    mean, std = moments.statistics()
    return DataInfo(
        nch_in=image.shape[2],
        class_values=class_values,
        class_names=class_names or [str(value) for value in class_values],
        class_share=classes.share,
        mean=mean.tolist(),
        std=std.tolist(),
        value_range=grey_range(np.concatenate(shown.pixels)),
        min_size=sizes.min_size,
        fill_holes=sizes.fill_holes,
        context=context,
        class_mean=classes.mean,
    )


class _ShownPixels:
    """A random choice of pixels (n, C) of images given one by one, with the channels that pictures show."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self.pixels: list[np.ndarray] = []

    def add(self, image: np.ndarray) -> None:
        """Add pixels of an image (H, W, C)."""
        y, x = (self._rng.integers(0, length, NUM_SHOWN) for length in image.shape[:2])
        self.pixels.append(image[y, x, picture_channels(image.shape[2])])


class _ClassPixels:
    """Number and mean grey value of the pixels of each class, in labels given one by one."""

    def __init__(self, num_class: int) -> None:
        self._count, self._grey = np.zeros(num_class), np.zeros(num_class)

    def add(self, image: np.ndarray, label: np.ndarray) -> None:
        """Add the grey values (H, W) and the label (H, W) of an image."""
        num = len(self._count)
        for top in range(0, len(label), 512):  # rows that are converted at a time
            grey, classes = (np.ravel(array[top : top + 512]) for array in (image, label))
            self._count += np.bincount(classes, minlength=num)[:num]  # without IGNORE
            self._grey += np.bincount(classes, grey.astype(np.float64), num)[:num]

    @property
    def share(self) -> list[float]:
        """Fraction of the annotated pixels of each class."""
        return (self._count / max(self._count.sum(), 1)).tolist()

    @property
    def mean(self) -> list[float] | None:
        """Mean grey value of each class; None if one has no pixels."""
        return (self._grey / self._count).tolist() if self._count.all() else None
