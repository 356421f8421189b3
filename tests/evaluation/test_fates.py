from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage.color import deltaE_ciede2000, rgb2lab

from evaluation.fates import ObjectMap, counts_text, object_fates
from evaluation.metrics import object_scores
from evaluation.pictures import COLOURS, FATES, OBJECTS, save_images

# Machado, Oliveira and Fernandes 2009, doi 10.1109/TVCG.2009.113, severity 1, for linear RGB
BLIND = {
    "none": np.eye(3),
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def test_fates_of_split_merged_missed_added_and_matched_objects():
    truth = [1, 1, 1, 1, 0, 2, 2, 3, 3, 0, 4, 4, 0, 0, 5, 5]
    found = [1, 1, 0, 2, 0, 3, 3, 3, 3, 0, 0, 0, 4, 0, 5, 5]
    found[1] = 0  # object 1 in two pieces of a pixel, objects 2 and 3 in one, 4 missed, found 4 added, 5 matched
    objects = ObjectMap((1, 16))
    objects.add(np.array([truth]), np.array([found]))
    assert objects.counts == {"matched": 2, "missed": 3, "added": 3, "split": 1, "merged": 0}  # 3 is half of found 3
    found[9] = 3  # now neither is
    of_truth, of_proposal = object_fates(np.array([truth]), np.array([found]))
    assert of_truth.tolist() == [0, 3, 2, 2, 2, 5] and of_proposal.tolist() == [0, 1, 1, 4, 1, 5]
    objects = ObjectMap((1, 16))
    objects.add(np.array([truth]), np.array([found]))
    assert objects.picture.tolist() == [[3, 3, 3, 3, 0, 4, 4, 4, 4, 4, 2, 2, 1, 0, 5, 5]]
    assert counts_text(objects.counts) == "1 matched, 4 missed (1 split), 4 added (1 merged)"


@pytest.mark.parametrize("partial", [False, True])
def test_fates_agree_with_object_f1(partial):
    rng = np.random.default_rng(3)
    truth = ndimage.label(ndimage.gaussian_filter(rng.normal(size=(90, 80)), 3) > 0.02)[0]
    found = ndimage.label(ndimage.shift(truth > 0, (1, 2), order=0))[0]
    if partial:
        truth[:, 50:] = -1
    objects = ObjectMap(truth.shape)
    objects.add(truth, found)
    tp, fn, fp = (objects.counts[name] for name in ("matched", "missed", "added"))
    assert min(tp, fn, fp) > 0
    assert object_scores(truth, found)["object_f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))


def test_fates_have_colours_that_differ_for_colour_blind_readers():
    colours = {**FATES, **COLOURS}
    assert len({*colours.values()}) == 7
    for name, kind in BLIND.items():
        values = np.array([*colours.values()]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4) @ np.transpose(kind)
        linear = np.clip(linear, 0, 1)
        seen = rgb2lab(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))
        for (a, one), (b, other) in combinations(zip(colours, seen, strict=True), 2):
            assert deltaE_ciede2000(one, other) > 10, (name, a, b)


def test_map_of_objects_is_a_small_picture_with_a_transparent_background(tmp_path):
    save_images(tmp_path, 0, {OBJECTS: np.array([[0, 1, 2, 3, 4, 5]], np.uint8)})
    with Image.open(tmp_path / "0000-objects.png") as picture:
        shown = np.asarray(picture.convert("RGBA"))
    assert shown[0, 0, 3] == 0 and [tuple(pixel) for pixel in shown[0, 1:, :3].tolist()] == [*FATES.values()]
