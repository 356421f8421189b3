import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL

from description import DataInfo, Origin, describe, load_info, sample_origins
from main import main
from samples import IGNORE, SampleFile, list_samples, write_sample
from utils import UserError

INFO = DataInfo(1, [0, 255], ["a", "b"], [0.5, 0.5], [0.0], [1.0], [0.0, 255.0])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, ">u2"])
def test_write_sample_preserves_types_and_values_and_is_read_by_windows(tmp_path, dtype):
    image = np.arange(24).reshape(4, 3, 2).astype(dtype)
    write_sample(tmp_path / "0.npy", image, np.ones((4, 3), np.uint8))
    mapped = np.load(tmp_path / "0.npy", mmap_mode="r")
    assert mapped["input"][1:3, 0:2].tolist() == image[1:3, 0:2].tolist()
    assert mapped["input"].dtype == np.dtype(dtype).newbyteorder("=")
    assert mapped["label"].dtype == np.uint8


def test_list_samples_orders_by_number(tmp_path):
    for name in ("10.npy", "9.npy", "00002.npy"):
        write_sample(tmp_path / name, np.zeros((2, 2, 1), np.uint8), None)
    assert [file.input.name for file in list_samples(tmp_path)] == ["00002.npy", "9.npy", "10.npy"]


def test_describe_is_worked_out_by_hand():
    samples = [
        (np.uint8([[[0], [2]]]), np.uint8([[0, 1]])),
        (np.uint8([[[4], [6]]]), np.uint8([[1, 1]])),
    ]
    info = describe(iter(samples), [0, 255])
    assert (info.mean, info.std, info.class_share) == ([3.0], [pytest.approx(5**0.5)], [0.25, 0.75])
    assert info.class_mean == [0.0, 4.0]
    unlabelled = describe(iter([(np.uint16([[[7]]]), None)]), [0, 1])
    assert unlabelled.std == [1.0] and unlabelled.class_mean is None


def test_describe_takes_class_means_of_the_first_channel_of_the_section():
    image = np.arange(12.0).reshape(1, 2, 6)  # two channels, of the section before, of itself and of the one after
    info = describe([(image, np.uint8([[0, 1]]))], [0, 255], context=1)
    assert info.class_mean == [2.0, 8.0] and info.own_channels == slice(2, 4) and info.context == 1
    assert describe([(image, np.uint8([[0, 0]]))], [0, 255], context=1).class_mean is None


def test_describe_leaves_ignored_pixels_out_of_the_class_shares():
    samples = [(np.uint8([[[0], [2], [4], [6]]]), np.uint8([[0, 1, 1, IGNORE]])), (np.uint8([[[3]]]), np.uint8([[1]]))]
    info = describe(iter(samples), [0, 255])
    assert info.class_share == [0.25, 0.75]
    assert info.mean == [3.0]  # of all pixels, as the network sees them
    assert info.class_mean == [0.0, 3.0]


def test_list_samples_refuses_an_input_without_label_among_pairs(tmp_path):
    for name in ("input_0", "label_0", "input_1"):
        np.save(tmp_path / f"{name}.npy", np.zeros((2, 2), np.uint8))
    with pytest.raises(UserError, match=r"input_1\.npy"):
        list_samples(tmp_path)


@pytest.mark.parametrize("place", [10, 20, 60, 100])
def test_map_npy_refuses_a_damaged_header(tmp_path, place):
    write_sample(tmp_path / "00000.npy", np.zeros((32, 32, 1), np.uint8), np.zeros((32, 32), np.uint8))
    damaged = bytearray((tmp_path / "00000.npy").read_bytes())
    damaged[place] = ord("(")
    (tmp_path / "00000.npy").write_bytes(damaged)
    with pytest.raises(UserError, match=r"00000\.npy: refused as a sample"):
        list_samples(tmp_path)[0].open()


def test_load_info_refuses_a_damaged_description(tmp_path):
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        load_info(tmp_path)
    for content in ([], 3, {"nch_in": 1}):
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="class_values"):
            load_info(tmp_path)


@pytest.fixture
def described(work):
    """datasets/em of one sample a split, and what rewrites some entries of its description."""
    for split in ("train", "val", "test"):
        (work / "datasets" / "em" / split).mkdir(parents=True)
        write_sample(work / f"datasets/em/{split}/0.npy", np.zeros((32, 32, 1), np.uint8), np.eye(32, dtype=np.uint8))

    def describe_anew(**entries):
        (work / "datasets" / "em" / "dataset.json").write_text(json.dumps(asdict(INFO) | entries))

    describe_anew()
    return describe_anew


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ("nch_in", ["x", 0, True, 1.0, None, 10**30]),
        ("class_values", [3, {}, [[1, 2], 0], [None, 1], [*range(300)], [0, 0], [1, 1.0], [[0, 0, 9], [0, 0, 9]]]),
        ("class_names", [5, ["a"], ["a", 5], ["a", "a"], ["a", "b\x1b[31m"], ["a", "b\nc"]]),
        ("class_share", [[0.3], [0.3, "x"], [0.3, 1.5], [float("nan"), 1]]),
        ("mean", ["x", [1, 2], [float("nan")], [float("inf")], [[1]], [10**400]]),
        ("std", [None, [0], [-1]]),
        ("value_range", [[0], [9, 1], {}]),
        ("normalize", ["foo", ["data"], {}]),
        ("context", [1.5, 1, -1, "0"]),
        ("class_mean", [3, [1.0], [1, None], [float("nan"), 0]]),
        ("ignore", [[1, 2], {}, True, float("nan"), INFO.class_values[1]]),
    ],
)
def test_load_info_names_an_entry_that_breaks_its_rule_in_one_line(described, fails, entry, values):
    for value in values:
        described(**{entry: value})
        line = fails(main, [*SMALL, "--num_epoch", "1"])
        assert line.startswith(f"error: datasets/em/dataset.json: {entry} is ") and "\x1b" not in line
        assert len(line) < 250 and line.endswith("make the database again")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe{", b"[" * 100_000, b'{"nch_in": ' + b"9" * 5000 + b"}"])
def test_load_info_refuses_what_is_no_json_in_one_line(described, fails, content):
    Path("datasets/em/dataset.json").write_bytes(content)
    line = fails(main, [*SMALL, "--num_epoch", "1"])
    assert "dataset.json: not valid JSON" in line and "make the database again" in line and len(line) < 250


@pytest.mark.parametrize("name", ["train", "val", "dataset.json"])
@pytest.mark.parametrize(
    "kind", ["other", pytest.param("pipe", marks=pytest.mark.skipif(os.name == "nt", reason="needs mkfifo"))]
)
def test_load_info_refuses_an_entry_of_another_type_in_one_line(described, fails, name, kind):
    entry = Path("datasets/em") / name
    entry.rename("moved")
    if kind == "pipe":
        os.mkfifo(entry)
    elif name == "dataset.json":
        entry.mkdir()
    else:
        entry.touch()
    assert f"{entry}: not a {'file' if name == 'dataset.json' else 'folder'}: move it" in fails(main, SMALL)


def test_load_info_needs_a_description_but_of_pytorch_unets_pairs(described, fails):
    folder = Path("datasets/em")
    (folder / "dataset.json").unlink()
    assert "datasets/em: samples without their dataset.json: make the database again" in fails(main, SMALL)
    for path in folder.glob("*/0.npy"):
        image, label = SampleFile(path).open()
        np.save(path.with_name("input_000.npy"), image)
        np.save(path.with_name("label_000.npy"), label * 255)
        path.unlink()
    info = load_info(folder)
    assert (info.class_values, info.class_share[1]) == ([0, 255], 1 / 32)
    assert main([*SMALL, "--num_epoch", "1"]) == 0


LABELS = {  # how a label of pytorch-UNET's layout may be saved -> the values of its classes
    "bool": (lambda label: label > 0, [0, 1]),
    "float": (lambda label: label.astype(np.float32), [0, 1]),
    "half": (lambda label: label / 2, [0, 0.5]),
    "int64": (lambda label: label.astype(np.int64), [0, 1]),
    "0 and 255": (lambda label: label.astype(np.uint8) * 255, [0, 255]),
    "big-endian": (lambda label: label.astype(">u2"), [0, 1]),
    "one channel": (lambda label: label[..., None] > 0, [0, 1]),
}


def write_pairs(folder, save, num=(3, 1, 1), size=32):
    """A database in pytorch-UNET's layout: squares, their labels saved in some way."""
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val", "test"), num, strict=True):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            label = np.zeros((size, size), np.uint8)
            label[4:20, 4:10] = label[4:20, 12 + number :] = 1
            image = label * 100 + rng.integers(0, 50, label.shape, np.uint8)
            np.save(folder / split / f"input_{number:03d}.npy", image)
            np.save(folder / split / f"label_{number:03d}.npy", save(label))


@pytest.mark.parametrize("kind", LABELS)
def test_pair_labels_may_be_of_any_type(kind, tmp_path):
    save, values = LABELS[kind]
    write_pairs(tmp_path, save)
    info = load_info(tmp_path)
    assert (info.class_values, info.class_share[1]) == (values, pytest.approx((16 * 6 * 3 + 16 * 57) / 3 / 32**2))
    label = list_samples(tmp_path / "test")[0].open(info.class_values)[1]
    assert label.dtype == np.uint8 and label[4:20, 4:10].all() and label.sum() == 16 * (6 + 20)


def test_pair_labels_of_bool_are_trained_tested_and_resumed(work):
    write_pairs(work / "datasets" / "em", LABELS["bool"][0])
    assert main([*SMALL, "--num_epoch", "1"]) == 0
    assert main([*SMALL, "--num_epoch", "2", "--train_continue", "on"]) == 0
    assert main(["--mode", "test", "--gpu_ids", "-1", "--tta", "off"]) == 0
    assert json.loads(Path("results/unet/em/metrics.json").read_text())["epoch"] == 2


def test_data_info_reads_bool_class_values_as_whole_numbers():
    values = asdict(INFO) | {"class_values": [False, True]}
    assert DataInfo.from_dict(values, Path("model.pth")).class_values == [0, 1]


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("label_001", np.full((32, 32), np.nan), "label_001.npy: the label holds float64 with NaN"),
        ("label_001", np.full((32, 32), "a"), "label_001.npy: the label holds <U1"),
        ("label_001", np.full((32, 32), 1j), "label_001.npy: the label holds complex128"),
        ("input_001", np.full((32, 32), np.nan), "input_001.npy: the input holds NaN or infinity"),
        ("input_001", np.full((32, 32), 1e200), "input_001.npy: the input holds numbers beyond 1e150"),
        ("input_001", np.full((32, 32), 1e100), "datasets/em/train: mean is [3.3"),
    ],
)
def test_pair_that_can_not_be_trained_on_is_named_before_the_training(name, array, words, work, fails):
    write_pairs(work / "datasets" / "em", lambda label: label)
    np.save(f"datasets/em/train/{name}.npy", array)
    assert words in fails(main, [*SMALL, "--num_epoch", "1"])
    assert not Path("checkpoints").exists()


def test_list_samples_of_an_empty_split_advises_what_to_do(described, fails):
    for split in ("train", "val", "test"):
        Path(f"datasets/em/{split}/0.npy").unlink()
    assert "it has no labels to train on" in fails(main, SMALL)
    for split in ("val", "test"):
        with pytest.raises(UserError, match=f"choose another --split, .*--num_{split} 1 or more"):
            list_samples(Path("datasets/em") / split)


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        (np.arange(256), np.uint8, [0, 255]),  # as of an electron microscope
        (np.arange(90), np.uint8, [0, 89]),  # 8 bits that are hardly used
        (np.r_[np.tile(np.arange(300, 400), 99), 65535], np.uint16, [300, 399]),  # one hot pixel of fluorescence
        (np.full(50, 7), np.uint16, [7, 7]),
    ],
)
def test_pictures_show_8_bits_as_they_are_others_without_rare_values(values, dtype, expected):
    info = describe([(values.astype(dtype)[None, :, None], None)], [0, 1])
    assert info.value_range == pytest.approx(expected, abs=0.5)


# --- origins of the samples


def describe_samples(folder, **splits):
    (folder / "dataset.json").write_text(json.dumps({"samples": splits}))


def test_origin_of_a_sample_names_file_page_and_region(tmp_path):
    test = [
        {"file": "00000.npy", "source": "stack.tif", "frame": 2},
        {"file": "00001.npy", "source": "one\x1b.png", "frame": 0, "rows": [0, 9], "pixel_size": [0.5, 0.25]},
    ]
    describe_samples(tmp_path, train=[{"file": "00000.npy", "source": "stack.tif", "frame": 0}], test=test)
    assert sample_origins(tmp_path, "train") == {"00000.npy": Origin("stack.tif, page 1")}
    found = sample_origins(tmp_path, "test")
    assert found["00000.npy"] == Origin("stack.tif, page 3")
    assert found["00001.npy"] == Origin(r"one\x1b.png, rows 0 to 9", (0.5, 0.25))


def test_origin_of_a_sample_names_series_and_section_in_it(tmp_path):
    series = [("A/1", 0, 0), ("A/1", 1, 1), ("B/2", 2, 0)]
    test = [
        {"file": f"{k}.npy", "source": "plate.zarr", "frame": frame, "series": name, "frame_of_series": index}
        for k, (name, frame, index) in enumerate(series)
    ]
    earlier = {"file": "e.npy", "source": "old.lif", "frame": 7, "series": "a"}
    data_set = {"file": "h.npy", "source": "1/em.h5", "frame": 0, "series": "/raw", "frame_of_series": 0}
    describe_samples(tmp_path, test=[*test, earlier, data_set])
    names = [origin.name for origin in sample_origins(tmp_path, "test").values()]
    assert names[:4] == ["plate.zarr, A/1, page 1", "plate.zarr, A/1, page 2", "plate.zarr, B/2", "old.lif, a"]
    assert names[4:] == ["1/em.h5:/raw"]


@pytest.mark.parametrize(
    "samples", [None, [], {"test": 5}, {"test": [5, {}, {"file": "a", "source": 3, "frame": "x"}]}]
)
def test_origin_may_be_absent(tmp_path, samples):
    (tmp_path / "dataset.json").write_text(json.dumps({} if samples is None else {"samples": samples}))
    assert sample_origins(tmp_path, "test") == {}
    assert sample_origins(tmp_path, "val") == {}
