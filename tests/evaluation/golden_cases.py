"""Masks and probabilities whose scores Fiji has computed; see `expected.json` next to them."""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"


def load_case(path):
    """Label and probability of a golden case; the levels are divided in float32 and compared in float64."""
    with np.load(path) as case:
        return case["label"], (case["prob"].astype(np.float32) / np.float32(255)).astype(np.float64)
