"""Where a partly annotated label is annotated, coarsely: crops are drawn there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

from description import DataInfo
from samples import IGNORE, SampleFile
from utils import UserError

BLOCK = 16  # [px] height and width of a block
BAND = 16 * BLOCK  # rows of a label that are read at once


@dataclass(frozen=True)
class AnnotatedBlocks:
    """Blocks of a label that contain annotated pixels; 16 bytes for each of them."""

    anchors: np.ndarray  # (N, 2) of int32, position (y, x) of one annotated pixel of each block [px]
    ends: np.ndarray  # (N,) of int64, annotated pixels in this block and those before it

    @classmethod
    def find(cls, label: np.ndarray) -> AnnotatedBlocks:
        """Blocks of a label (H, W), which is read a few rows at a time."""
        anchors, counts = [np.empty((0, 2), np.int32)], [np.empty(0, np.int64)]
        for top in range(0, label.shape[0], BAND):
            positions, numbers = _find_in_band(label[top : top + BAND] != IGNORE)
            anchors.append((positions + np.array([top, 0])).astype(np.int32))
            counts.append(numbers)
        return cls(np.concatenate(anchors), np.concatenate(counts).cumsum())

    def __len__(self) -> int:
        return len(self.ends)

    def draw(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Random anchors (num, 2), each block with a probability proportional to its number of annotated pixels."""
        pixels = rng.integers(self.ends[-1], size=num)
        return self.anchors[np.searchsorted(self.ends, pixels, side="right")]


def _find_in_band(valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First annotated pixel (N, 2) of each block of a band (H, W), and number (N,) of annotated pixels, if any."""
    rows, columns = (-(-side // BLOCK) for side in valid.shape)
    padded = np.zeros((rows * BLOCK, columns * BLOCK), bool)
    padded[: valid.shape[0], : valid.shape[1]] = valid
    blocks = padded.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2).reshape(rows, columns, BLOCK**2)
    counts = np.count_nonzero(blocks, axis=-1)
    row, column = counts.nonzero()
    y, x = np.divmod(blocks[row, column].argmax(-1), BLOCK)
    return np.stack([row * BLOCK + y, column * BLOCK + x], -1), counts[row, column]


def find_annotated(files: list[SampleFile], info: DataInfo) -> list[AnnotatedBlocks] | None:
    """Where each sample is annotated, which at least one must be; None where all pixels are."""
    if not info.is_partial:
        return None
    labels = (cast(np.ndarray, file.open(info.class_values)[1]) for file in files)
    annotated = [AnnotatedBlocks.find(label) for label in labels]
    if not any(map(len, annotated)):
        folder = files[0].input.parent
        raise UserError(f"{folder}: no pixel is annotated, all have the label {info.ignore}: check --ignore")
    return annotated
