import numpy as np
import pytest
from skimage.filters import threshold_otsu

from evaluation import pictures
from evaluation.otsu import otsu_mask, otsu_threshold


def two_peaks(dtype, shape=(40, 50)):
    """Grey values about 30 and about 90, in equal parts."""
    rng = np.random.default_rng(0)
    return (rng.normal(30, 8, shape) + 60 * rng.integers(0, 2, shape)).clip(0, 120).astype(dtype)


@pytest.mark.parametrize("band", [512, 7])
@pytest.mark.parametrize("dtype", ["u1", "i1", "<u2", ">i2", "i4", "f4", "f8"])
def test_otsu_threshold_is_that_of_scikit_image_for_each_type(monkeypatch, dtype, band):
    monkeypatch.setattr(pictures, "BAND", band)
    image = two_peaks(dtype)
    expected = threshold_otsu(image.astype(image.dtype.newbyteorder("=")))
    assert otsu_threshold(image) == pytest.approx(expected, rel=1e-6)
    assert np.array_equal(otsu_mask(image, bright=True), image > expected)
    assert np.array_equal(otsu_mask(image, bright=False), image <= expected)


@pytest.mark.parametrize(("scale", "dtype"), [(2.0**25, "i8"), (2.0**18, "i4"), (2.0**-6, "f2"), (-1.0, "f8")])
def test_otsu_threshold_of_wide_integers_and_small_or_negative_floats(scale, dtype):
    image = (two_peaks("f8") * scale).astype(dtype)
    assert 50 < otsu_threshold(image) / scale < 70
    assert otsu_mask(image, bright=scale > 0).sum() == np.sum(image / scale > otsu_threshold(image) / scale)


def test_otsu_mask_of_a_constant_image_has_no_bright_pixel():
    for image in (np.full((4, 4), 7, np.uint8), np.full((4, 4), 0.5), np.zeros((3, 1), bool)):
        assert otsu_threshold(image) == image[0, 0]
        assert not otsu_mask(image, bright=True).any() and otsu_mask(image, bright=False).all()
    assert otsu_mask(np.eye(4, dtype=bool), bright=True).tolist() == np.eye(4, dtype=bool).tolist()
