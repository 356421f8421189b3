"""Several networks as one: the mean of their probabilities."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import Checkpoint
from dataset import DataInfo
from model import UNet, init_weights
from predict import load, predict_array
from utils import UserError

INFO = DataInfo(1, [0, 255], ["membrane", "cell"], [0.3, 0.7], [120.0], [50.0], [0.0, 255.0], "image")
DATA = replace(INFO, mean=[90.0], std=[70.0], normalize="data")
THREE = {  # scope -> architecture, data, threshold: what the networks of an ensemble may differ in
    "a": ({"nch_ker": 2}, INFO, 0.3),
    "b": ({"nch_ker": 3, "norm": "inorm", "num_level": 2}, DATA, 0.4),
    "c": ({"nch_ker": 2, "norm": "none", "pool": "max", "num_level": 3}, replace(DATA, mean=[100.0]), 0.8),
}


def write_network(scope, arch, info=INFO, threshold=0.5, epoch=1, **config):
    """Checkpoint of random weights, of which half the pixels are cell."""
    net = UNet(info.nch_in, 1 if info.num_class == 2 else info.num_class, **arch)
    init_weights(net, "kaiming", seed=sum(map(ord, scope)))
    noise = torch.randn(4, info.nch_in, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(20):
            net(noise)  # moves the statistics of batch normalisation
        logits = net.eval()(noise)
        net.fc.weight.div_(logits.std())
        net.fc.bias.copy_(-logits.mean((0, 2, 3)) / logits.std())
    state = {"net": net.state_dict(), "optim": {}, "arch": net.arguments, "epoch": epoch, "whole": True}
    path = Path("checkpoints", scope, "em", f"model_epoch{epoch:04d}.pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    Checkpoint(**state, info=info, threshold=threshold, config=config).save(path)
    return str(path)


@pytest.fixture
def three(work):
    """Checkpoints of three networks that have little in common."""
    return [write_network(scope, *network) for scope, network in THREE.items()]


def image(*shape):
    return np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)


def mean_of(paths, pixels, **options):
    return np.mean([predict_array(load(path), pixels, **options) for path in paths], axis=0)


@pytest.mark.parametrize("tta", [False, True])
def test_an_ensemble_is_the_mean_of_what_its_members_say(three, tta):
    pixels = image(2, 70, 90)
    found = predict_array(load(three), pixels, tta=tta)
    np.testing.assert_allclose(found, mean_of(three, pixels, tta=tta), atol=1e-6)
    assert np.abs(found - predict_array(load(three[0]), pixels, tta=tta)).max() > 0.1  # they do not agree


@pytest.mark.parametrize("tta", [False, True])
def test_tiles_of_networks_of_other_depths_give_what_the_whole_image_gives(three, tta):
    pixels, shallow = image(250, 330), write_network("s", {"nch_ker": 2, "num_level": 1}, DATA)
    paths = [shallow, three[0], three[2]]  # one level, four, three; b takes statistics of its tile
    found = predict_array(load(paths), pixels, tta=tta, tile=64)
    np.testing.assert_allclose(found, mean_of(paths, pixels, tta=tta), atol=1e-5)


def test_tiles_of_an_ensemble_with_statistics_of_the_tile_are_blended(three):
    pixels, grid = image(250, 330), load(three).tile_grid((400, 2000), 64)
    assert grid.rows[0].core.stop == 64 and grid.rows[0].output.stop == 96
    assert len(grid.rows) > 2 and all(tile.input.start % 16 == 0 for tile in (*grid.rows, *grid.columns))
    found, without = (predict_array(load(paths), pixels, tta=False, tile=64) for paths in (three, three[::2]))
    blended = 3 * found - 2 * without  # of b alone
    whole = predict_array(load(three[1]), pixels, tta=False)
    assert np.abs(blended - whole).max() < 0.5 and np.corrcoef(blended.ravel(), whole.ravel())[0, 1] > 0.9


def test_the_threshold_is_the_mean_of_the_members_and_one_member_has_its_own(three):
    assert load(three).threshold == pytest.approx(0.5)
    assert load(three[:1]).threshold == load(three[0]).threshold == 0.3


def test_large_images_have_tiles_that_the_largest_member_has_memory_for(work):
    small, large = (write_network(name, {"nch_ker": ker}) for name, ker in (("s", 1), ("l", 8)))
    grids = [load(paths).tile_grid((100_000, 100_000), 0) for paths in (large, [small, large], [large, small])]
    assert grids[0] == grids[1] == grids[2]


def test_the_statistics_of_an_image_are_measured_once(work, monkeypatch):
    import dataset

    paths, calls = [write_network(name, {"nch_ker": 2}) for name in "ab"], []
    measure = dataset.STATISTICS["image"]
    monkeypatch.setitem(dataset.STATISTICS, "image", lambda pixels: calls.append(1) or measure(pixels))
    predict_array(load(paths), image(40, 40), tta=False)
    assert len(calls) == 1


def test_more_classes_have_the_mean_of_each(work):
    info = replace(INFO, class_values=[0, 1, 2], class_names=["x", "y", "z"], class_share=[0.3, 0.3, 0.4])
    paths = [write_network(name, {"nch_ker": 2}, info) for name in "ab"]
    found = predict_array(load(paths), image(40, 50), tta=False)
    assert found.shape == (3, 40, 50)
    np.testing.assert_allclose(found, mean_of(paths, image(40, 50), tta=False), atol=1e-6)


OTHER = [
    ({"nch_in": 3, "mean": [0.0] * 3, "std": [1.0] * 3}, r"nch_in 1, checkpoints/z/.* with 3"),
    ({"class_values": [255, 0]}, r"class_values \[0, 255\], checkpoints/z/.* with \[255, 0\]"),
    ({"class_names": ["cell", "membrane"]}, r"class_names \['membrane', 'cell'\], checkpoints/z/.* with \['cell'"),
]


@pytest.mark.parametrize(("other", "words"), OTHER)
def test_networks_of_other_channels_or_classes_are_refused_in_one_line_that_names_both(three, other, words):
    paths = [three[0], write_network("z", {"nch_ker": 2}, replace(INFO, **other))]
    with pytest.raises(UserError, match=f"^{paths[0]} was trained with {words}.*: an ensemble needs"):
        load(paths)


def test_sections_with_context_and_colours_make_no_ensemble(work):
    three = {"nch_in": 3, "mean": [0.0] * 3, "std": [1.0] * 3}
    paths = [write_network("rgb", {"nch_ker": 2}, replace(INFO, **three))]
    paths.append(write_network("sections", {"nch_ker": 2}, replace(INFO, **three, context=1)))
    with pytest.raises(UserError, match=r"context 0, .* with 1"):
        load(paths)


def test_networks_of_another_background_need_one_that_is_chosen(work):
    paths = [write_network(name, {"nch_ker": 2}, background=name) for name in ("membrane", "cell")]
    with pytest.raises(UserError, match="choose one by --background"):
        load(paths)
    assert load(paths, background="cell").background == 1


def test_no_checkpoint_and_a_missing_one_are_refused(three):
    with pytest.raises(UserError, match="no checkpoint named"):
        load([])
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        load([three[0], "none.pth"])
