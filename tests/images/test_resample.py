import numpy as np
import pytest
import torch

from images.resample import resampled

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(24, 40), (7, 11), (12, 20), (25, 9), (12, 41)])
def test_resampled_is_the_linear_interpolation_of_torch(shape):
    image = RNG.random((12, 20, 2)).astype(np.float32)
    tensor = torch.from_numpy(image).movedim(-1, 0)[None]
    expected = torch.nn.functional.interpolate(tensor, shape, mode="bilinear", antialias=True)[0].movedim(0, -1).numpy()
    assert np.allclose(resampled(image, shape)[:], expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(31, 50), (9, 13)])
def test_resampled_rows_do_not_depend_on_those_read_with_them(shape):
    image = RNG.integers(0, 255, (23, 17, 3), np.uint8)
    scaled = resampled(image, shape)
    rows = np.concatenate([scaled[top : top + 4] for top in range(0, shape[0], 4)])
    assert scaled.shape == (*shape, 3) and np.array_equal(rows, scaled[:]) and scaled[5:5].shape == (0, shape[1], 3)
