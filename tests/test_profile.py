"""What a training assumes of its images is kept, and compared with those that come later, through the command line."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import tifffile
from conftest import SMALL

import main
from images.profile import Profile, channels_by_name, compare, profile_of
from images.readers import list_frames, read_palette
from run_make_database import main as make_database

RNG = np.random.default_rng(0)
MADE = ["--input", "raw", "--label", "labels", "--overwrite"]
TRAIN = ["--mode", "train", *SMALL, "--batch_size", "2", "--num_epoch", "1", "--num_workers", "0"]
PREDICT = ["--mode", "predict", "--gpu_ids", "-1", "--tta", "off", "--input", "new.ome.tif", "--output", "out.npy"]
CHECKPOINT = "checkpoints/unet/em/model_epoch0001.pth"


def write(path, pixels, names=("DAPI", "GFP"), size=0.5):
    """Image (C, H, W) that names its channels and the size of a pixel."""
    metadata = {"axes": "CYX", "Channel": {"Name": list(names)}} if names else {"axes": "CYX"}
    metadata |= {"PhysicalSizeX": size, "PhysicalSizeY": size} if size else {}
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata=metadata)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a database of two channels, and a network that was trained on it for an epoch."""
    folder = tmp_path_factory.mktemp("profile")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("raw", "labels"):
            (folder / name).mkdir()
        for number in range(6):
            write(f"raw/{number}.ome.tif", RNG.integers(20, 200, (2, 48, 48), np.uint8))
            tifffile.imwrite(f"labels/{number}.tif", RNG.integers(0, 2, (48, 48), np.uint8) * 255)
        assert make_database(MADE) == 0
        assert main.main([*TRAIN, "--normalize", "data"]) == 0
    return folder


@pytest.fixture
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in ("out.npy", "new.ome.tif"):
        (folder / name).unlink(missing_ok=True)
    return folder


def test_profile_is_kept_by_the_database(there):
    kept = json.loads((there / "datasets/em/dataset.json").read_text())["profile"]
    assert (kept["dtypes"], kept["channels"], kept["pixel_size"]) == (["uint8"], ["DAPI", "GFP"], [0.5, 0.5])
    assert 20 <= kept["low"][0] < 25 and 195 < kept["high"][1] <= 200 and not kept["is_grey"]


def test_channels_are_taken_by_name_in_predict(there, capsys):
    pixels = RNG.integers(20, 200, (2, 48, 48), np.uint8)
    write("new.ome.tif", pixels)
    assert main.main(PREDICT) == 0
    out = capsys.readouterr().out
    expected = np.load("out.npy")
    assert "channels" not in out
    write("new.ome.tif", np.stack([pixels[1], 0 * pixels[0], pixels[0]]), ("GFP", "RFP", "DAPI"))
    assert main.main(PREDICT) == 0
    note = "new.ome.tif: channels are taken by name, as in the training: DAPI is channel 2, GFP is channel 0"
    assert np.array_equal(np.load("out.npy"), expected) and note in capsys.readouterr().out
    assert main.main([*PREDICT, "--channel", "GFP,DAPI"]) == 0  # overrides the names
    assert not np.array_equal(np.load("out.npy"), expected)
    write("new.ome.tif", pixels[::-1].copy(), ())  # unknown names: as they come
    assert main.main(PREDICT) == 0
    assert not np.array_equal(np.load("out.npy"), expected)


def test_channels_that_are_missing_are_refused(there, fails):
    write("new.ome.tif", RNG.integers(20, 200, (2, 48, 48), np.uint8), ("DAPI", "Cy5"))
    line = fails(main.main, PREDICT)
    assert "new.ome.tif: channels DAPI, Cy5, in the training DAPI, GFP: no GFP: name the channels" in line
    assert not (there / "out.npy").exists()


GREYS = {  # how the same picture is saved otherwise, and what is said
    "16 bits": (lambda pixels: pixels.astype(np.uint16) * 257, "error: new.ome.tif, page 1: grey values 5"),
    "0 to 1": (lambda pixels: (pixels / 255).astype(np.float32), "error: new.ome.tif, page 1: grey values 0."),
    "dark": (lambda pixels: pixels // 20, "error: new.ome.tif, page 1: grey values 1 to"),
    "bright": (lambda pixels: 180 + pixels // 4, ""),
}


@pytest.mark.parametrize("name", GREYS)
def test_grey_values_of_another_scale_are_refused(there, capsys, name):
    change, words = GREYS[name]
    write("new.ome.tif", change(RNG.integers(20, 200, (2, 48, 48), np.uint8)))
    assert main.main(PREDICT) == bool(words)
    assert words in capsys.readouterr().err
    assert (there / "out.npy").exists() != bool(words)


def test_pixel_size_that_differs_is_one_line_for_all_files(there, capsys):
    (there / "many").mkdir(exist_ok=True)
    for number in range(5):
        write(f"many/{number}.ome.tif", RNG.integers(20, 200, (2, 32, 32), np.uint8), size=0.25)
    many = [*PREDICT[:-4], "--input", "many", "--output", "outs"]
    assert main.main(many) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    size = "a pixel has 0.25 µm, in the training 0.5 µm: objects are 2 times as large [px] as in the training"
    assert len(lines) == 1 and f"0.ome.tif, page 1 and 4 more image(s): {size}" in lines[0]


def test_database_with_channels_in_another_order_is_refused_for_a_trained_network(there, fails):
    order = ["--name_data", "other", "--channel", "GFP,DAPI"]
    assert make_database([*MADE, *order]) == 0
    (there / "checkpoints/unet/other").mkdir(parents=True, exist_ok=True)
    (there / "checkpoints/unet/other/model_epoch0001.pth").write_bytes((there / CHECKPOINT).read_bytes())
    for argv in ([*TRAIN, "--num_epoch", "2"], ["--mode", "test", "--gpu_ids", "-1"]):
        line = fails(main.main, [*argv, "--name_data", "other"])
        assert "the network was trained on DAPI,GFP: make the database with --channel DAPI,GFP" in line


BASE = Profile(["uint8"], [50.0], [10.0], [90.0], [], [])


def test_compare_names_a_mean_that_is_far_off():
    far = replace(BASE, mean=[89.0], low=[70.0], high=[99.0])
    assert compare(BASE, BASE, [10.0], "a", by_data=True) == [] == compare(BASE, far, [10.0], "a", by_data=False)
    (line,) = compare(BASE, far, [10.0], "a", by_data=True)
    assert line.startswith("a: grey values 70 to 99 (uint8), in the training 10 to 90 (uint8)")


def test_compare_names_grey_that_is_saved_as_colour():
    colour = Profile(["uint8"], [50.0] * 3, [10.0] * 3, [90.0] * 3, [], [])
    (line,) = compare(colour, replace(colour, is_grey=True), [10.0] * 3, "a", by_data=False)
    assert line == "a: grey, saved as colour; in the training the images are coloured"


@pytest.mark.parametrize("largest", [255, 65535])
def test_profile_knows_grey_values_that_are_indices_of_colours(tmp_path, largest):
    indices, table = np.arange(64, dtype=np.uint8).reshape(8, 8), np.zeros((3, 256), np.uint16)
    table[1, :64] = np.arange(64) * (largest // 63)  # from black to green, as a camera's look-up table
    tifffile.imwrite(tmp_path / "a.tif", indices, photometric="palette", colormap=table)
    tifffile.imwrite(tmp_path / "b.tif", indices)
    coloured, plain = (profile_of(list_frames(tmp_path / name)) for name in ("a.tif", "b.tif"))
    assert (coloured.is_indexed, plain.is_indexed) == (True, False)
    (line,) = compare(plain, coloured, [10.0], "a", by_data=False)
    assert "images that have a palette of colours, whose indices are read; in the training they have none" in line
    older = {name: value for name, value in asdict(plain).items() if name != "is_indexed"}
    assert Profile.from_dict(older, 1) == plain
    assert read_palette(list_frames(tmp_path / "a.tif")[0])[1].max() == 252 + (largest > 255) * 3


def test_profile_of_an_image_with_infinity_is_of_the_other_pixels(tmp_path):
    pixels = np.arange(64, dtype=np.float32).reshape(8, 8)
    pixels[0, :3] = np.inf, -np.inf, np.nan
    np.save(tmp_path / "a.npy", pixels)
    assert 3 <= profile_of(list_frames(tmp_path / "a.npy")).low[0] < 4
    np.save(tmp_path / "b.npy", np.full((8, 8), np.inf))
    assert profile_of(list_frames(tmp_path / "b.npy")).high == [0.0]


def test_profile_of_some_files_has_the_median_pixel_size_and_no_names_that_differ(tmp_path):
    for number, (names, size) in enumerate([("ab", 1.0), ("ab", 0.5), ("ba", 0.6), ("", 0)]):
        write(tmp_path / f"{number}.ome.tif", RNG.integers(0, 9, (2, 8, 8), np.uint8), names, size)
    profile = profile_of(list_frames(tmp_path))
    assert (profile.channels, profile.pixel_size, profile.dtypes) == ([], [0.6, 0.6], ["uint8"])
    assert channels_by_name(["a", "b"], ["b", "a"], "") == (1, 0)
