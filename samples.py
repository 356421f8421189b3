"""A sample on the disk: one structured `.npy`, or a pair of files of pytorch-UNET. Imports no torch."""

from __future__ import annotations

import errno
import hashlib
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import SETS
from exchange import finish_exchange
from images.statistics import LARGEST
from utils import UserError, folder_hint, natural_key

SPLITS = SETS
UNLABELLED = "unlabelled"  # folder of samples without labels, which a training learns from, too
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
# names in the folder of a split that this program or pytorch-UNET gives: samples, their distances and partial files
SAMPLES = r"((input|label)_?)?\d+(\.distance)?\.npy|\..*\.partial"
# of a database's folder, replaced together, each with the names of what may be removed in it
ENTRIES = dict.fromkeys((*SPLITS, UNLABELLED), SAMPLES) | {"dataset.json": "", "index.html": ""}
DISTANCE = ".distance.npy"  # suffix of the file with `weight_map.border_distance` of a sample
OF_PAIR = "of_"  # prefix of that file in pytorch-UNET's layout, where names with `input` and `label` first are samples
NUM_ROW = 512  # rows of a sample that are read at once
IGNORE = 255  # class index of pixels that are not annotated
PAUSES = (0.1, 0.4, 1.5, 3.0)  # [s] after which a file that can't be read is tried again
# errors of a file whose network folder may be back in a moment
TRANSIENT = {errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENOTCONN}
TRANSIENT |= {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT}


class SampleFile(NamedTuple):
    """Files of a sample: one structured `.npy`, or pytorch-UNET's pair `input_000.npy`, `label_000.npy`."""

    input: Path  # with the image
    label: Path | None = None  # in the pair layout

    @property
    def num_byte(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self if path)

    @property
    def distance(self) -> Path:
        """File next to the sample that caches the border distance for the weight map."""
        path = self.input.with_suffix(DISTANCE)
        return path if self.label is None else path.with_name(OF_PAIR + path.name)

    def open(self, class_values: list | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Image (H, W, C) and class indices (H, W), memory-mapped.

        The label values of the pair layout are converted, given the value of each class; else they are returned.
        """
        array = map_npy(self.input)
        label = None
        if array.dtype.names:
            if "input" not in array.dtype.names or array.ndim != 2:
                raise UserError(f"{self.input}: must be (H, W) with the field 'input': make the database again")
            image, label = array["input"], array["label"] if "label" in array.dtype.names else None
        else:
            image = array
            if self.label is not None:
                label = map_npy(self.label)
                label = label[..., 0] if label.ndim == 3 and label.shape[-1] == 1 else label
                label = label if class_values is None else to_indices(label, class_values, self.label)
        image = image if image.ndim == 3 else image[..., None]
        if image.ndim != 3 or 0 in image.shape or image.dtype.kind not in "uifb":
            raise UserError(f"{self.input}: input has shape {image.shape} of {image.dtype}, must be (H, W, C) numbers")
        if label is not None and label.shape != image.shape[:2]:
            what = f"label has shape {label.shape}, the input {image.shape[:2]}"
            raise UserError(f"{self.input}: {what}: they must agree")
        return image, label

    def open_distance(self) -> np.ndarray:
        """Border distance (H, W) [px] for the weight map, memory-mapped."""
        distance, shape = map_npy(self.distance), self.open()[0].shape[:2]
        if distance.shape != shape or distance.dtype != np.float16:
            what = f"{distance.dtype} of shape {distance.shape}, must be float16 of shape {shape}"
            raise UserError(f"{self.distance}: {what}: train with --loss wbce, which makes it again")
        return distance


def map_npy(path: Path) -> np.ndarray:
    """Memory-mapped array of a `.npy`; never unpickled."""
    if path.exists() and not path.is_file():  # opening a pipe would block
        raise UserError(f"{path}: not a regular file: make the database again")
    try:
        return _open_patiently(path)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}): make the database again") from error
    except Exception as error:  # pickled objects, another format, a truncated file or a damaged header
        reason = str(error).partition("\n")[0]  # the other lines advise to trust the file
        raise UserError(f"{path}: refused as a sample ({reason}): make the database again") from error


def _open_patiently(path: Path) -> np.ndarray:
    """Open a `.npy`, a few times if the system can't read it; it was listed, so it was there a moment ago."""
    for pause in PAUSES:
        try:
            return np.lib.format.open_memmap(path, mode="r")
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            time.sleep(pause)
    return np.lib.format.open_memmap(path, mode="r")


def to_indices(label: np.ndarray, class_values: list, path: Path) -> np.ndarray:
    """Class index of each label value."""
    values, order = np.asarray(class_values), np.argsort(class_values)
    positions = np.searchsorted(values, label, sorter=order)
    indices = order[np.minimum(positions, len(class_values) - 1)]
    if not np.array_equal(values[indices], label):
        raise UserError(f"{path}: holds label values beyond {class_values}: make the database again")
    return indices.astype(np.uint8)


def check_values(
    path: object, image: np.ndarray, label: np.ndarray | None, num_class: int, *, partial: bool = False
) -> None:
    """Refuse NaN, infinity and huge numbers in an input, and in a label all but class indices (or `IGNORE`)."""
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise UserError(f"{path}: the input holds NaN or infinity: repair that image and make the database again")
    if image.dtype.kind == "f" and image.dtype.itemsize > 4 and np.abs(image).max() > LARGEST:
        raise UserError(f"{path}: the input holds numbers beyond 1e150: scale it and make the database again")
    if label is not None and (label.dtype.kind not in "bui" or label.min() < 0):
        raise UserError(f"{path}: the label holds {label.dtype} values below 0 or not integer: make the database again")
    valid = label[label != IGNORE] if partial and label is not None else label
    if valid is not None and valid.max(initial=0) >= num_class:
        raise UserError(f"{path}: class index {valid.max()} beyond the {num_class} classes: make the database again")


def digest_of(image: np.ndarray) -> bytes:
    """Hash of the pixels (H, W, C) of an image, the same for grey that was saved as colour; needs little memory."""
    bands = [slice(top, top + NUM_ROW) for top in range(0, len(image), NUM_ROW)]
    if image.shape[2] == 3 and all((image[rows] == image[rows, :, :1]).all() for rows in bands):
        image = image[..., :1]
    digest = hashlib.blake2b(f"{image.shape} {image.dtype.name}".encode(), digest_size=16)
    for rows in bands:
        digest.update(image[rows].tobytes())
    return digest.digest()


def write_sample(path: Path, image: np.ndarray, label: np.ndarray | None) -> None:
    """Write a sample: an image (H, W, C) of any integer or float type, and class indices (H, W) of uint8."""
    dtype = [("input", image.dtype.newbyteorder("="), image.shape[2:])]
    sample = np.empty(image.shape[:2], dtype if label is None else [*dtype, ("label", np.uint8)])
    sample["input"] = image
    if label is not None:
        sample["label"] = label
    np.save(path, sample, allow_pickle=False)


def is_database(folder: Path) -> bool:
    """Whether a folder holds a database, or a part of one."""
    return any((folder / name).exists() for name in (*SPLITS, "dataset.json"))


def list_unlabelled(database: Path) -> list[SampleFile]:
    """Samples without labels that a training learns from, too."""
    folder = database / UNLABELLED
    return list_samples(folder) if any(folder.glob("*.npy")) else []


def list_samples(folder: Path) -> list[SampleFile]:
    """Samples of one split, ordered by number; also those of pytorch-UNET's pair layout."""
    finish_exchange(folder.parent, ENTRIES)
    files = folder.glob("*.npy") if folder.is_dir() else []
    names = sorted((file.name for file in files if not file.name.endswith(DISTANCE)), key=natural_key)
    if not names and (folder.parent / "dataset.json").is_file() and folder.name in SPLITS:
        advice = f"choose another --split, or make the database again with --num_{folder.name} 1 or more"
        advice = "it has no labels to train on: make one with --label" if folder.name == "train" else advice
        raise UserError(f"{folder}: this split of the database is empty: {advice}")
    if not names:
        hint = folder_hint(folder.parent, ("--name_data",), is_database)
        advice = f"{hint}run run_make_database.py, or check --dir_data and --name_data"
        raise UserError(f"{folder}: no samples there: {advice}")
    pairs = [name for name in names if name.startswith("input")]
    if not pairs:
        return [SampleFile(folder / name) for name in names]
    unpaired = [name for name in pairs if not (folder / name.replace("input", "label", 1)).is_file()]
    if unpaired and len(unpaired) < len(pairs):
        raise UserError(f"{folder}: no label for {', '.join(unpaired[:5])}: add it, or move the input elsewhere")
    return [SampleFile(folder / n, None if unpaired else folder / n.replace("input", "label", 1)) for n in pairs]
