import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataset import PatchDataset, Window
from description import DataInfo, describe, load_info
from samples import IGNORE, SampleFile, list_samples, write_sample
from training.sampler import AnnotatedBlocks, BatchSettings, PatchSampler, find_annotated
from utils import UserError

CPU = torch.device("cpu")
INFO = DataInfo(1, [0, 255], ["a", "b"], [0.5, 0.5], [0.0], [1.0], [0.0, 255.0])


def write_coordinates(path, height=40, width=50):
    """A sample whose pixels say where they are."""
    y, x = np.mgrid[:height, :width]
    write_sample(path, np.stack([y, x], -1).astype(np.uint16), ((y // 4 + x // 4) % 2).astype(np.uint8))


def coordinates(tmp_path, **kwargs) -> PatchDataset:
    write_coordinates(tmp_path / "0.npy")
    info = DataInfo(2, [0, 255], ["a", "b"], [0.5, 0.5], [0.0, 0.0], [1.0, 1.0], [0.0, 255.0])
    return PatchDataset(list_samples(tmp_path), info, labelled=True, **{"memory": CPU} | kwargs)


def test_pair_layout_of_pytorch_unet_is_read(tmp_path):
    (tmp_path / "train").mkdir()
    label = np.array([[0, 255], [255, 255]], np.uint8)
    for number in (2, 10):
        np.save(tmp_path / "train" / f"input_{number:03d}.npy", np.full((2, 2), number, np.uint8))
        np.save(tmp_path / "train" / f"label_{number:03d}.npy", label)
    info = load_info(tmp_path)
    assert (info.class_values, info.mean, info.class_share) == ([0, 255], [6.0], [0.25, 0.75])
    for memory in (CPU, None):
        data = PatchDataset(list_samples(tmp_path / "train"), info, labelled=True, memory=memory)
        assert data[0]["label"].tolist() == [[0, 1], [1, 1]]
        assert data[1]["input"].tolist() == [[[1.0, 1.0], [1.0, 1.0]]]  # (10 - 6) / 4


def test_window_beyond_the_image_is_reflected(tmp_path):
    data = coordinates(tmp_path)
    sample = data[Window(0, -2, 48, 4, 4)]
    assert sample["input"][0, :, 0].tolist() == [2, 1, 0, 1]
    assert sample["input"][1, 0].tolist() == [48, 49, 48, 47]
    assert sample["label"].shape == (4, 4)


@pytest.mark.parametrize("margin", [0, 3, 8, 20])  # 20 would take more than twice the memory
@pytest.mark.parametrize("window", [Window(0, 4, 5, 30, 40), Window(0, -3, 30, 30, 23), Window(0, -9, 30, 30, 30), 0])
def test_window_is_the_same_from_memory_and_disk(tmp_path, margin, window):
    kept, streamed = coordinates(tmp_path, margin=margin)[window], coordinates(tmp_path, memory=None)[window]
    assert kept.keys() == streamed.keys() and kept["input"].shape == streamed["input"].shape
    assert all(torch.equal(torch.as_tensor(kept[name]), torch.as_tensor(streamed[name])) for name in kept)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
def test_window_from_memory_is_that_of_the_image_wherever_it_lies(tmp_path, dtype):
    image = np.random.default_rng(0).integers(0, 200, (20, 30, 1)).astype(dtype)
    write_sample(tmp_path / "0.npy", image, None)
    files, info = [SampleFile(tmp_path / "0.npy")], DataInfo(1, [0, 1], ["a", "b"], [0.5, 0.5], [0.0], [1.0], [0, 1])
    kept = PatchDataset(files, info, labelled=False, memory=torch.device("cpu"), margin=4)
    read = PatchDataset(files, info, labelled=False)
    for window in (Window(0, -4, -4, 20, 20), Window(0, -4, -4, 64, 90), Window(0, 3, 20, 12, 30)):
        expected = np.pad(image[..., 0], 99, "reflect")[window.top + 99 :, window.left + 99 :]
        for data in (kept, read):
            assert np.array_equal(data[window]["input"][0], expected[: window.height, : window.width])


def sampler_of(shapes, height, width=0, margin=0, annotated=None, batch_size=4, **settings):
    """Sampler of square crops, if there is no width."""
    settings = BatchSettings((height, width or height), batch_size, **{"seed": 0} | settings)
    return PatchSampler(shapes, margin, settings, annotated)


def drawn(sampler, epoch=1):
    """Windows of an epoch, whatever their batches."""
    return [window for batch in sampler.batches(epoch) for window in batch]


def test_crop_reaches_the_first_and_the_last_row_and_column():
    sampler = sampler_of([(12, 10)], 8, margin=3, batch_size=1, num_crop=1)
    corners = {(w.top + 3, w.left + 3) for epoch in range(200) for w in drawn(sampler, epoch)}
    assert corners == {(y, x) for y in range(5) for x in range(3)}


def test_batches_of_an_epoch_are_a_function_of_seed_and_epoch():
    sampler = sampler_of([(40, 40)] * 7, 32, batch_size=3, seed=5, num_crop=7)
    batches = sampler.batches(4)
    assert [len(batch) for batch in batches] == [3, 3, 1] and len(sampler) == 3
    assert sorted(w.index for w in drawn(sampler, 4)) == list(range(7))
    assert sampler.batches(4) == batches != sampler.batches(5)
    assert sampler_of([(40, 40)] * 7, 32, batch_size=3, seed=6, num_crop=7).batches(4) != batches
    sampler.set_epoch(4, first_step=2)
    assert list(sampler) == batches[2:]


def test_batches_of_24_ordinary_images_have_the_windows_of_always():
    sampler = sampler_of([(40 + i, 64 - i) for i in range(24)], 32, margin=3, batch_size=5, seed=7)
    assert [(w.index, w.top, w.left, w.crop) for w in drawn(sampler, 2)] == [  # as before --num_crop
        *[(10, -2, -3, 0), (22, 17, 1, 0), (2, -3, 16, 0), (8, 1, 21, 0), (13, -3, 4, 0), (7, -1, 20, 0)],
        *[(17, 1, 4, 0), (19, -1, -3, 0), (20, 7, 3, 0), (4, -3, 7, 0), (1, 5, 6, 0), (3, 4, 8, 0)],
        *[(5, 0, 5, 0), (0, 3, 19, 0), (6, -2, 16, 0), (21, 10, -1, 0), (15, 17, 8, 0), (16, 20, -2, 0)],
        *[(14, 3, 7, 0), (18, 3, 5, 0), (11, 10, 1, 0), (12, 0, -3, 0), (9, 14, -3, 0), (23, 11, -2, 0)],
    ]


@pytest.mark.parametrize(
    ("shapes", "num_crop", "expected"),
    [
        ([(512, 512)] * 3, 0, [8, 8, 8]),  # at least 24
        ([(512, 512)] * 20, 0, [1.2] * 20),
        ([(512, 512)] * 30, 0, [1] * 30),
        ([(3000, 3000)], 0, [24]),
        ([(1254, 1254)] * 24 + [(1255, 1254)] * 24, 0, [0.9996] * 24 + [1.5004] * 24),  # just ordinary, and not
        ([(4096, 4096), (1024, 2048), (64, 64)], 0, [24 * 16 / 19, 24 * 2 / 19, 24 / 19]),
        ([(8192, 8192), (64, 64)], 0, [64, 1]),
        ([(512, 512)] * 3, 3, [1, 1, 1]),
        ([(64, 64)] * 10, 4, [0.4] * 10),  # fewer than there are images
        ([(4096, 4096), (1024, 1024)], 34, [32, 2]),
    ],
)
def test_crops_are_shared_by_area_and_no_image_is_left_out(shapes, num_crop, expected):
    sampler = sampler_of(shapes, 32, num_crop=num_crop)
    counts = np.array([np.bincount([w.index for w in drawn(sampler, e)], minlength=len(shapes)) for e in range(60)])
    assert (counts.sum(1) == round(sum(expected))).all() and len(sampler) == -(-round(sum(expected)) // 4)
    assert (abs(counts - expected) < 1).all()  # rounded up or down
    np.testing.assert_allclose(counts.mean(0), expected, atol=0.25)


def test_crops_of_one_image_are_numbered_and_lie_elsewhere():
    windows = drawn(sampler_of([(90, 90), (70, 90)], 32, margin=2))
    for index in (0, 1):
        own = [window for window in windows if window.index == index]
        assert sorted(window.crop for window in own) == list(range(12))
        assert len({(window.top, window.left) for window in own}) > 9
    assert windows != sorted(windows, key=lambda window: window.index)  # mixed


def annotated_at(*places, shape=(100, 120)):
    """Where a label is annotated: at these pixels alone."""
    label = np.full(shape, IGNORE, np.uint8)
    for place in places:
        label[place] = 1
    return AnnotatedBlocks.find(label)


@pytest.mark.parametrize("place", [(0, 0), (99, 119), (50, 3), (2, 60), (49, 60)])
@pytest.mark.parametrize(("crop", "margin"), [((32, 32), 9), ((33, 65), 0), ((20, 20), 30), ((200, 150), 30)])
def test_crops_hold_an_annotated_pixel_as_far_inside_as_there_is_room(place, crop, margin):
    sampler = sampler_of([(100, 120)], *crop, margin=margin, num_crop=300, annotated=[annotated_at(place)])
    corners = np.array([(w.top, w.left) for w in drawn(sampler)]) + margin
    for axis in (0, 1):
        size, side, pixel = (100, 120)[axis], crop[axis], place[axis]
        inside = min(margin, (side - 1) // 2)
        possible = range(max(size - side, 0) + 1)
        best = [low for low in possible if low + inside <= pixel < low + side - inside]
        best = best or [min(possible, key=lambda low: abs(low + side // 2 - pixel))]
        assert set(corners[:, axis]) <= set(best)
        assert len(set(corners[:, axis])) > 0.7 * len(best)  # all of them, given time


def test_crops_are_drawn_where_pixels_are_annotated():
    annotated = [annotated_at((20, 20), (90, 100), (90, 101), (90, 102)), annotated_at(), annotated_at((5, 5))]
    sampler = sampler_of([(100, 120)] * 3, 32, margin=3, annotated=annotated)
    windows = [window for epoch in range(40) for window in drawn(sampler, epoch)]
    assert len(windows) == 40 * 24 and sum(w.index == 0 for w in windows) == 40 * 12 == sum(
        w.index == 2 for w in windows
    )
    assert sum(w.index == 0 and w.top > 40 for w in windows) / (40 * 12) == pytest.approx(0.75, abs=0.05)
    assert sampler.batches(3) == sampler.batches(3) != sampler.batches(4)


def test_find_annotated_refuses_a_database_without_an_annotated_pixel(tmp_path):
    write_sample(tmp_path / "0.npy", np.zeros((20, 20, 1), np.uint8), np.full((20, 20), IGNORE, np.uint8))
    with pytest.raises(UserError, match="no pixel is annotated, all have the label 128"):
        find_annotated(list_samples(tmp_path), replace(INFO, ignore=128))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # more than there are cores
def test_num_workers_changes_no_patch(database):
    info = load_info(database)
    data = PatchDataset(list_samples(database / "train"), info, labelled=True, memory=None)
    sampler = sampler_of(data.shapes, 32, margin=4)
    runs = [[batch["input"] for batch in DataLoader(data, batch_sampler=sampler, num_workers=num)] for num in (0, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class Evil:
    def __reduce__(self):
        return (print, ("this code must not run",))


def _object_array(path):
    np.save(path, np.array([Evil()], dtype=object), allow_pickle=True)


def _pickle(path):
    path.write_bytes(pickle.dumps(Evil()))


def _archive(path):
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))


def _truncated(path):
    write_sample(path, np.zeros((8, 8, 1), np.uint8), np.zeros((8, 8), np.uint8))
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (_object_array, "Python objects"),
        (_pickle, "refused"),
        (_truncated, "refused"),
        (lambda path: path.write_bytes(b""), "refused"),
        (_archive, "refused"),
        (lambda path: np.save(path, np.zeros((2, 2, 1, 1))), "shape"),
        (lambda path: np.save(path, np.zeros((0, 2))), "shape"),
        (lambda path: np.save(path, np.zeros((2, 2), [("image", np.uint8)])), "field 'input'"),
        (lambda path: write_sample(path, np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8)), "3 channels"),
        (lambda path: write_sample(path, np.zeros((2, 2, 1), np.uint8), np.full((2, 2), 2, np.uint8)), "class index 2"),
        (lambda path: write_sample(path, np.full((2, 2, 1), np.nan, np.float32), np.zeros((2, 2), np.uint8)), "NaN"),
        (lambda path: write_sample(path, np.zeros((2, 2, 1), np.uint8), None), "no label"),
    ],
)
@pytest.mark.parametrize("memory", [CPU, None])
def test_patch_dataset_refuses_a_bad_sample_by_name(tmp_path, capfd, write, words, memory):
    write(tmp_path / "00000.npy")
    with pytest.raises(UserError, match=words) as error:
        PatchDataset([SampleFile(tmp_path / "00000.npy")], INFO, labelled=True, memory=memory)[0]
    assert "00000.npy" in str(error.value)
    assert "must not run" not in capfd.readouterr().out


@pytest.mark.parametrize("memory", [CPU, None])
def test_normalize_by_image_or_by_data(tmp_path, memory):
    image = np.random.default_rng(0).normal(100, 20, (24, 30, 1)).astype(np.float32)
    for number, scaled in enumerate((image, 2 * image + 30, np.full_like(image, 7))):
        write_sample(tmp_path / f"{number}.npy", scaled, np.zeros((24, 30), np.uint8))
    files = list_samples(tmp_path)
    own = PatchDataset(files, replace(INFO, normalize="image"), labelled=True, memory=memory)
    torch.testing.assert_close(own[0]["input"], own[1]["input"], atol=1e-4, rtol=0)
    assert own[0]["input"].mean().abs() < 1e-5 and own[2]["input"].eq(0).all()
    window = own[Window(1, 3, 4, 8, 8)]  # by the whole image's
    torch.testing.assert_close(
        window["input"] * window["std"] + window["mean"], torch.tensor(2 * image[3:11, 4:12, 0] + 30)[None]
    )
    by_data = PatchDataset(files, replace(INFO, mean=[30.0], std=[2.0]), labelled=True, memory=memory)
    torch.testing.assert_close(by_data[1]["input"][0], torch.tensor(image[..., 0]))


@pytest.mark.parametrize("dtype", ["int64", "float64", "uint32"])
def test_normalise_loses_no_precision_by_a_large_offset(tmp_path, dtype):
    small = np.random.default_rng(0).integers(0, 200, (24, 30, 1)).astype(dtype)
    for number, image in enumerate((small, small + np.array(2**30, dtype))):
        write_sample(tmp_path / f"{number}.npy", image, np.zeros((24, 30), np.uint8))
    files = list_samples(tmp_path)
    for info in (replace(INFO, normalize="image"), describe((file.open() for file in files[1:]), [0, 255])):
        given = PatchDataset(files, info, labelled=True)[1]["input"]
        np.testing.assert_allclose(given[0], ((small - small.mean()) / small.std())[..., 0], atol=1e-6)
    assert describe([(np.full((9, 9, 1), 1e9 + 0.1), None)], [0, 1]).std == [1.0]


@pytest.mark.parametrize(("image", "expected"), [(np.uint8(51), -0.6), (np.float32(0.8), 0.6), (np.uint16(3), 5.0)])
def test_legacy_statistics_scale_as_the_original_did(tmp_path, image, expected):
    # it divided images of 8 bits by 255, and subtracted 0.5 and divided by 0.5 all
    write_sample(tmp_path / "0.npy", np.full((4, 4, 1), image), None)
    info = DataInfo(1, [0, 1], ["a", "b"], [0.5, 0.5], [127.5], [127.5], [0, 255], "legacy")
    data = PatchDataset([SampleFile(tmp_path / "0.npy")], info, labelled=False)
    assert data[0]["input"].unique().tolist() == pytest.approx([expected])


def test_annotated_blocks_have_a_pixel_and_their_number():
    label = np.full((300, 50), IGNORE, np.uint8)
    label[17, 3] = 0  # alone in its block
    label[270:280, 45:50] = 1  # over two blocks of rows, beyond the first band
    blocks = AnnotatedBlocks.find(label)
    assert blocks.anchors.tolist() == [[17, 3], [270, 45], [270, 48], [272, 45], [272, 48]]
    assert blocks.ends.tolist() == [1, 1 + 6, 7 + 4, 11 + 24, 35 + 16]
    assert len(AnnotatedBlocks.find(np.full((40, 40), IGNORE, np.uint8))) == 0


def test_annotated_blocks_are_drawn_as_often_as_they_have_pixels():
    label = np.full((64, 64), IGNORE, np.uint8)
    label[:16, :16] = 0
    label[60, 10:26] = 0  # 6 pixels in one block and 10 in the next
    anchors = AnnotatedBlocks.find(label).draw(np.random.default_rng(0), 27200).tolist()
    counts = [anchors.count(anchor) for anchor in ([0, 0], [60, 10], [60, 16])]
    assert sum(counts) == 27200
    np.testing.assert_allclose(counts, [25600, 600, 1000], rtol=0.15)


def test_annotated_blocks_of_a_large_label_take_little_memory(tmp_path):
    sample = np.lib.format.open_memmap(
        tmp_path / "0.npy", "w+", [("input", np.uint8), ("label", np.uint8)], (9000, 9000)
    )
    tracemalloc.start()
    blocks = AnnotatedBlocks.find(sample["label"])  # all annotated
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(blocks) == 563**2 and blocks.ends[-1] == 9000**2
    assert kept < 6e6 and most < 30e6
