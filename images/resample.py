"""An image at another pixel size, read by rows like the image itself."""

from __future__ import annotations

import math

import numpy as np
from scipy import sparse

from images.rows import LazyImage, Rows
from images.statistics import is_wide

PIECE = 512  # rows of the original that are in memory at once


def resampled(image: Rows, shape: tuple[int, int]) -> LazyImage:
    """Image (height, width, C), interpolated linearly from an image (H, W, C), in float32 or, of a wide type, float64.

    Where it is smaller, each pixel is a mean of those that it covers, by a triangle that is wider by the same factor,
    so that fine structures don't alias. A row is the same whichever rows are read with it.
    """
    dtype = np.dtype(np.float64 if is_wide(image.dtype) else np.float32)
    rows, columns = (_weights(*lengths).astype(dtype) for lengths in zip(image.shape[:2], shape, strict=True))
    step = max(PIECE * shape[0] // image.shape[0], 1)

    def piece(top: int, bottom: int) -> np.ndarray:
        weights = rows[top:bottom]
        first, last = weights.indices.min(), weights.indices.max() + 1
        pixels = np.asarray(image[first:last], dtype)
        height, width, nch = pixels.shape
        pixels = (weights[:, first:last] @ pixels.reshape(height, width * nch)).reshape(-1, width, nch)
        pixels = columns @ pixels.transpose(1, 0, 2).reshape(width, -1)  # (new width, h * C)
        return pixels.reshape(shape[1], -1, nch).transpose(1, 0, 2)

    def read(top: int, bottom: int) -> np.ndarray:
        return np.concatenate([piece(first, min(first + step, bottom)) for first in range(top, bottom, step)])

    return LazyImage((*shape, image.shape[2]), dtype, read)


def _weights(length: int, new: int) -> sparse.csr_array:
    """Weights (new, length) of the pixels along an axis of which each new one is the mean.

    >>> _weights(2, 4).toarray().tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    step = length / new
    radius = max(step, 1.0)  # of the triangle
    centre = (np.arange(new) + 0.5) * step - 0.5
    index = np.floor(centre - radius).astype(int)[:, None] + 1 + np.arange(math.ceil(2 * radius))
    weight = np.clip(1 - np.abs(index - centre[:, None]) / radius, 0, None) * ((index >= 0) & (index < length))
    index = np.clip(index, 0, length - 1)
    weight = weight / weight.sum(1, keepdims=True)
    row = np.broadcast_to(np.arange(new)[:, None], index.shape)
    weights = sparse.coo_array((weight.ravel(), (row.ravel(), index.ravel())), shape=(new, length)).tocsr()
    weights.eliminate_zeros()
    return weights
