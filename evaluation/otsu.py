"""Otsu's threshold: a segmentation without learning, that a network should be better than."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

TALL = 512  # [px] rows that are read at a time
NUM_BIN = 256  # of the histogram of floating-point numbers, as in scikit-image
MAX_BIN = 2**16  # integers in a wider range are binned as floating-point numbers


def otsu_mask(image: np.ndarray, *, bright: bool) -> np.ndarray:
    """Pixels above (`bright`), or not above, the threshold that parts the grey values of an image in two classes best.

    Source: Otsu 1979, doi 10.1109/TSMC.1979.4310076.

    Parameters
    ----------
    image : ndarray
        (H, W) of any integer type, or of finite numbers of any float type; read by rows.
    bright : bool
        Whether the pixels above the threshold are True, or those that are not.

    Returns
    -------
    ndarray of bool
        (H, W).

    Examples
    --------
    >>> otsu_mask(np.array([[10, 12, 90, 11, 95]]), bright=True).tolist()
    [[False, False, True, False, True]]
    """
    threshold = np.float64(otsu_threshold(image))  # not a Python float, which a float16 image would round
    return np.concatenate([(band > threshold) == bright for band in _bands(image)])


def otsu_threshold(image: np.ndarray) -> float:
    """Threshold of an image (H, W), as `skimage.filters.threshold_otsu`; of a constant image its value."""
    from skimage.filters import threshold_otsu

    low = min(band.min().item() for band in _bands(image))
    high = max(band.max().item() for band in _bands(image))
    if low == high:
        return float(low)
    if image.dtype.kind in "bui" and image.dtype.itemsize <= 4 and high - low < MAX_BIN:
        num_bin, centres = int(high - low) + 1, np.arange(low, high + 1)
        counts = sum(np.bincount(band.ravel().astype(np.int64) - low, minlength=num_bin) for band in _bands(image))
    else:
        counts = sum(np.histogram(band.astype(np.float64), NUM_BIN, (low, high))[0] for band in _bands(image))
        centres = low + (np.arange(NUM_BIN) + 0.5) / NUM_BIN * (high - low)
    return float(threshold_otsu(hist=(np.asarray(counts), centres)))


def _bands(image: np.ndarray) -> Iterator[np.ndarray]:
    """Rows (h, W) of an image, which may be larger than memory."""
    return (image[top : top + TALL] for top in range(0, len(image), TALL))
