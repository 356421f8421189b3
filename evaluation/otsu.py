"""Otsu's threshold: a segmentation without learning, that a network should be better than."""

from __future__ import annotations

import numpy as np

from evaluation.pictures import row_bands

NUM_BIN = 256  # of the histogram of floating-point numbers, as in scikit-image
MAX_BIN = 2**16  # integers in a wider range are binned as floating-point numbers


def otsu_mask(image: np.ndarray, *, bright: bool) -> np.ndarray:
    """Pixels (H, W) above, or if not `bright` not above, the threshold that separates two classes of grey values best.

    Source: Otsu 1979, doi 10.1109/TSMC.1979.4310076.

    >>> otsu_mask(np.array([[10, 12, 90, 11, 95]]), bright=True).tolist()
    [[False, False, True, False, True]]
    """
    threshold = np.float64(otsu_threshold(image))  # not a Python float, which a float16 image would round
    return np.concatenate([(image[rows] > threshold) == bright for rows in row_bands(len(image))])


def otsu_threshold(image: np.ndarray) -> float:
    """Threshold of an image (H, W), as `skimage.filters.threshold_otsu`; of a constant image its value."""
    from skimage.filters import threshold_otsu

    bands = [image[rows] for rows in row_bands(len(image))]  # the image may be larger than memory
    low, high = min(band.min().item() for band in bands), max(band.max().item() for band in bands)
    if low == high:
        return float(low)
    if image.dtype.kind in "bui" and image.dtype.itemsize <= 4 and high - low < MAX_BIN:
        num_bin, centres = int(high - low) + 1, np.arange(low, high + 1)
        counts = sum(np.bincount(band.ravel().astype(np.int64) - low, minlength=num_bin) for band in bands)
    else:
        counts = sum(np.histogram(band.astype(np.float64), NUM_BIN, (low, high))[0] for band in bands)
        centres = low + (np.arange(NUM_BIN) + 0.5) / NUM_BIN * (high - low)
    return float(threshold_otsu(hist=(np.asarray(counts), centres)))
