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
from prediction.objects import TILE_HEIGHT, ObjectList, Slices
from prediction.tiling import Band
from utils import UserError


class _Section(NamedTuple):
    """A section with its objects.

    Attributes
    ----------
    objects : ndarray
        (H, W), or an object that reads them by rows: 0, and numbers from 1 to N in this section.
    found : ObjectList
        Area and class of each.
    number : ndarray
        (N + 1,) number of each in the stack.
    """

    objects: Slices
    found: ObjectList
    number: np.ndarray


class SectionLinker:
    """Numbers the objects of a stack, section by section.

    An object has the number of the object of the section before whose intersection over union (IoU) with it is at
    least `min_iou`. A number is taken once: the pair with the highest IoU is the first. So where an object splits, the
    part that overlaps it best keeps the number and the others begin new ones; where objects merge, the result has the
    number of the one it overlaps best, and the others end. An object that is missing in a section ends there, too.
    The rule is that of Cellpose's `stitch_threshold`, but one-to-one.

    Parameters
    ----------
    min_iou : float
        In (0, 1].

    Attributes
    ----------
    count : int
        How many objects the stack has until now; their numbers count from 1 without a gap.
    """

    def __init__(self, min_iou: float) -> None:
        self.min_iou, self.count = min_iou, 0
        self._last: _Section | None = None

    def link(self, objects: Slices, class_ids: Slices | None = None) -> np.ndarray:
        """Number (N + 1,) uint32 in the stack of each object of the next section; 0 for the background.

        Parameters
        ----------
        objects : ndarray
            (H, W), or an object that reads them by rows: 0, and the N objects of the section, numbered from 1 on. It is
            read again for the next section.
        class_ids : ndarray, optional
            (H, W), or slices of rows: the class of each pixel + 1. Objects of different classes are not linked.

        Examples
        --------
        >>> linker = SectionLinker(0.5)
        >>> [linker.link(np.array([row])).tolist() for row in ([1, 1, 1, 1, 0, 2], [1, 0, 2, 2, 0, 0])]
        [[0, 1, 2], [0, 3, 1]]
        """
        found = ObjectList()
        for top in range(0, len(objects), TILE_HEIGHT):
            rows = slice(top, top + TILE_HEIGHT)
            found.add(objects[rows], None if class_ids is None else class_ids[rows])
        number = np.zeros(len(found.area), np.uint32)
        if self._last is not None:
            for before, here in self._pairs(self._last, objects, found):
                number[here] = self._last.number[before]
        is_new = (number == 0) & (found.area > 0)
        is_new[0] = False  # the background
        number[is_new] = self.count + np.cumsum(is_new)[is_new]
        self.count += int(is_new.sum())
        self._last = _Section(objects, found, number)
        return number

    def _pairs(self, last: _Section, objects: Slices, found: ObjectList) -> Iterator[tuple[int, int]]:
        """Objects of the last section and of this one that are the same, each in one pair at most."""
        overlap = _overlaps(last.objects, objects, (len(last.found.area), len(found.area)))
        before, here = overlap.coords
        iou = overlap.data / (last.found.area[before] + found.area[here] - overlap.data)
        is_link = (iou >= self.min_iou) & (last.found.class_id[before] == found.class_id[here])
        order = np.lexsort((here[is_link], before[is_link], -iou[is_link]))
        taken: tuple[set[int], set[int]] = set(), set()
        for pair in np.stack([before, here], axis=1)[is_link][order].tolist():
            if pair[0] not in taken[0] and pair[1] not in taken[1]:
                taken[0].add(pair[0])
                taken[1].add(pair[1])
                yield pair[0], pair[1]


def _overlaps(one: Slices, other: Slices, shape: tuple[int, int]) -> coo_array:
    """Number of pixels that each two objects of two images share."""
    total = coo_array(shape, dtype=np.int64).tocsr()
    for top in range(0, len(one), TILE_HEIGHT):
        rows = slice(top, top + TILE_HEIGHT)
        before, here = one[rows], other[rows]
        both = (before > 0) & (here > 0)
        ones = np.ones(int(both.sum()), np.int32)
        total += coo_array((ones, (before[both], here[both])), shape=shape).tocsr()  # sums what is there twice
    return total.tocoo()


class StackLinker:
    """Links the sections of stacks that are given band by band; they are kept in temporary files, two at a time.

    Parameters
    ----------
    min_iou : float
        See `SectionLinker`.
    stacks : list of int
        Number of the stack of each frame.
    near : Path
        A path in the folder that takes the temporary files.
    """

    def __init__(self, min_iou: float, stacks: list[int], near: Path) -> None:
        self.min_iou, self.stacks, self.near = min_iou, stacks, near
        self._stack = -1
        self._files = ExitStack()  # the section before

    def link(self, frame: int, bands: Iterable[Band], class_ids: Slices | None = None) -> Iterator[Band]:
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
        for top in range(0, len(file), TILE_HEIGHT):
            values = file[top : top + TILE_HEIGHT]
            yield Band(slice(top, top + len(values)), number[values])

    def close(self) -> None:
        """Remove the last temporary file."""
        self._files.close()


def stacks_to_link(frames: list[Frame], images: list[Rows], min_iou: float) -> list[int]:
    """Number of the stack of each frame.

    Raises
    ------
    UserError
        No stack has two sections, or the sections of one differ in size.
    """
    stacks = number_stacks(frames)
    if len(set(stacks)) == len(frames):
        what = f"{frames[0]} is one image" if len(frames) == 1 else "each of these images is a stack of its own"
        raise UserError(f"--link {min_iou:g}: {what}: name a stack of sections along Z, or leave --link out")
    first: dict[int, int] = {}
    for index, stack in enumerate(stacks):
        (height, width), here = images[first.setdefault(stack, index)].shape[:2], images[index].shape[:2]
        if here != (height, width):
            what = f"{frames[first[stack]]} has {(height, width)} px, {frames[index]} {here}"
            raise UserError(f"--link {min_iou:g}: {what}: the sections of a stack must have one size")
    return stacks
