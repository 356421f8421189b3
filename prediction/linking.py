"""One number for an object through the sections of a stack, which becomes a 3-D label image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array

from images.readers import Frame, number_stacks
from images.rows import Rows
from images.writers import RowFile
from prediction.objects import TILE_HEIGHT, ObjectList, Plane
from prediction.tiling import Band
from utils import UserError


class _Section(NamedTuple):
    """A section with its N objects."""

    image: Plane  # (H, W): 0, and numbers from 1 to N in this section
    objects: ObjectList
    number: np.ndarray  # (N + 1,) of each in the stack


class SectionLinker:
    """Numbers the objects of a stack, section by section.

    An object has the number of the object of the section before whose intersection over union (IoU) with it is at
    least `min_iou`. Each number is given once in a section: the pair with the highest IoU is the first. So where an
    object splits, the part that overlaps it best continues its number and the others begin new ones; where objects
    merge, the result has the number of the one it overlaps best, and the others end. An object that is missing in a
    section ends there, too. The rule is that of Cellpose's `stitch_threshold`, but one-to-one.
    """

    def __init__(self, min_iou: float) -> None:
        self.min_iou = min_iou  # in (0, 1]
        self.count = 0  # objects of the stack until now; their numbers count from 1 without a gap
        self._last: _Section | None = None

    def link(self, image: Plane, class_ids: Plane | None = None) -> np.ndarray:
        """Number (N + 1,) uint32 in the stack of each object of the next section (H, W); 0 for the background.

        The objects of the section are numbered from 1 on; it is read again for the next one. Objects of different
        classes are not linked; `class_ids` (H, W) has class + 1 of each pixel.

        >>> linker = SectionLinker(0.5)
        >>> [linker.link(np.array([row])).tolist() for row in ([1, 1, 1, 1, 0, 2], [1, 0, 2, 2, 0, 0])]
        [[0, 1, 2], [0, 3, 1]]
        """
        objects = ObjectList()
        for rows in _bands(image):
            objects.add(image[rows], None if class_ids is None else class_ids[rows])
        number = np.zeros(len(objects.area), np.uint32)
        if self._last:
            linked = set()  # objects of the section before
            for before, here in self._candidates(self._last, image, objects):
                if before not in linked and number[here] == 0:
                    linked.add(before)
                    number[here] = self._last.number[before]
        is_new = (number == 0) & (objects.area > 0)
        is_new[0] = False  # the background
        number[is_new] = self.count + np.cumsum(is_new)[is_new]
        self.count += int(is_new.sum())
        self._last = _Section(image, objects, number)
        return number

    def _candidates(self, last: _Section, image: Plane, objects: ObjectList) -> list[list[int]]:
        """Pairs of an object of the last section and one of this section that may be the same; highest IoU first."""
        overlap = _overlaps(last.image, image, (len(last.objects.area), len(objects.area)))
        before, here = overlap.coords
        iou = overlap.data / (last.objects.area[before] + objects.area[here] - overlap.data)
        is_link = (iou >= self.min_iou) & (last.objects.class_id[before] == objects.class_id[here])
        pairs = np.stack([before, here], axis=1)[is_link]
        order = np.lexsort((pairs[:, 1], pairs[:, 0], -iou[is_link]))
        return pairs[order].tolist()


def _bands(image: Plane) -> list[slice]:
    """Plane that are read at once."""
    return [slice(top, top + TILE_HEIGHT) for top in range(0, image.shape[0], TILE_HEIGHT)]


def _overlaps(one: Plane, other: Plane, shape: tuple[int, int]) -> coo_array:
    """Number of pixels that each two objects of two images share."""
    total = coo_array(shape, dtype=np.int64).tocsr()
    for rows in _bands(one):
        before, here = one[rows], other[rows]
        both = (before > 0) & (here > 0)
        ones = np.ones(int(both.sum()), np.int32)
        total += coo_array((ones, (before[both], here[both])), shape=shape).tocsr()  # adds up equal pairs
    return total.tocoo()


class StackLinker:
    """Links the sections of stacks that are given band by band; two at a time are in temporary files."""

    def __init__(self, min_iou: float, stacks: list[int], near: Path) -> None:
        self.min_iou, self.stacks = min_iou, stacks  # number of the stack of each frame
        self.near = near  # a path in the folder of the temporary files
        self._stack = -1
        self._files = ExitStack()  # the section before

    def link(self, frame: int, bands: Iterable[Band], class_ids: Plane | None = None) -> Iterator[Band]:
        """Bands with the numbers of the stack; frames of one stack must be given in order, one stack after another."""
        if self.stacks[frame] != self._stack:
            self._stack, self._linker = self.stacks[frame], SectionLinker(self.min_iou)
        with ExitStack() as opened:
            file = opened.enter_context(RowFile(self.near, np.uint32))
            for band in bands:
                file.append(band.values)
            number = self._linker.link(file, class_ids)
            self._files.close()
            self._files = opened.pop_all()
        for rows in _bands(file):
            values = file[rows]
            yield Band(slice(rows.start, rows.start + len(values)), number[values])

    def close(self) -> None:
        """Remove the last temporary file."""
        self._files.close()


def stacks_to_link(frames: list[Frame], images: list[Rows], min_iou: float) -> list[int]:
    """Number of the stack of each frame; refuses frames without a stack, and sections that differ in size."""
    stacks = number_stacks(frames)
    if len(set(stacks)) == len(frames):
        what = f"{frames[0]} is one image" if len(frames) == 1 else "each of these images is a stack of its own"
        raise UserError(f"--link {min_iou:g}: {what}: name a stack of sections along Z, or leave --link out")
    first: dict[int, int] = {}
    for index, stack in enumerate(stacks):
        one = first.setdefault(stack, index)
        sizes = [images[frame].shape[:2] for frame in (one, index)]
        if sizes[0] != sizes[1]:
            what = f"{frames[one]} has {sizes[0]} px, {frames[index]} {sizes[1]}"
            raise UserError(f"--link {min_iou:g}: {what}: the sections of a stack must have one size")
    return stacks
