"""What a database says of itself, which a checkpoint keeps of its training data, too. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from exchange import finish_exchange
from images.drawing import Range, grey_range, picture_channels
from images.profile import Profile, channels_by_name, compare
from images.rows import full_name
from images.statistics import Moments, ObjectSizes
from rules import is_integer, is_list, is_number
from samples import DISTANCE, ENTRIES, IGNORE, SPLITS, SampleFile, check_values, list_samples, map_npy
from utils import UserError, printable

NORMALIZE = ("data", "image", "legacy")
NUM_SHOWN = 4096  # random pixels of each training image that the grey range of pictures is measured on
MAX_CLASS = 32  # more label values come from lossy compression, interpolation or numbered objects


@dataclass(frozen=True)
class DataInfo:
    """Description of a database, also stored in a checkpoint."""

    nch_in: int
    class_values: list  # in the label images, for each class: a number, an [r, g, b] colour, or a word
    class_names: list[str]  # with two classes, class 1 is the foreground
    class_share: list[float]  # fraction of the annotated training pixels of each class
    mean: list[float]  # of each channel over the training split, in grey values
    std: list[float]
    # grey values shown as black and white, of all channels in a picture or of each, see `images.drawing.grey_range`
    value_range: Range
    # by `mean` and `std`, each image by its own, or by data type as pytorch-UNET did; set by the training
    normalize: str = "data"
    context: int = 0  # neighbouring sections above, and as many below, in the channels; the top section comes first
    ignore: float | list[int] | None = None  # label value of pixels that are not annotated, if there are such pixels
    min_size: list[int] | None = None  # [px] that hardly any object of each class falls below, see `ObjectSizes`
    fill_holes: list[bool] | None = None  # whether hardly any object of each class has a hole
    # grey value in the first channel of the section itself, over the annotated pixels; None: a class has no pixels
    class_mean: list[float] | None = None
    gap: int = 0  # [px] that was left between objects that touch; predicted objects grow back over it
    profile: Profile | None = None  # of the images of the training split; None: the database is older

    @property
    def num_class(self) -> int:
        """Number of classes."""
        return len(self.class_values)

    @property
    def is_partial(self) -> bool:
        """Whether labels may contain pixels that are not annotated."""
        return self.ignore is not None

    @property
    def numbers_objects(self) -> bool:
        """Whether the labels number the objects, which two classes were made of."""
        return sorted(map(str, self.class_values)) == ["background", "object"]

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
        """Description read from `dataset.json` or a checkpoint."""
        advice = "choose another checkpoint with --epoch" if origin.suffix == ".pth" else "make the database again"
        values = values if isinstance(values, dict) else {}
        missing = [item.name for item in fields(cls) if item.default is MISSING and item.name not in values]
        if missing:
            raise UserError(f"{origin}: no entry {', '.join(missing)}: {advice}")
        info = cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})
        if isinstance(info.class_values, list):  # earlier versions wrote those of bool labels as they are
            info = replace(info, class_values=[_class_value(value) for value in info.class_values])
        profile: Any = info.profile
        if isinstance(profile, dict) and is_integer(info.context) and is_integer(info.nch_in, 1):
            profile = Profile.from_dict(profile, info.num_own) or profile
            info = replace(info, profile=profile)
        return info.checked(origin, advice)

    def checked(self, origin: Path, advice: str) -> DataInfo:
        """The same description, if its entries keep their rules; the error ends with the advice."""
        for name, is_valid in _RULES.items():
            if not is_valid(self):
                raise UserError(f"{origin}: {name} is {getattr(self, name)!r:.60}, which can't be used: {advice}")
        return self


def own_channels(nch_in: int, context: int) -> slice:
    """Channels of a section itself among those of its neighbours, `context` on each side."""
    nch = nch_in // (2 * context + 1)
    return slice(context * nch, (context + 1) * nch)


def _is_class_value(value: Any) -> bool:
    return isinstance(value, str) or _is_grey(value) or is_list(value, lambda part: is_number(part, 0, 255), 3)


def _is_grey(value: Any) -> bool:
    """Whether a value is a number of float32."""
    return is_number(value, -3e38, 3e38)


def _is_range(values: Any) -> bool:
    return is_list(values, _is_grey, 2) and values[0] <= values[1]


def _class_value(value: Any) -> Any:
    """Value of a class: for one of a bool label, or a float without a fraction, the whole number."""
    return int(value) if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()) else value


# rule of each entry, which may rely on the entries before it
_RULES: dict[str, Callable[[DataInfo], bool]] = {
    "nch_in": lambda info: is_integer(info.nch_in, 1, 2**16),
    "class_values": lambda info: is_list(info.class_values, _is_class_value) and _are_classes(info.class_values),
    "class_names": lambda info: is_list(info.class_names, _is_name, info.num_class) and _are_classes(info.class_names),
    "class_share": lambda info: is_list(info.class_share, lambda share: is_number(share, 0, 1), info.num_class),
    "mean": lambda info: is_list(info.mean, _is_grey, info.nch_in),
    "std": lambda info: is_list(info.std, lambda std: is_number(std, 1e-37, 3e38), info.nch_in),
    "normalize": lambda info: info.normalize in NORMALIZE,
    "context": lambda info: is_integer(info.context, 0, 2**15) and info.nch_in % (2 * info.context + 1) == 0,
    "value_range": lambda info: _is_range(info.value_range) or is_list(info.value_range, _is_range, info.num_own),
    "ignore": lambda info: (
        info.ignore is None
        or (_is_class_value(info.ignore) and info.ignore not in info.class_values and info.num_class <= IGNORE)
    ),
    "min_size": lambda info: info.min_size is None or is_list(info.min_size, is_integer, info.num_class),
    "fill_holes": lambda info: (
        info.fill_holes is None or is_list(info.fill_holes, lambda fill: isinstance(fill, bool), info.num_class)
    ),
    "gap": lambda info: is_integer(info.gap, 0, 2),
    "profile": lambda info: info.profile is None or isinstance(info.profile, Profile),
    "class_mean": lambda info: info.class_mean is None or is_list(info.class_mean, _is_grey, info.num_class),
}


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable()


def _are_classes(values: list) -> bool:
    """Whether values tell classes apart, and an index of 8 bits suffices for them."""
    return len(values) <= 256 and all(values.count(value) == 1 for value in values)


def differences(trained: DataInfo, profile: Profile | None, source: object, advice: str = "") -> list[str]:
    """Notes on how images differ from those of a training; refuses those of another scale."""
    if not (trained.profile and profile) or len(trained.profile.mean) != len(profile.mean):
        return []
    std = trained.std[trained.own_channels]
    by_data = trained.normalize == "data"
    return compare(trained.profile, profile, std, source, by_data=by_data, advice=advice)


def compare_databases(trained: DataInfo, new: DataInfo, source: object) -> list[str]:
    """Notes on how a database differs from that of a training; refuses other channels, and another scale."""
    if trained.profile and new.profile and channels_by_name(trained.profile.channels, new.profile.channels, source):
        what = f"{source}: its channels are {', '.join(new.profile.channels)}"
        order = ",".join(trained.profile.channels)
        raise UserError(f"{what}, the network was trained on {order}: make the database with --channel {order}")
    return differences(trained, new.profile, source)


def find_description(folder: Path) -> Path | None:
    """File with the description of a database; None for pytorch-UNET's layout, which has none."""
    finish_exchange(folder, ENTRIES)
    path = folder / "dataset.json"
    for entry in (folder / name for name in ENTRIES):
        if entry.exists() and not (entry.is_file() if entry.suffix else entry.is_dir()):
            what = "file" if entry.suffix else "folder"
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
    """Read the description of a database; without `dataset.json`, measure it on the training samples."""
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
    """Sixteen hexadecimal digits that tell a database from one that was made again; copies have the same."""
    path = find_description(folder)
    if path:
        content = path.read_bytes()
    else:  # names and sizes of the files
        files = sorted(file for split in SPLITS for file in (folder / split).glob("*.npy"))
        entries = [(file.parent.name, file.name, file.stat().st_size) for file in files]
        content = repr([entry for entry in entries if not entry[1].endswith(DISTANCE)]).encode()
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class Origin:
    """Where a sample comes from."""

    name: str  # of the image file, with the series, page, rows and columns where the sample is a part of it
    pixel_size: tuple[float, float] | None = None  # height and width [µm], if the file gives it


def sample_origins(folder: Path, split: str) -> dict[str, Origin]:
    """Origin of the samples of a split by the names of their files, where the description of the database has it."""
    path = find_description(folder)
    try:
        samples = json.loads(path.read_text("utf-8"))["samples"] if path else {}
        stacks = {_series(entry) for entries in samples.values() for entry in entries if _index(entry)}
        return {entry["file"]: _origin(entry, paged=_series(entry) in stacks) for entry in samples.get(split, [])}
    except (AttributeError, LookupError, TypeError):  # no such entries
        return {}


def _series(entry: dict[str, Any]) -> tuple[str, str]:
    """File of a sample and series in it."""
    return entry["source"], entry.get("series", "")


def _index(entry: dict[str, Any]) -> int:
    """Index of the image of a sample in its series, or in its file if that has one series."""
    return entry.get("frame_of_series" if "series" in entry else "frame", 0)


def _origin(entry: dict[str, Any], *, paged: bool) -> Origin:
    """Origin as its entry in the description tells it."""
    parts = [full_name(entry["source"], entry["series"]) if "series" in entry else entry["source"]]
    if paged:
        parts.append(f"page {_index(entry) + 1}")
    parts += ["{} {} to {}".format(name, *entry[name]) for name in ("rows", "columns") if name in entry]
    size: Any = entry.get("pixel_size")
    is_size = is_list(size, lambda side: is_number(side, 1e-9, 3e38), 2)
    return Origin(printable(", ".join(parts)), (size[0], size[1]) if is_size else None)


def check_samples(files: Sequence[SampleFile], info: DataInfo, *, labelled: bool) -> list[tuple[int, int]]:
    """Height and width of each sample [px]; each is opened once, and its channels are checked."""
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
    """Description of a training split, measured on the image (H, W, C) and class indices (H, W) of each sample."""
    moments = moments or Moments()  # of a caller that wants the true deviation of a constant channel
    sizes, sums = ObjectSizes(len(class_values)), np.zeros((2, len(class_values)))
    rng, pixels = np.random.default_rng(0), []
    for image, label in samples:
        moments.add(image)
        section = image[..., own_channels(image.shape[2], context)]
        pixels.append(_random_pixels(section[..., picture_channels(section.shape[2])], rng))
        if label is not None:
            sizes.add(label)
            _add_class_sums(sums, section[..., 0], label)
    mean, std = moments.statistics()
    return DataInfo(
        nch_in=image.shape[2],
        class_values=class_values,
        class_names=class_names or [str(value) for value in class_values],
        class_share=(sums[0] / max(sums[0].sum(), 1)).tolist(),
        mean=mean.tolist(),
        std=std.tolist(),
        value_range=grey_range(np.concatenate(pixels)),
        min_size=sizes.min_size,
        fill_holes=sizes.fill_holes,
        context=context,
        class_mean=(sums[1] / sums[0]).tolist() if sums[0].all() else None,
    )


def _random_pixels(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pixels (NUM_SHOWN, C) of an image (H, W, C)."""
    y, x = (rng.integers(0, length, NUM_SHOWN) for length in image.shape[:2])
    return image[y, x]


def _add_class_sums(sums: np.ndarray, image: np.ndarray, label: np.ndarray) -> None:
    """Add the number of pixels and the sum of grey values (2, num_class) of an image (H, W) and its label (H, W)."""
    num = sums.shape[1]
    for top in range(0, len(label), 512):  # rows that are converted at a time
        grey, classes = (np.ravel(array[top : top + 512]) for array in (image, label))
        sums[0] += np.bincount(classes, minlength=num)[:num]  # without IGNORE
        sums[1] += np.bincount(classes, grey.astype(np.float64), num)[:num]
