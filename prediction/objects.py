"""Objects from a probability by a seeded watershed; in bands of rows, for images larger than memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from images.statistics import neighbours
from prediction.tiling import Band

SEED, SEED_FRACTION = 100, 0.25  # a core below both (100 px, and this fraction of its region's largest core) is no seed
SPECK = 8  # [px] a smaller core is never a seed
OUTSIDE = 0  # stands for what is beyond the image among the objects beside a region of background
TILE_HEIGHT, TILE_WIDTH, TILE_HALO = 512, 2048, 128  # [px] of the watershed, which also floods a halo around each tile


class Slices(Protocol):
    """An array (H, W), or an object that reads one by rows."""

    def __len__(self) -> int:
        """Height."""

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows (h, W)."""


class ObjectFilter(NamedTuple):
    """Which objects are kept, and whether their holes are filled.

    Attributes
    ----------
    min_size : int
        Smaller objects are dropped [px]; 0 keeps all.
    fill_holes : bool
        Fill the holes of the objects that are kept: 4-connected regions of background enclosed by one object, which do
        not reach the border of the image.
    """

    min_size: int = 0
    fill_holes: bool = False

    @property
    def is_active(self) -> bool:
        """Whether anything may change."""
        return self.min_size > 1 or self.fill_holes

    def with_given(self, **values: Any) -> ObjectFilter:
        """The same with some other values, except where they are None."""
        return self._replace(**{name: value for name, value in values.items() if value is not None})

    def __str__(self) -> str:
        """What happens to the objects, in words."""
        small = [f"under {self.min_size} px dropped"] if self.min_size > 1 else []
        return ", ".join(small + (["holes filled"] if self.fill_holes else [])) or "all kept"


KEEP_ALL = ObjectFilter()


def separate_objects(
    probability: np.ndarray,
    threshold: float = 0.5,
    background: int = 0,
    *,
    min_size: int = 0,
    fill_holes: bool = False,
) -> np.ndarray:
    """Split the foreground into objects where the probability between two certain cores is lowest.

    A seeded watershed: seeds are the 4-connected regions above the middle between the threshold and 1, and they grow
    down to the threshold. A region without a seed is one object. Source: Meyer 1994, doi
    10.1016/0165-1684(94)90060-4.

    Parameters
    ----------
    probability : ndarray
        (H, W) of the foreground, or (K, H, W) of K classes; in [0, 1].
    threshold : float
        Pixels above it are foreground. With K classes a pixel belongs to the most probable one.
    background : int
        Index of the background among K classes. Objects of different classes never merge.
    min_size, fill_holes
        See `ObjectFilter`.

    Returns
    -------
    ndarray of uint32
        (H, W): 0 is background, objects count from 1 without a gap.

    Examples
    --------
    >>> dumbbell = np.pad(np.r_[np.full((9, 12), 0.9), np.full((3, 12), 0.6), np.full((9, 12), 0.9)], 1)
    >>> int(separate_objects(dumbbell, 0.5).max()), int(separate_objects(dumbbell, 0.7).max())
    (2, 2)
    """
    class_ids = None
    if probability.ndim == 3:
        probability, class_ids = probability.max(0), foreground_class_ids(probability.argmax(0), background)
    objects = join_bands(separate_bands(probability, threshold, class_ids=class_ids), probability.shape)
    return filter_objects(objects, ObjectFilter(min_size, fill_holes))


def filter_objects(objects: np.ndarray, chosen: ObjectFilter) -> np.ndarray:
    """Image of objects (H, W) uint32 after a filter, in place; its numbers keep their order, without a gap.

    Examples
    --------
    >>> ring = np.array([[3, 0, 0, 0], [0, 4, 4, 4], [0, 4, 0, 4], [0, 4, 4, 4]], np.uint32)
    >>> filter_objects(np.pad(ring, 1), ObjectFilter(2, True))[1:-1, 1:-1].tolist()
    [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    """
    if chosen.is_active:
        for band in filter_bands(objects, chosen):
            objects[band.rows] = band.values
    return objects


def join_bands(bands: Iterable[Band], shape: tuple[int, ...]) -> np.ndarray:
    """Image of objects (H, W) uint32 from its bands, without a second copy."""
    image = np.empty(shape, np.uint32)
    for band in bands:
        image[band.rows] = band.values
    return image


def foreground_class_ids(classes: np.ndarray, background: int) -> np.ndarray:
    """Classes (H, W) counted from 1, and 0 for the background.

    Examples
    --------
    >>> foreground_class_ids(np.array([[0, 1, 2]]), background=1).tolist()
    [[1, 0, 3]]
    """
    return np.where(classes == background, 0, classes + 1).astype(np.uint8)


def separate_bands(
    probability: Slices,
    threshold: float,
    tall: int = TILE_HEIGHT,
    wide: int = TILE_WIDTH,
    halo: int = TILE_HALO,
    class_ids: Slices | None = None,
) -> Iterator[Band]:
    """Objects (h, W) uint32 of `separate_objects`, band by band.

    Regions and seeds are found in the whole image, so an object has the same number in all bands. The watershed runs in
    tiles; it equals that of the whole image except for pixels whose path to their seed is longer than the halo.

    Parameters
    ----------
    probability : ndarray
        (H, W), or an object with a length and slices of rows; it is read twice, band by band.
    threshold : float
        Pixels above it are foreground.
    tall, wide, halo : int
        Height and width of the tiles, and width of the halo around them [px].
    class_ids : ndarray, optional
        (H, W), or slices of rows: 0 for background, else class + 1 of the pixel, which `probability` belongs to.
        Default: 1 where the probability is above the threshold.
    """
    tops = range(0, len(probability), tall)
    masks = partial(_masks, probability, class_ids, threshold, tall)
    cores, regions = _Regions(), _Regions()
    seed_of, object_of = _assign_objects(cores, regions, map(masks, tops))

    def prepared(number: int) -> _Planes:
        """Input of the watershed of a band."""
        pair = masks(tops[number])
        core, region = (
            _label(class_id, of.starts[number]) for of, class_id in zip((cores, regions), pair, strict=True)
        )
        objects = object_of[region]
        seeds = np.where(objects > seed_of.max(), objects, seed_of[core])  # an object without a core is its own seed
        height = np.round((1 - probability[tops[number] : tops[number] + tall]) * 255).astype(np.uint8)
        return _Planes(height, seeds, objects, pair[1])

    planes, above = prepared(0), 0  # rows of a band, after the first one with the halo above it
    for number, top in enumerate(tops):
        end = len(planes.height)
        if number + 1 < len(tops):
            planes = _Planes(*map(np.concatenate, zip(planes, prepared(number + 1), strict=True)))
        yield Band(slice(top, top + end - above), _flood(planes.cut(slice(end + halo)), wide, halo)[above:end])
        planes, above = planes.cut(slice(max(end - halo, 0), None)), min(halo, end)


def filter_bands(objects: Slices, chosen: ObjectFilter, tall: int = TILE_HEIGHT) -> Iterator[Band]:
    """Objects (h, W) uint32 of `filter_objects`, band by band; the unfiltered ones are read two or three times."""
    tops = range(0, len(objects), tall)
    found = ObjectList()
    for top in tops:
        found.add(objects[top : top + tall])
    is_kept = found.area >= chosen.min_size
    is_kept[0] = False  # the background
    number_of = np.where(is_kept, np.cumsum(is_kept), 0).astype(np.uint32)
    holes = _Holes()
    if chosen.fill_holes:
        for top in tops:
            holes.add(number_of[objects[top : top + tall]])
    owner = holes.owners()
    for number, top in enumerate(tops):
        values = number_of[objects[top : top + tall]]
        if chosen.fill_holes:
            values += owner[_label((values == 0).astype(np.uint8), holes.regions.starts[number])]
        yield Band(slice(top, top + len(values)), values)


class ObjectList:
    """Area and class of each object of an image given band by band.

    Attributes
    ----------
    area : ndarray of int64
        (N + 1,) [px] of each number, 0 included.
    class_id : ndarray of uint8
        (N + 1,) class + 1 of each.
    """

    def __init__(self) -> None:
        self.area, self.class_id = np.zeros(1, np.int64), np.zeros(1, np.uint8)

    def add(self, objects: np.ndarray, class_ids: np.ndarray | None = None) -> None:
        """Add the next band (h, W), with the class + 1 of each pixel; None: 1."""
        area = np.bincount(objects.ravel(), minlength=len(self.area))
        class_id = np.ones(len(area), np.uint8)
        if class_ids is not None:  # written backwards: the first pixel, which is never one of a filled hole, decides
            class_id[objects.ravel()[::-1]] = class_ids.ravel()[::-1]
        class_id[: len(self.class_id)][self.area > 0] = self.class_id[self.area > 0]
        area[: len(self.area)] += self.area
        self.area, self.class_id = area, class_id


class _Planes(NamedTuple):
    """Input of the watershed for some rows, (h, W) each.

    Attributes
    ----------
    height : ndarray
        Low pixels are flooded first: 0 where the probability is 1, 255 where it is 0.
    seeds, objects : ndarray
        Object that floods from this pixel, and object of pixels that are not flooded; 0 for none.
    class_ids : ndarray
        Class + 1, or 0 for background; flooding stays within a class.
    """

    height: np.ndarray
    seeds: np.ndarray
    objects: np.ndarray
    class_ids: np.ndarray

    def cut(self, rows: slice) -> _Planes:
        """Some of the rows."""
        return _Planes(*(plane[rows] for plane in self))


def _masks(
    probability: Slices, class_ids: Slices | None, threshold: float, tall: int, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cores and regions of the band that starts at row `top`, (h, W) each: class + 1, or 0 outside."""
    band = probability[top : top + tall]
    class_id = (
        (band > threshold).astype(np.uint8) if class_ids is None else np.asarray(class_ids[top : top + tall], np.uint8)
    )
    return class_id * (band > (1 + threshold) / 2), class_id


def _flood(planes: _Planes, wide: int, halo: int) -> np.ndarray:
    """Watershed (h, W) of some rows, tile by tile and class by class."""
    from skimage.segmentation import watershed

    height, seeds, objects, class_ids = planes
    flooded = np.zeros(seeds.shape, np.uint32)
    for left in range(0, seeds.shape[1], wide):
        start = max(left - halo, 0)
        tile, core = np.s_[:, start : left + wide + halo], np.s_[:, left - start : left - start + wide]
        for class_id in _class_ids_in(class_ids[tile]):
            mask = class_ids[tile] == class_id
            found = watershed(height[tile], seeds[tile] * mask, mask=mask)
            found = np.where(found > 0, found, objects[tile] * mask)
            flooded[:, left : left + wide] += found[core].astype(np.uint32)
    return flooded


def _class_ids_in(class_ids: np.ndarray) -> np.ndarray:
    """Classes that occur, without the background."""
    return np.flatnonzero(np.bincount(class_ids.ravel(), minlength=1)[1:]) + 1


class _Regions:
    """4-connected regions of one class each, in an image given band by band: pieces per band, joined at the end.

    Attributes
    ----------
    starts : list of int
        Number of the first piece of each band, and of the next band; pieces count from 1.
    """

    def __init__(self) -> None:
        self.starts = [1]
        self._sizes = [np.zeros(1, np.int64)]
        self._touching = [np.zeros((2, 0), np.int64)]  # pairs of pieces of two bands
        self._last_row: tuple[np.ndarray, np.ndarray] | None = None  # pieces and classes of the last row

    def add(self, class_ids: np.ndarray) -> np.ndarray:
        """Pieces (h, W) of the next band, 0 where the class is 0."""
        pieces = _label(class_ids, self.starts[-1])
        self._sizes.append(np.bincount(pieces[class_ids > 0] - self.starts[-1]))
        self.starts.append(self.starts[-1] + len(self._sizes[-1]))
        if self._last_row is not None:
            (last, last_class_ids), first = self._last_row, pieces[0]
            touching = (last_class_ids == class_ids[0]) & (class_ids[0] > 0)
            self._touching.append(np.unique(np.stack([last, first])[:, touching], axis=1))
        self._last_row = pieces[-1].copy(), class_ids[-1].copy()
        return pieces

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """First piece of the region of each piece, and size of the region [px] at its first piece."""
        sizes, pairs = np.concatenate(self._sizes), np.concatenate(self._touching, axis=1)
        graph = coo_array((np.ones(pairs.shape[1]), tuple(pairs)), shape=(len(sizes),) * 2)
        _, region = connected_components(graph, directed=False)
        first = np.unique(region, return_index=True)[1][region]
        return first, np.bincount(first, sizes, minlength=len(sizes))


class _Holes:
    """Regions of background in an image of objects given band by band, and the objects beside each.

    Attributes
    ----------
    regions : _Regions
        Pieces of the background.
    """

    def __init__(self) -> None:
        self.regions = _Regions()
        self._beside = [np.zeros(0, np.int64)]  # pairs of a piece and an object, see `_pair`
        self._last_row: tuple[np.ndarray, np.ndarray] | None = None  # pieces and objects (1, W)

    def add(self, objects: np.ndarray) -> None:
        """Add the next band (h, W)."""
        pieces = self.regions.add((objects == 0).astype(np.uint8))
        outside = [pieces[:, 0], pieces[:, -1]] + ([pieces[0]] if self._last_row is None else [])
        self._beside += [_pair(piece, OUTSIDE) for piece in outside]
        last_row = pieces[-1:].copy(), objects[-1:].copy()
        if self._last_row is not None:  # pixels may lie beside an object of the other band
            pieces, objects = map(np.concatenate, zip(self._last_row, (pieces, objects), strict=True))
        for piece, beside in neighbours(pieces, objects):
            edge = (piece > 0) & (beside > 0)
            self._beside.append(_pair(piece[edge], beside[edge]))
        self._last_row = last_row

    def owners(self) -> np.ndarray:
        """Object that encloses the region of each piece; 0 if there are several, or the region reaches the border."""
        if self._last_row is not None:
            self._beside.append(_pair(self._last_row[0], OUTSIDE))
        piece, beside = np.divmod(np.unique(np.concatenate(self._beside)), 2**32)
        root, _ = self.regions.joined()
        lowest, highest = np.full(len(root), 2**32), np.zeros(len(root), np.int64)
        np.minimum.at(lowest, root[piece], beside)
        np.maximum.at(highest, root[piece], beside)
        return np.where(lowest == highest, lowest, 0).astype(np.uint32)[root]


def _pair(piece: np.ndarray, beside: np.ndarray | int) -> np.ndarray:
    """One integer per pair of a piece of background and an object beside it, each once."""
    return np.unique(piece.astype(np.int64) * 2**32 + beside)


def _label(class_ids: np.ndarray, first: int) -> np.ndarray:
    """4-connected pieces (h, W) of one class each, numbered from `first` on; 0 where the class is 0."""
    pieces = np.zeros(class_ids.shape, np.int32)
    for class_id in _class_ids_in(class_ids):
        mask = class_ids == class_id
        found, count = ndimage.label(mask)
        pieces[mask] = found[mask] + (first - 1)
        first += count
    return pieces


def _assign_objects(
    cores: _Regions, regions: _Regions, masks: Iterable[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Object of each piece of the cores (0 for small ones) and of the regions (of their first core, or a new one)."""
    homes = [np.zeros(1, np.int64)]  # region that each core lies in
    for pair in masks:
        core, region = (class_id.add(mask) for class_id, mask in zip((cores, regions), pair, strict=True))
        homes.append(np.zeros(cores.starts[-1] - cores.starts[-2], np.int64))
        homes[-1][core[core > 0] - cores.starts[-2]] = region[core > 0]
    home = np.concatenate(homes)
    first, size = cores.joined()
    root, _ = regions.joined()
    largest = np.zeros(len(root), np.int64)
    np.maximum.at(largest, root[home], size)  # size of the largest core of each region
    least = np.clip(SEED_FRACTION * largest[root[home]], SPECK, SEED)
    seeds = np.flatnonzero((first == np.arange(len(first))) & (size >= least))
    seed_of = np.zeros(len(first), np.uint32)
    seed_of[seeds] = np.arange(len(seeds)) + 1
    object_of = np.zeros(len(root), np.uint32)
    object_of[root[home[seeds[::-1]]]] = seed_of[seeds[::-1]]  # the first core is written last
    alone = np.flatnonzero((root == np.arange(len(root))) & (object_of == 0))[1:]  # entry 0 is the background
    object_of[alone] = len(seeds) + 1 + np.arange(len(alone))
    return seed_of[first], object_of[root]
