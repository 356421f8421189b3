import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import regionprops_table

from prediction import measure
from prediction.measure import Moments, ObjectMeasurer

PROPERTIES = {
    "area": ("area",),
    "centre": ("centroid-0", "centroid-1"),
    "box": ("bbox-0", "bbox-1", "bbox-2", "bbox-3"),
    "solidity": ("solidity",),
    "mean": ("intensity_mean-0", "intensity_mean-1"),
    "std": ("intensity_std-0", "intensity_std-1"),
}
NAMES = ("area", "centroid", "bbox", "solidity", "intensity_mean", "intensity_std", "eccentricity")


def blobs(height=90, width=130):
    """Objects of many shapes, one of a pixel, one of a row, and one that reaches over the whole image."""
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((height, width)), 2)
    objects, num = ndimage.label(smooth > 0.05)
    objects[:, 60:64] = num + 1
    objects[40:44], objects[2, 3], objects[85, 100:120] = num + 1, num + 2, num + 3
    return np.unique(objects, return_inverse=True)[1].reshape(objects.shape).astype(np.uint32)


def measured(objects, pixels, band_height):
    measurer = ObjectMeasurer(pixels.shape[2])
    for top in range(0, len(objects), band_height):
        measurer.add(top, objects[top : top + band_height], pixels[top : top + band_height])
    return measurer.measures()


@pytest.mark.parametrize("band_height", [7, 90])
def test_measures_of_bands_are_those_of_scikit_image(monkeypatch, band_height):
    monkeypatch.setattr(measure, "PART", 3 * 130)  # three rows at once
    objects = blobs()
    pixels = np.random.default_rng(1).normal(1e6, 3, (*objects.shape, 2))  # which sums of squares would not resolve
    expected = regionprops_table(
        objects.astype(int), pixels, properties=(*NAMES, "label", "equivalent_diameter_area"), spacing=(1, 1)
    )
    found = measured(objects, pixels, band_height)
    assert np.array_equal(found.number, expected["label"]) and found.area.sum() == (objects > 0).sum()
    for name, columns in PROPERTIES.items():
        values = np.stack([expected[column] for column in columns], axis=1)
        np.testing.assert_allclose(getattr(found, name).reshape(values.shape), values, rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(found.diameter(), expected["equivalent_diameter_area"])
    np.testing.assert_allclose(found.eccentricity(), expected["eccentricity"], atol=1e-7)


def test_measures_of_pixels_that_are_no_squares_are_in_micron():
    objects = blobs()
    expected = regionprops_table(objects.astype(int), properties=("eccentricity", "area"), spacing=(0.5, 0.2))
    found = measured(objects, np.zeros((*objects.shape, 1)), 16)
    np.testing.assert_allclose(found.eccentricity((0.5, 0.2)), expected["eccentricity"], atol=1e-7)
    np.testing.assert_allclose(found.diameter((0.5, 0.2)), np.sqrt(4 / np.pi * expected["area"]))


def test_measures_of_an_object_in_pieces_and_of_numbers_with_gaps():
    objects = np.zeros((60, 20), np.uint32)
    objects[2:5, 3:9] = objects[50:53, 10:12] = 7
    objects[20:23, 1:4] = 3
    found = measured(objects, np.ones((60, 20, 1)), 10)
    expected = regionprops_table(objects.astype(int), properties=("label", "solidity", "area", "eccentricity"))
    assert found.number.tolist() == [3, 7] == expected["label"].tolist()
    assert found.solidity == pytest.approx(expected["solidity"]) and found.area.tolist() == [9, 24]
    assert found.eccentricity() == pytest.approx(expected["eccentricity"])


def test_measures_of_no_object_are_empty():
    found = measured(np.zeros((30, 20), np.uint32), np.ones((30, 20, 2)), 10)
    assert found.number.shape == (0,) and found.mean.shape == (0, 2) and found.eccentricity().shape == (0,)
    assert found.diameter().shape == (0,) and found.box.shape == (0, 4)


def test_measurer_leaves_only_the_outer_rows_of_large_objects():
    measurer = ObjectMeasurer(1)
    checkered = (np.indices((50, 400)).sum(0) % 2).astype(np.uint32)
    for top in range(0, 500, 50):
        measurer.add(top, checkered, np.ones((50, 400, 1)))
    assert sum(len(extents.rows) for extents in measurer._extents) == 500
    assert measurer.measures().area.tolist() == [100000]


def test_moments_merge_as_if_all_pixels_were_given_at_once():
    values = [np.array([1.0, 2, 3, 6]), np.array([2.0, 2, 5, 7])]  # of an object: means 3 and 4
    parts = [Moments.of(np.zeros(2, int), [value[half] for value in values], 1) for half in (np.s_[:2], np.s_[2:])]
    merged = parts[0].merge(parts[1])
    assert merged.num.tolist() == [4] and merged.mean.tolist() == [[3], [4]]
    assert merged.m2.tolist() == [[4 + 1 + 0 + 9], [4 + 4 + 1 + 9]] and merged.mxy.tolist() == [4 + 2 + 0 + 9]
