import os
import shutil
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

import main
import run_make_database
from description import DataInfo
from samples import IGNORE, list_samples, write_sample
from training.weight_map import FAR, border_distance, cache_border_distances, pixel_weight
from utils import UserError


def nearest_two(label):
    """d1 + d2 from all pairs of pixels."""
    objects = sum(ndimage.label(label == k)[0] + 1000 * k * (label == k) for k in range(1, label.max() + 1))
    everywhere = np.argwhere(np.ones_like(label))
    each = [cdist(everywhere, np.argwhere(objects == n)).min(1) for n in np.unique(objects[objects > 0])]
    return np.sort(each, 0)[:2].sum(0).reshape(label.shape)


@pytest.mark.parametrize("seed", range(6))
def test_border_distance_is_that_of_all_pairs_of_pixels(seed):
    rng = np.random.default_rng(seed)
    label = np.digitize(ndimage.gaussian_filter(rng.normal(size=(40, 50)), 3), [0.03, 0.06][: 1 + seed % 2])
    assert np.allclose(border_distance(label), nearest_two(label), atol=0.02)


def test_border_distance_of_a_large_label_takes_few_bytes_and_is_exact():
    label = np.zeros((3000, 400), np.uint8)
    label[::60, :120:40] = label[5::90, 150::70] = 1
    label[500:900, 340:] = 2
    tracemalloc.start()
    distance = border_distance(label)
    assert tracemalloc.get_traced_memory()[1] < 60 * label.size  # of which 48 are of a band of a third
    tracemalloc.stop()
    pixels = np.argwhere(label[740:960] > 0) + np.array([740, 0])
    numbers = ndimage.label(label > 0)[0][tuple(pixels.T)]
    for y, x in ((873, 250), (874, 250), (785, 60), (873, 20), (900, 100), (898, 338)):
        away = np.hypot(*(pixels - [y, x]).T)
        nearest = sorted(away[numbers == n].min() for n in np.unique(numbers))
        assert distance[y, x] == pytest.approx(min(sum(nearest[:2]), FAR), abs=0.02)


def test_border_distance_beyond_its_limit_or_of_one_object_is_far():
    label = np.zeros((20, 200), int)
    assert (border_distance(label) == FAR).all()
    label[5:9, 5:9] = 1
    assert (border_distance(label) == FAR).all()
    label[5:9, 190:] = 1
    distance = border_distance(label)
    assert distance[6, 100] == FAR and distance.max() <= FAR


def test_border_distance_takes_ignored_pixels_for_no_object():
    label = np.zeros((20, 60), np.uint8)
    label[5:9, 5:9] = label[5:9, 12:16] = 1
    partial = label.copy()
    partial[:, 30:] = IGNORE
    distance = border_distance(partial)
    assert np.array_equal(distance, border_distance(label))  # an object there would be near the second one
    assert np.isfinite(distance).all()


def test_border_distance_of_300_cells_takes_less_than_a_second():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 512, (300, 2))
    owner = cKDTree(points).query(np.argwhere(np.ones((512, 512))))[1].reshape(512, 512)
    border = ndimage.maximum_filter(owner, 3) != ndimage.minimum_filter(owner, 3)
    start = time.perf_counter()
    distance = border_distance((~border).astype(np.uint8))
    assert time.perf_counter() - start < 1.0  # 0.3 s when written
    assert distance[border].min() >= 2 and distance[border].max() < 10


def test_pixel_weight_follows_the_papers_equation():
    label, distance = torch.tensor([[[0, 1, 2]]]), torch.tensor([[[4.0, 4.0, 4.0]]])
    weight = pixel_weight(label, distance, [0.5, 0.3, 0.2], w0=10.0, sigma=5.0)[0, 0]
    expected = [1 / 1.5 + 10 * np.exp(-16 / 50), 1 / 0.9, 1 / 0.6]
    assert weight.tolist() == pytest.approx(expected, rel=1e-5)
    plain = pixel_weight(label, distance, None, w0=10.0, sigma=5.0)[0, 0]
    assert plain.tolist() == pytest.approx([1 + 10 * np.exp(-16 / 50), 1, 1], rel=1e-5)


# --- the files beside the samples

INFO = DataInfo(1, [0, 255], ["0", "255"], [0.5, 0.5], [0.0], [1.0], [0.0, 255.0])
LABEL = np.zeros((24, 40), np.uint8)
LABEL[4:9, 4:9] = LABEL[4:20, 12:18] = 1
OTHER = np.ascontiguousarray(LABEL[::-1, ::-1])


def save_label(folder, layout, label):
    """Write a sample, or only its label where that is a file of its own, and return the file that holds the label."""
    if layout == "structured":
        write_sample(folder / "00000.npy", label[..., None], label)
        return folder / "00000.npy"
    if not (folder / "input_000.npy").exists():
        np.save(folder / "input_000.npy", label * 100)
    np.save(folder / "label_000.npy", label * 255)
    return folder / "label_000.npy"


def cached(folder):
    """The distances that a training would use, made again where needed."""
    cache_border_distances(list_samples(folder), INFO)
    return np.array(list_samples(folder)[0].open_distance())


@pytest.mark.parametrize("layout", ["structured", "pair"])
@pytest.mark.parametrize("seconds", [-1e6, 0, 1e6])
def test_cache_is_made_again_for_another_label_whatever_its_time(tmp_path, layout, seconds):
    path = save_label(tmp_path, layout, LABEL)
    assert np.array_equal(cached(tmp_path), border_distance(LABEL))
    time_ns = path.stat().st_mtime_ns + int(seconds * 1e9)
    time.sleep(0.02)  # the clock of a file system may tick every 4 ms only
    save_label(tmp_path, layout, OTHER)
    os.utime(path, ns=(time_ns, time_ns))
    assert np.array_equal(cached(tmp_path), border_distance(OTHER))


@pytest.mark.parametrize("copy", [shutil.copy, shutil.copy2])
@pytest.mark.parametrize("layout", ["structured", "pair"])
def test_cache_of_a_copied_database_is_that_of_its_labels(tmp_path, layout, copy):
    for name, label in (("one", LABEL), ("other", OTHER)):
        (tmp_path / name).mkdir()
        save_label(tmp_path / name, layout, label)
        cached(tmp_path / name)
    shutil.copytree(tmp_path / "one", tmp_path / "copy", copy_function=copy)
    kept = list_samples(tmp_path / "copy")[0].distance.stat().st_ino
    assert np.array_equal(cached(tmp_path / "copy"), border_distance(LABEL))
    assert list_samples(tmp_path / "copy")[0].distance.stat().st_ino == kept  # they were right
    for path in (tmp_path / "other").iterdir():  # a part of the other database takes the place of the first one's
        if not path.name.endswith(".distance.npy"):
            copy(path, tmp_path / "copy" / path.name)
    assert np.array_equal(cached(tmp_path / "copy"), border_distance(OTHER))


def test_cache_is_made_again_for_other_class_values(tmp_path):
    save_label(tmp_path, "pair", LABEL)
    first = cached(tmp_path)
    info = replace(INFO, class_values=[255, 0])  # the background is the foreground now
    cache_border_distances(list_samples(tmp_path), info)
    second = list_samples(tmp_path)[0].open_distance()
    assert np.array_equal(second, border_distance(1 - LABEL)) and not np.array_equal(first, second)


@pytest.mark.parametrize("layout", ["structured", "pair"])
def test_cache_of_an_earlier_version_is_made_again(tmp_path, layout):
    save_label(tmp_path, layout, LABEL)
    file = list_samples(tmp_path)[0]
    np.save(file.distance, border_distance(OTHER))  # newer than the label, as after a label of an older time
    assert np.array_equal(cached(tmp_path), border_distance(LABEL))
    kept = file.distance.stat().st_ino
    assert np.array_equal(cached(tmp_path), border_distance(LABEL))
    assert file.distance.stat().st_ino == kept


def test_cache_that_is_right_serves_where_nothing_can_be_written(tmp_path, monkeypatch):
    save_label(tmp_path, "structured", LABEL)
    np.save(list_samples(tmp_path)[0].distance, border_distance(LABEL))

    opened = Path.open

    def read_only(path, mode="r", **options):
        if mode[0] != "r":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", read_only)  # root may write anywhere
    assert np.array_equal(cached(tmp_path), border_distance(LABEL))
    shutil.copy(tmp_path / "00000.npy", tmp_path / "00001.npy")
    with pytest.raises(UserError, match=r"00001\.distance\.npy: Permission denied.* or train with --loss bce"):
        cached(tmp_path)


def test_cache_that_a_database_was_made_with_is_not_made_again(work):
    assert run_make_database.main(["--synthetic", "4", "--size", "48"]) == 0
    kept = {path: path.stat().st_ctime_ns for path in Path("datasets/em/train").glob("*.distance.npy")}
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    assert len(kept) == 2 and all(path.stat().st_ctime_ns == time_ns for path, time_ns in kept.items())


def pytorch_unet_lists(folder):
    """Inputs and labels as the data set of pytorch-UNET lists them, in its order; the n-th ones are a pair."""
    names = [path.name for path in folder.iterdir()]
    listed = [[name for name in names if name.startswith(kind)] for kind in ("input", "label")]
    return [sorted(of, key=lambda name: int("".join(filter(str.isdigit, name)))) for of in listed]


def test_cache_leaves_a_pair_database_the_same_for_pytorch_unet(work):
    rng = np.random.default_rng(0)
    for split, num in (("train", 24), ("val", 3)):
        folder = work / "datasets" / "em" / split
        folder.mkdir(parents=True)
        for number in range(num):
            label = np.kron(rng.integers(0, 2, (8, 8)), np.ones((4, 4))).astype(np.uint8)
            np.save(folder / f"input_{number:03d}.npy", label * 100)
            np.save(folder / f"label_{number:03d}.npy", label * 255)
    folder = work / "datasets" / "em" / "train"
    expected = [[f"{kind}_{number:03d}.npy" for number in range(24)] for kind in ("input", "label")]
    assert pytorch_unet_lists(folder) == expected
    label = np.load(folder / "label_003.npy") // 255
    np.save(folder / "input_003.distance.npy", border_distance(label))  # of an earlier version
    np.save(folder / "input_004.distance.npy", np.zeros((3, 3), np.uint8))  # of somebody else
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    assert (folder / "input_004.distance.npy").exists()
    (folder / "input_004.distance.npy").unlink()
    assert pytorch_unet_lists(folder) == expected
    assert len(list_samples(folder)) == 24
    assert np.array_equal(list_samples(folder)[3].open_distance(), border_distance(label))
