"""An image at another pixel size, read by rows like the image itself."""

from __future__ import annotations

import math

import numpy as np
from scipy import sparse

from images.rows import LazyImage, Rows


def resampled(image: Rows, shape: tuple[int, int]) -> LazyImage:
    """Image (height, width, C) of float32, interpolated linearly from an image (H, W, C).

    Where it is smaller, each pixel is a mean of those that it covers, by a triangle that is wider by the same factor,
    so that fine structures don't alias. A row is the same whichever rows are read with it.
    """
    rows, columns = _weights(image.shape[0], shape[0]), _weights(image.shape[1], shape[1])

    def read(top: int, bottom: int) -> np.ndarray:
        weights = rows[top:bottom]
        first, last = weights.indices.min(), weights.indices.max() + 1
        pixels = np.asarray(image[first:last], np.float32)
        height, width, nch = pixels.shape
        pixels = (weights[:, first:last] @ pixels.reshape(height, width * nch)).reshape(-1, width, nch)
        pixels = columns @ pixels.transpose(1, 0, 2).reshape(width, -1)  # (new width, h * C)
        return pixels.reshape(shape[1], -1, nch).transpose(1, 0, 2)

    return LazyImage((*shape, image.shape[2]), np.dtype(np.float32), read)


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
    weight = (weight / weight.sum(1, keepdims=True)).astype(np.float32)
    row = np.broadcast_to(np.arange(new)[:, None], index.shape)
    weights = sparse.coo_array((weight.ravel(), (row.ravel(), index.ravel())), shape=(new, length)).tocsr()
    weights.eliminate_zeros()
    return weights
