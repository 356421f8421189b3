import numpy as np
import pytest
from scipy import ndimage

from prediction.objects import ObjectFilter, ObjectList, filter_bands, filter_objects, separate_bands, separate_objects

EVEN = np.broadcast_to(np.float32(0.8), (10**4, 10**4))  # a probability that drops nothing


def test_separate_objects_parts_touching_discs():
    y, x = np.mgrid[:40, :80]
    distance = np.minimum(np.hypot(y - 20, x - 28), np.hypot(y - 20, x - 52))
    probability = np.clip(1.2 - distance / 18, 0, 1)  # 0.53 in the middle between them
    objects = separate_objects(probability, 0.5)
    assert objects.dtype == np.uint32 and set(np.unique(objects)) == {0, 1, 2}
    assert objects[20, 28] != objects[20, 52] and np.array_equal(objects > 0, probability > 0.5)
    assert separate_objects(probability, 0.9).max() == 2


@pytest.mark.parametrize(("value", "num"), [(0.0, 0), (0.6, 1), (1.0, 1)])
def test_separate_objects_of_constant_images(value, num):
    objects = separate_objects(np.full((20, 30), value, np.float32), 0.5)
    assert objects.max() == num and objects.shape == (20, 30)


def test_separate_objects_makes_a_region_without_a_marker_an_object():
    probability = np.zeros((20, 40))
    probability[5:15, 5:15], probability[5:15, 20:30] = 0.95, 0.6
    assert len(np.unique(separate_objects(probability, 0.5))) == 3


def smooth(shape, scale):
    field = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), scale)
    return (0.5 + field / field.std() / 4).clip(0, 1).astype(np.float32)


@pytest.mark.parametrize("tiles", [(128, 128, 128), (100, 1000, 64), (37, 64, 90), (700, 64, 64)])
def test_separate_bands_has_the_objects_of_the_whole_image(tiles):
    probability = smooth((300, 420), 8)
    whole = separate_objects(probability, 0.4)
    bands = list(separate_bands(probability, 0.4, *tiles))
    assert [row for band in bands for row in range(300)[band.rows]] == list(range(300))
    objects = np.concatenate([band.values for band in bands])
    assert objects.max() == whole.max() > 10 and np.array_equal(objects > 0, whole > 0)
    assert (objects != whole).mean() < 1e-3  # where two floods meet on one height, the order decides


def test_separate_bands_numbers_an_object_longer_than_its_halo_once():
    probability = np.zeros((90, 60), np.float32)
    probability[5:85, 5:10], probability[5:10, 5:55], probability[5:85, 50:55] = (
        0.6,
        0.6,
        0.6,
    )  # a bow without a marker,
    probability[2:22, 25:40] = 0.9  # but for one at its middle
    probability[60:80, 20:35] = 0.6  # an object without one
    for tiles in ((512, 512, 64), (16, 16, 4), (7, 60, 3)):
        objects = np.concatenate([band.values for band in separate_bands(probability, 0.5, *tiles)])
        assert np.array_equal(np.unique(objects), [0, 1, 2]) and np.array_equal(objects > 0, probability > 0.5)
        assert (objects[60:80, 20:35] == 2).all() and (objects == 2).sum() == 300


def test_separate_objects_parts_small_discs_and_makes_no_speck_a_marker():
    y, x = np.mgrid[:20, :200]
    centres = np.arange(10, 190, 9)  # discs of radius 5 overlap by a pixel
    distance = np.min([np.hypot(y - 10, x - centre) for centre in centres], axis=0)
    probability = 1 / (1 + np.exp(distance - 5.0))
    assert separate_objects(probability, 0.5).max() == len(centres)
    assert separate_objects(probability[:, :24], 0.5).max() == 2
    disc = 1 / (1 + np.exp(np.hypot(y - 10, x - 10) - 8.0))
    disc[10, 16:18] = 0.6, 0.9  # a speck at the rim
    assert separate_objects(disc, 0.5).max() == 1


def test_separate_objects_parts_touching_classes():
    classes = np.full((40, 60), 2)
    classes[10:30, 10:30], classes[10:30, 30:50] = 0, 1
    probability = np.moveaxis(np.eye(3)[classes] * 0.9 + 0.03, -1, 0)
    objects = separate_objects(probability, background=2)
    assert objects.max() == 2 and np.array_equal(objects > 0, classes != 2)
    assert len(np.unique(objects[classes == 0])) == len(np.unique(objects[classes == 1])) == 1
    assert (separate_objects(probability, background=0) == 0).sum() == 400


@pytest.mark.parametrize("tiles", [(32, 64, 32), (20, 500, 16)])
def test_separate_bands_of_classes_has_the_objects_of_the_whole_image(tiles):
    class_ids = np.digitize(smooth((90, 120), 5), [0.4, 0.6]).astype(np.uint8)
    probability = np.full(class_ids.shape, 0.9, np.float32)
    whole = np.concatenate([band.values for band in separate_bands(probability, 0.5, class_ids=class_ids)])
    objects = np.concatenate([band.values for band in separate_bands(probability, 0.5, *tiles, class_ids=class_ids)])
    assert whole.max() == objects.max() == sum(ndimage.label(class_ids == class_id)[1] for class_id in (1, 2))
    pairs = np.unique(np.stack([whole.ravel(), objects.ravel()]), axis=1)
    assert len(pairs.T) == whole.max() + 1  # one number of the one is one of the other


def scattered(shape=(150, 190), scale=2, threshold=0.5):
    """Objects of all sizes with holes, some of which have objects of their own in them."""
    return ndimage.label(smooth(shape, scale) > threshold)[0].astype(np.uint32)


def filtered_by_scikit_image(objects, min_size, fill):
    """The same from whole images: each hole is filled if all pixels around it are of one object."""
    from skimage.measure import label
    from skimage.segmentation import relabel_sequential

    objects = np.where(np.bincount(objects.ravel())[objects] >= min_size, objects, 0).astype(int)
    filled = objects.copy()
    regions = label(np.pad(objects == 0, 1, constant_values=True), connectivity=1)[1:-1, 1:-1]
    around = ndimage.generate_binary_structure(2, 1)
    for number in range(2, regions.max() + 1) if fill else ():  # 1 reaches the border
        adjacent = np.unique(objects[ndimage.binary_dilation(regions == number, around) & (regions != number)])
        if len(adjacent) == 1:
            filled[regions == number] = adjacent[0]
    return relabel_sequential(filled)[0]


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("min_size", [0, 12, 10**6])
@pytest.mark.parametrize("threshold", [0.4, 0.5])  # one large object with many holes, or many objects
def test_filter_bands_gives_what_scikit_image_makes_of_the_whole_image(fill, min_size, threshold):
    objects = scattered(threshold=threshold)
    expected = filtered_by_scikit_image(objects, min_size, fill)
    for band_height in (1, 7, 64, 150, 512):
        bands = list(filter_bands(objects, EVEN, ObjectFilter(min_size, fill), band_height))
        assert [row for band in bands for row in range(150)[band.rows]] == list(range(150))
        assert np.array_equal(np.concatenate([band.values for band in bands]), expected)
    assert np.array_equal(filter_objects(objects.copy(), EVEN, ObjectFilter(min_size, fill)), expected)
    changed = not np.array_equal(expected, objects)
    assert changed == (fill or min_size > 0) and (expected.max() > 1) == (min_size < 10**6)


def test_filter_objects_fills_the_holes_that_binary_fill_holes_fills():
    objects = np.zeros((60, 90), np.uint32)
    y, x = np.mgrid[:60, :90]
    for number, (top, left) in enumerate([(15, 15), (15, 45), (45, 30), (40, 89)], 1):  # the last one is cut
        distance = np.hypot(y - top, x - left)
        objects[(distance < 12) & (distance > 3 * number)] = number
    expected = sum(number * ndimage.binary_fill_holes(objects == number) for number in range(1, 5))
    filled = filter_objects(objects.copy(), EVEN, ObjectFilter(fill_holes=True))
    assert np.array_equal(filled, expected) and 0 < np.sum(filled != objects) < np.sum(objects == 0)


def test_filter_objects_drops_small_objects_before_it_fills_holes():
    cells = np.ones((9, 9), np.uint32)
    cells[2:7, 2:7], cells[4, 4] = 0, 2  # a speck in a hole
    assert np.array_equal(filter_objects(cells.copy(), EVEN, ObjectFilter(0, True)), cells)  # the hole lies between two
    assert (filter_objects(cells.copy(), EVEN, ObjectFilter(2, True)) == 1).all()
    cells[3:6, 3:6] = 0
    cells[0, 4] = cells[1, 4] = 0  # open to the border
    assert np.array_equal(filter_objects(cells.copy(), EVEN, ObjectFilter(0, True)), cells)


@pytest.mark.parametrize("band_height", [1, 7, 512])
def test_objects_that_are_certain_nowhere_are_dropped(band_height):
    probability = np.zeros((30, 20), np.float32)
    probability[2:9, 2:9], probability[20:29, 2:9], probability[2:29, 12:18] = 0.6, 0.6, 0.8
    probability[28, 8] = 0.95  # of the second one, in its last row
    objects = separate_objects(probability)
    assert objects.max() == 3 and separate_objects(probability, certainty=0.99).max() == 0
    expected = np.where(objects == objects[20, 2], 1, 0)
    assert np.array_equal(separate_objects(probability, certainty=0.9), expected)
    bands = filter_bands(objects, probability, ObjectFilter(certainty=0.9), band_height)
    assert np.array_equal(np.concatenate([band.values for band in bands]), expected)
    assert np.array_equal(separate_objects(probability, certainty=0.7) > 0, (objects > 0) & (objects != objects[2, 2]))


def test_separate_objects_filters_also_several_classes():
    classes = np.zeros((40, 60), int)
    classes[5:25, 5:25], classes[12:16, 12:16], classes[5:25, 25:45], classes[30:33, 30:33] = 1, 0, 2, 2
    probability = np.moveaxis(np.eye(3)[classes] * 0.9 + 0.03, -1, 0)
    assert separate_objects(probability).max() == 3
    objects = separate_objects(probability, min_size=10, fill_holes=True)
    assert objects.max() == 2 and (objects[5:25, 5:25] == 1).all() and (objects[5:25, 25:45] == 2).all()
    assert not separate_objects(np.zeros((5, 5)), min_size=3, fill_holes=True).any()


def test_object_filter_says_what_it_does():
    assert not ObjectFilter(1).is_active and str(ObjectFilter()) == "all kept"
    assert str(ObjectFilter(20, True)) == "under 20 px dropped, holes filled"
    assert str(ObjectFilter(certainty=0.9)) == "nowhere above 0.9 dropped" and ObjectFilter(certainty=0.9).is_active


def test_object_list_has_the_class_of_the_pixels_not_of_a_filled_hole():
    objects, class_ids = np.full((6, 6), 1), np.full((6, 6), 3, np.uint8)
    class_ids[2:4, 2:4], objects[5], class_ids[5] = 2, 3, 1
    for band_height in (6, 3, 1):
        found = ObjectList()
        for top in range(0, 6, band_height):
            found.add(objects[top : top + band_height], class_ids[top : top + band_height])
        assert found.area.tolist() == [0, 30, 0, 6] and found.class_id[[1, 3]].tolist() == [3, 1]
