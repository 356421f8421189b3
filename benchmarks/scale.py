"""Object F1 of nuclei that are smaller or larger than those of the training, with and without `--scale`.

    python run_make_database.py --name_data nuclei --synthetic 16 --size 256 --phantom nuclei
    python main.py --mode train --name_data nuclei --nch_ker 8 --max_minutes 1.5 --gpu_ids -1
    python benchmarks/scale.py checkpoints/unet/nuclei/model_best.pth

Phantom images of another seed are resampled linearly to half and double size, and their objects by the nearest pixel.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation.metrics import object_scores
from images.resample import resampled
from predict import load, predict_array
from prediction.predictor import Predictor
from sources.phantom import nuclei_images

SIZES = (0.5, 1.0, 2.0)  # of the images against those of the training


def main() -> None:
    """Print the table of one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--num", type=int, default=8, help="number of images (default: 8)")
    parser.add_argument("--seed", type=int, default=1000, help="of the images (default: 1000)")
    args = parser.parse_args()
    predictor, pairs = load(args.checkpoint), [*zip(*nuclei_images(args.num, seed=args.seed), strict=True)]
    print("| size | object F1 | with `--scale` |\n|---|---|---|")
    for size in SIZES:
        scores = [mean(score(predictor, *pair, size, scale) for pair in pairs) for scale in (1.0, 1 / size)]
        print(f"| {size:g} |", *(f"{value:.4f} |" for value in scores), flush=True)


def score(predictor: Predictor, image: np.ndarray, label: np.ndarray, size: float, scale: float) -> float:
    """Object F1 of an image (H, W) at another size."""
    objects = ndimage.label(label)[0]
    height, width = (round(length * size) for length in image.shape)
    rows, columns = (((np.arange(n) + 0.5) / size).astype(int) for n in (height, width))
    truth = objects[np.minimum(rows, len(objects) - 1)][:, np.minimum(columns, objects.shape[1] - 1)]
    pixels = resampled(image[..., None], (height, width))[:]
    return object_scores(truth, predict_array(predictor, pixels, what="cells", scale=scale))["object_f1"]


if __name__ == "__main__":
    main()
