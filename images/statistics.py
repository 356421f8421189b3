"""Mean and standard deviation of images, including those that are read by rows."""

from __future__ import annotations

import numpy as np

from images.rows import Rows
from utils import UserError

ONE_PIECE = 2**22  # [px] larger images are measured in parts


def image_statistics(image: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of an image, over all of its pixels.

    Parameters
    ----------
    image : Rows
        (H, W, C), an array or an image that is read by rows.

    Returns
    -------
    mean, std : ndarray of float64
        (C,) each; the standard deviation of a constant image is 1.

    Raises
    ------
    UserError
        A pixel is NaN, infinite, or beyond 1e150.
    """
    height, width = image.shape[:2]
    moments = Moments()
    if height * width < ONE_PIECE:
        moments.add(image[:height])
        return moments.statistics()
    few = max(2**18 // width, 1)  # rows that stay in the processor's cache as float64
    for top in range(0, height, 512):  # rows that are read at once: each segment of a file is decoded once
        rows = image[top : min(top + 512, height)]
        for first in range(0, len(rows), few):
            moments.add(rows[first : first + few])
    return moments.statistics()


class Moments:
    """Mean and standard deviation of each channel, for pixels given in parts.

    Squares are summed about the mean of each part, so that a large offset costs no precision:
    T. F. Chan, G. H. Golub and R. J. LeVeque, The American Statistician 37 (1983), equation 2.1.
    """

    def __init__(self) -> None:
        self.count: int = 0
        self.mean: np.ndarray = np.zeros(())  # (C,)
        self.square: np.ndarray = np.zeros(())  # (C,) sum of squared differences from the mean

    def add(self, image: np.ndarray) -> None:
        """Add pixels (H, W, C)."""
        pixels = image.reshape(-1, image.shape[2]).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # `statistics` refuses the result
            shift = pixels[0].copy() if is_wide(image.dtype) else np.float64(0)
            pixels -= shift
            mean = pixels.mean(0)
            square = ((pixels - mean) ** 2).sum(0)
            difference, count = mean + shift - self.mean, self.count + len(pixels)
            self.square = self.square + square + difference**2 * (self.count * len(pixels) / count)
            self.mean = self.mean + difference * (len(pixels) / count) if self.count else mean + shift
            self.count = count

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (C,) of the pixels added; the standard deviation of a constant channel is 1.

        Raises
        ------
        UserError
            A pixel was NaN or infinite, or its square is beyond the range of float64.
        """
        std = np.sqrt(self.square / self.count)
        if not np.isfinite([self.mean, std]).all():
            raise UserError("it holds NaN, infinity or numbers beyond 1e150: repair the image")
        return self.mean, np.where(std > 0, std, 1.0)


def is_wide(dtype: np.dtype) -> bool:
    """Whether float32 can't hold all values of a type: integers from 32 bits on, and float64."""
    return not np.can_cast(dtype, np.float32)
