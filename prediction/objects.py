"""Objects from a probability by a seeded watershed; in bands of rows, for images larger than memory.

All bands are read twice. First the markers and the regions to be flooded are labelled in each band, and numbered in the
whole image. Then each band is flooded together with a halo, the rows of other bands next to it:

    row 384  . . . . . . . . . .      first row of the halo of band 1
             . 1 1 . . . . 2 2 .      pieces 1 and 2 of the markers, in band 0
        511  . . 1 . . . . 2 . .
      ------------------------------
        512  . . 3 . . . . 3 . .      piece 3, in band 1, touches both: the three are one marker
             . . 3 3 3 3 3 3 . .
       1023  . . . . . . . . . .      last row of band 1
      ------------------------------
       1151  . . . . . . . . . .      last row of the halo; the watershed of band 1 floods rows 384 to 1151
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from images.statistics import neighbours
from images.writers import RowFile
from prediction.tiling import Band

Plane = np.ndarray | RowFile  # (H, W), read by rows

MARKER_SIZE, MARKER_FRACTION = 100, 0.25  # a marker below both (100 px, this fraction of its region's largest) is none
MIN_MARKER_SIZE = 8  # [px] a smaller one never is
BORDER = 0  # stands for the border of the image among the objects adjacent to a piece of background
TILE_HEIGHT, TILE_WIDTH, TILE_HALO = 512, 2048, 128  # [px] of the watershed, which also floods a halo around each tile
LANDSCAPE = np.dtype(
    [
        ("height", np.uint8),  # low pixels are flooded first: 0 where the probability is 1, 255 where it is 0
        ("marker", np.uint32),  # object that floods from this pixel, or 0
        ("region", np.uint32),  # object of this pixel if no marker floods it, or 0
        ("class_id", np.uint8),  # class + 1 where several markers flood a region, or 0; flooding stays within a class
    ]
)


class ObjectFilter(NamedTuple):
    """Which objects are dropped, and whether the holes of the others are filled."""

    min_size: int = 0  # [px] smaller objects are dropped; 0 drops none
    fill_holes: bool = False  # 4-connected regions of background enclosed by one object, not at the image's border
    certainty: float = 0.0  # objects whose probability is nowhere above it are dropped

    @property
    def is_active(self) -> bool:
        """Whether anything may change."""
        return self.min_size > 1 or self.fill_holes or self.certainty > 0

    def __str__(self) -> str:
        """What happens to the objects, in words."""
        parts = [f"under {self.min_size} px dropped"] if self.min_size > 1 else []
        parts += [f"nowhere above {self.certainty:g} dropped"] if self.certainty > 0 else []
        return ", ".join(parts + (["holes filled"] if self.fill_holes else [])) or "all kept"


KEEP_ALL = ObjectFilter()


def separate_objects(
    probability: np.ndarray,
    threshold: float = 0.5,
    background: int = 0,
    *,
    min_size: int = 0,
    fill_holes: bool = False,
    certainty: float = 0.0,
) -> np.ndarray:
    """Split the foreground into objects where the probability between two certain parts is lowest.

    A watershed whose markers are the 4-connected regions above the middle between the threshold and 1. They grow down
    to the threshold. A region without a marker is one object. Source: Meyer 1994, doi 10.1016/0165-1684(94)90060-4.

    Parameters
    ----------
    probability : ndarray
        (H, W) of the foreground, or (K, H, W) of K classes; in [0, 1].
    threshold : float
        Pixels above it are foreground. With K classes a pixel belongs to the most probable one.
    background : int
        Index of the background among K classes. Objects of different classes never merge.
    min_size : int
        Smaller objects are dropped [px]; 0 drops none.
    fill_holes : bool
        Fill the holes of the remaining objects: 4-connected regions of background that are enclosed by one object and
        do not touch the border of the image.
    certainty : float
        Objects whose probability is nowhere above it are dropped; 0 drops none.

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
    return filter_objects(objects, probability, ObjectFilter(min_size, fill_holes, certainty))


def filter_objects(objects: np.ndarray, probability: np.ndarray, object_filter: ObjectFilter) -> np.ndarray:
    """Image of objects (H, W) uint32 after a filter, in place; its numbers keep their order, without a gap.

    >>> ring = np.array([[3, 0, 0, 0], [0, 4, 4, 4], [0, 4, 0, 4], [0, 4, 4, 4]], np.uint32)
    >>> ring = np.pad(ring, 1)
    >>> filter_objects(ring, np.full(ring.shape, 0.8), ObjectFilter(2, True))[1:-1, 1:-1].tolist()
    [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    """
    if object_filter.is_active:
        for band in filter_bands(objects, probability, object_filter):
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

    >>> foreground_class_ids(np.array([[0, 1, 2]]), background=1).tolist()
    [[1, 0, 3]]
    """
    return np.where(classes == background, 0, classes + 1).astype(np.uint8)


def separate_bands(
    probability: Plane,
    threshold: float,
    tile_height: int = TILE_HEIGHT,
    tile_width: int = TILE_WIDTH,
    halo: int = TILE_HALO,
    class_ids: Plane | None = None,
) -> Iterator[Band]:
    """Objects (h, W) uint32 of `separate_objects`, band by band, with the same number in all bands.

    The watershed equals that of the whole image except for pixels whose path to their marker is longer than the halo.
    `class_ids` (H, W): class + 1 of each pixel, which `probability` belongs to, or 0; None: 1 above the threshold.
    """
    empty = np.empty((0, probability.shape[1]), LANDSCAPE)
    above, top = empty, 0
    bands = _Landscape(probability, class_ids, threshold, tile_height).bands()
    for band, below in pairwise(chain(bands, [empty])):
        with_halo = np.concatenate([above, band, below[:halo]])
        end = len(above) + len(band)
        yield Band(slice(top, top + len(band)), _flood(with_halo, tile_width, halo)[len(above) : end])
        above, top = with_halo[max(end - halo, 0) : end], top + len(band)


def filter_bands(
    objects: Plane, probability: Plane, object_filter: ObjectFilter, band_height: int = TILE_HEIGHT
) -> Iterator[Band]:
    """Objects (h, W) uint32 of `filter_objects`, band by band; the unfiltered ones are read two or three times."""
    bands = [slice(top, top + band_height) for top in range(0, objects.shape[0], band_height)]
    sizes, certain = ObjectList(), ObjectList()
    for rows in bands:
        sizes.add(values := objects[rows])
        if object_filter.certainty > 0:
            certain.add(values * (probability[rows] > object_filter.certainty))
    remains = sizes.area >= object_filter.min_size
    if object_filter.certainty > 0:
        remains[len(certain.area) :] = False
        remains[: len(certain.area)] &= certain.area > 0
    remains[0] = False  # the background
    number_of = np.where(remains, np.cumsum(remains), 0).astype(np.uint32)
    holes = _Holes()
    if object_filter.fill_holes:
        for rows in bands:
            holes.add(number_of[objects[rows]])
    enclosing = holes.enclosing_objects()
    for number, rows in enumerate(bands):
        values = number_of[objects[rows]]
        if object_filter.fill_holes:
            values += enclosing[_label(values == 0, holes.background.starts[number])]
        yield Band(slice(rows.start, rows.start + len(values)), values)


class ObjectList:
    """Area and class of each object of an image given band by band."""

    def __init__(self) -> None:
        self.area = np.zeros(1, np.int64)  # (N + 1,) [px] of each number, 0 included
        self.class_id = np.zeros(1, np.uint8)  # (N + 1,) class + 1 of each

    def add(self, objects: np.ndarray, class_ids: np.ndarray | None = None) -> None:
        """Add the next band (h, W), with the class + 1 of each pixel; None: 1."""
        area = np.bincount(objects.ravel(), minlength=len(self.area))
        class_id = np.ones(len(area), np.uint8)
        if class_ids is not None:  # written backwards: the first pixel, which is never one of a filled hole, decides
            class_id[objects.ravel()[::-1]] = class_ids.ravel()[::-1]
        class_id[: len(self.class_id)][self.area > 0] = self.class_id[self.area > 0]
        area[: len(self.area)] += self.area
        self.area, self.class_id = area, class_id


class _Pieces:
    """4-connected pieces of each class in an image given band by band; those that touch form components."""

    def __init__(self) -> None:
        self.starts = [1]  # first piece of each band and of the next one; 0 is the background
        self._touching = [np.zeros((2, 0), np.int32)]  # (2, N) pieces of two bands
        self._last_row: tuple[np.ndarray, np.ndarray] | None = None  # pieces and classes

    def add(self, class_ids: np.ndarray) -> np.ndarray:
        """Pieces (h, W) of the next band, 0 where the class is 0."""
        pieces = _label(class_ids, self.starts[-1])
        self.starts.append(max(self.starts[-1], int(pieces.max()) + 1))
        if self._last_row:
            last_pieces, last_class_ids = self._last_row
            touches = (class_ids[0] == last_class_ids) & (class_ids[0] > 0)
            pairs = np.stack([last_pieces[touches], pieces[0, touches]])
            self._touching.append(np.unique(pairs, axis=1))
        self._last_row = pieces[-1].copy(), class_ids[-1].copy()
        return pieces

    def components(self) -> np.ndarray:
        """Component (N + 1,) of each piece, numbered in the order of their first pieces; 0 is the background."""
        pairs = np.concatenate(self._touching, axis=1)
        if not pairs.size:  # one band
            return np.arange(self.starts[-1])
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components  # takes 0.1 s

        graph = coo_array((np.ones(pairs.shape[1]), tuple(pairs)), shape=(self.starts[-1],) * 2)
        return connected_components(graph, directed=False)[1]


class _Landscape:
    """Input of the watershed, band by band; markers and regions are numbered as the objects that they become."""

    def __init__(self, probability: Plane, class_ids: Plane | None, threshold: float, band_height: int) -> None:
        self.probability, self.class_ids, self.threshold = probability, class_ids, threshold
        self.rows = [slice(top, top + band_height) for top in range(0, probability.shape[0], band_height)]
        self.markers, self.regions = _Pieces(), _Pieces()
        size, region_of = np.zeros((2, 1), np.int64)  # of each piece of a marker: [px], and the piece it lies in
        for rows in self.rows:
            marker, region = map(_Pieces.add, (self.markers, self.regions), self._masks(rows))
            more = np.zeros(self.markers.starts[-1] - len(size), np.int64)
            size, region_of = np.append(size, more), np.append(region_of, more)
            inside = marker > 0
            size += np.bincount(marker[inside], minlength=len(size))
            region_of[marker[inside]] = region[inside]
        marker_of, component_of = self.markers.components(), self.regions.components()
        home = np.zeros(marker_of.max() + 1, np.int64)  # region of each marker
        home[marker_of] = component_of[region_of]
        of_marker, of_region = _assign_objects(np.bincount(marker_of, size), home, component_of.max() + 1)
        self.object_of_marker = of_marker[marker_of]  # object of each piece
        self.object_of_region = of_region[component_of]
        num_marker = np.bincount(home[of_marker > 0], minlength=len(of_region))
        self.is_shared = np.zeros(of_region.max() + 1, bool)  # whether the region of an object has several markers
        self.is_shared[of_region] = num_marker > 1

    def _masks(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Markers and regions of a band, (h, W) each: class + 1, or 0 outside."""
        band = self.probability[rows]
        region = np.asarray(band > self.threshold if self.class_ids is None else self.class_ids[rows], np.uint8)
        return region * (band > (1 + self.threshold) / 2), region

    def bands(self) -> Iterator[np.ndarray]:
        """Input (h, W) of type `LANDSCAPE` of each band."""
        for number, rows in enumerate(self.rows):
            marker_mask, region_mask = self._masks(rows)
            band = np.empty(region_mask.shape, LANDSCAPE)
            band["height"] = np.round((1 - self.probability[rows]) * 255)
            band["region"] = self.object_of_region[_label(region_mask, self.regions.starts[number])]
            band["marker"] = self.object_of_marker[_label(marker_mask, self.markers.starts[number])]
            band["class_id"] = region_mask * self.is_shared[band["region"]]
            yield band


def _assign_objects(size: np.ndarray, region: np.ndarray, num_region: int) -> tuple[np.ndarray, np.ndarray]:
    """Object of each marker, from its size [px] and region, and of each region: that of its first marker, or a new one.

    A marker that is too small is no object.
    """
    largest = np.zeros(num_region)  # marker of each region [px]
    np.maximum.at(largest, region, size)
    is_marker = size >= np.clip(MARKER_FRACTION * largest[region], MIN_MARKER_SIZE, MARKER_SIZE)
    object_of_marker = np.where(is_marker, np.cumsum(is_marker), 0).astype(np.uint32)
    with_marker, first = np.unique(region[is_marker], return_index=True)
    object_of_region = np.zeros(num_region, np.uint32)
    object_of_region[with_marker] = first + 1
    alone = np.flatnonzero(object_of_region == 0)[1:]  # region 0 is the background
    object_of_region[alone] = is_marker.sum() + 1 + np.arange(len(alone))
    return object_of_marker, object_of_region


def _flood(landscape: np.ndarray, tile_width: int, halo: int) -> np.ndarray:
    """Watershed (h, W) of some rows, tile by tile and class by class."""
    flooded = landscape["region"].copy()
    for left in range(0, landscape.shape[1], tile_width):
        start = max(left - halo, 0)
        tile = landscape[:, start : left + tile_width + halo]
        basins = tile["region"].copy()
        for class_id in _classes_in(tile["class_id"]):
            from skimage.segmentation import watershed

            mask = tile["class_id"] == class_id
            basin = watershed(tile["height"], tile["marker"] * mask, mask=mask)
            basins[basin > 0] = basin[basin > 0]
        flooded[:, left : left + tile_width] = basins[:, left - start : left - start + tile_width]
    return flooded


def _classes_in(class_ids: np.ndarray) -> np.ndarray:
    """Classes of the pixels, each + 1, but the background."""
    return np.flatnonzero(np.bincount(class_ids.ravel(), minlength=1)[1:]) + 1


def _label(class_ids: np.ndarray, first: int) -> np.ndarray:
    """4-connected pieces (h, W) of one class each, numbered from `first` on; 0 where the class is 0."""
    pieces = np.zeros(class_ids.shape, np.int32)
    for class_id in _classes_in(class_ids):
        mask = class_ids == class_id
        labels, num = ndimage.label(mask)
        pieces[mask] = labels[mask] + (first - 1)
        first += num
    return pieces


class _Holes:
    """Pieces of background in an image of objects given band by band, and the objects adjacent to each."""

    def __init__(self) -> None:
        self.background = _Pieces()
        self._lowest, self._highest = np.zeros((2, 1), np.uint32)  # (N + 1,) adjacent object of each piece
        self._last_row: tuple[np.ndarray, np.ndarray] | None = None  # pieces and objects

    def add(self, objects: np.ndarray) -> None:
        """Add the next band (h, W)."""
        pieces = self.background.add(objects == 0)
        more = np.zeros(self.background.starts[-1] - len(self._lowest), np.uint32)
        self._lowest, self._highest = np.append(self._lowest, ~more), np.append(self._highest, more)
        pairs = [*neighbours(pieces, objects)]
        if self._last_row:
            pairs += [(self._last_row[0], objects[0]), (pieces[0], self._last_row[1])]
        else:
            self._lowest[pieces[0]] = BORDER
        self._lowest[pieces[:, [0, -1]]] = BORDER
        for piece, adjacent in pairs:
            edge = (piece > 0) & (adjacent > 0)
            np.minimum.at(self._lowest, piece[edge], adjacent[edge])
            np.maximum.at(self._highest, piece[edge], adjacent[edge])
        self._last_row = pieces[-1].copy(), objects[-1].copy()

    def enclosing_objects(self) -> np.ndarray:
        """Object (N + 1,) around the component of each piece; 0 if there are several, or it touches the border."""
        if self._last_row:
            self._lowest[self._last_row[0]] = BORDER
        component = self.background.components()
        lowest, highest = ~np.zeros(len(component), np.uint32), np.zeros(len(component), np.uint32)
        np.minimum.at(lowest, component, self._lowest)
        np.maximum.at(highest, component, self._highest)
        return np.where(lowest == highest, lowest, 0)[component]
