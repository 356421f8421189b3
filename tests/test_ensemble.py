"""Several networks as one: `--scope a,b` in test, predict and export."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

import display_result
import main
from checkpoint import Checkpoint
from description import DataInfo
from model import UNet, init_weights
from predict import load, predict_array
from utils import UserError

INFO = DataInfo(1, [0, 255], ["membrane", "cell"], [0.3, 0.7], [120.0], [50.0], [0.0, 255.0], "image")
DATA = replace(INFO, mean=[90.0], std=[70.0], normalize="data")
CPU = ["--gpu_ids", "-1"]
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
    state = {"net": net.state_dict(), "optim": {}, "arch": net.arguments, "epoch": epoch, "epoch_complete": True}
    path = Path("checkpoints", scope, "em", f"model_epoch{epoch:04d}.pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    Checkpoint(**state, info=info, threshold=threshold, config=config).save(path)
    return str(path)


@pytest.fixture
def three(work):
    """Checkpoints of three networks that have little in common."""
    return [write_network(scope, *network) for scope, network in THREE.items()]


@pytest.fixture
def two(database):
    """Two networks beside a database of theirs."""
    return [write_network("a", {"nch_ker": 2}, seed=0, lr=0.5), write_network("b", {"nch_ker": 3}, seed=1, lr=0.5)]


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
    found = predict_array(load(paths), pixels, tta=tta, tile=72)  # 80, since 72 is no multiple of 16
    np.testing.assert_allclose(found, mean_of(paths, pixels, tta=tta), atol=1e-5)


def test_tiles_of_an_ensemble_with_statistics_of_the_tile_are_blended(three):
    pixels, grid = image(250, 330), load(three).tile_grid((400, 2000), 64)
    assert grid.rows[0].interior.stop == 64 and grid.rows[0].output.stop == 96
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


def test_predict_writes_the_mean_at_the_mean_threshold(three, work, capsys):
    tifffile.imwrite("in.tif", image(80, 90))
    predict = ["--mode", "predict", *CPU, "--scope", "a,b,c", "--input", "in.tif", "--output", "out.npy"]
    assert main.main([*predict, "--what", "probability,mask", "--dtype", "float32", "--amp", "off"]) == 0
    expected = mean_of(three, image(80, 90))
    np.testing.assert_allclose(np.load("out-probability.npy"), expected, atol=1e-6)
    assert np.mean((np.load("out-mask.npy") == 255) == (expected > 0.5)) > 0.999
    assert all(path in capsys.readouterr().out for path in three[:1])


def test_more_classes_have_the_mean_of_each(work):
    info = replace(INFO, class_values=[0, 1, 2], class_names=["x", "y", "z"], class_share=[0.3, 0.3, 0.4])
    paths = [write_network(name, {"nch_ker": 2}, info) for name in "ab"]
    found = predict_array(load(paths), image(40, 50), tta=False)
    assert found.shape == (3, 40, 50)
    np.testing.assert_allclose(found, mean_of(paths, image(40, 50), tta=False), atol=1e-6)


def test_a_test_of_an_ensemble_names_its_networks_and_is_shown(two, work, capsys):
    write_network("b", {"nch_ker": 3}, threshold=0.8, epoch=7, seed=1, lr=0.5)
    assert main.main(["--mode", "test", *CPU, "--scope", "a,b"]) == 0
    assert "mean of networks of epochs 1, 7; classes" in capsys.readouterr().out
    folder = work / "results" / "a,b" / "em"
    scores = json.loads((folder / "metrics.json").read_text())
    assert scores["checkpoints"] == [two[0], "checkpoints/b/em/model_epoch0007.pth"]
    assert scores["epochs"] == [1, 7] and scores["thresholds"] == [0.5, 0.8] and "checkpoint" not in scores
    assert scores["segment_threshold"] == pytest.approx(0.65)
    sample = np.load(work / "datasets" / "em" / "test" / "00000.npy")
    expected = mean_of(scores["checkpoints"], sample["input"])
    assert scores["mean"]["pixel_error"] == pytest.approx(np.mean((expected > 0.5) != sample["label"]), abs=1e-3)
    page = (folder / "index.html").read_text()
    assert "<h1>a, b / em</h1>" in page
    assert '<th scope="row">--seed</th><td>0, 1</td>' in page and '<th scope="row">--lr</th><td>0.5</td>' in page
    assert 'href="../../../checkpoints/b/em/model_epoch0007.pth">b, epoch 7</a>' in page
    assert display_result.main(["--scope", "a,b"]) == 0 and (folder / "figure.png").is_file()


def run_script(path):
    graph = torch.jit.load(path)
    return lambda pixels: graph(torch.from_numpy(pixels)).detach().numpy()


def run_onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda pixels: session.run(None, {"image": pixels})[0]


@pytest.mark.filterwarnings("ignore")  # exporters warn of themselves
@pytest.mark.parametrize(
    ("kind", "target", "scopes", "run"),
    [
        ("torchscript", "net.pt", ["a", "b", "c"], run_script),
        pytest.param("onnx", "net.onnx", ["s", "t"], run_onnx, marks=pytest.mark.slow),  # of few levels, to be quicker
    ],
)
def test_an_export_of_an_ensemble_gives_what_predict_gives(three, work, kind, target, scopes, run):
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    for scope, info, num_level in (("s", INFO, 3), ("t", DATA, 1)):
        write_network(scope, {"nch_ker": 2, "num_level": num_level}, info)
    assert main.main(["--mode", "export", "--scope", ",".join(scopes), "--format", kind, "--output", target]) == 0
    graph, predictor = run(target), load([f"checkpoints/{scope}/em/model_epoch0001.pth" for scope in scopes])
    for size in ((1, 1), (40, 33), (97, 130)):
        found = graph(image(1, 1, *size).astype(np.float32))[0, 0]
        np.testing.assert_allclose(found, predict_array(predictor, image(*size), tta=False), atol=2e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_package_of_an_ensemble_gives_what_predict_gives_however_it_normalises(work, fails):
    core = pytest.importorskip("bioimageio.core")
    export = ["--mode", "export", "--format", "bioimageio", "--output", "net.zip", "--scope"]
    infos = {"a": INFO, "b": INFO, "c": DATA, "d": replace(DATA, mean=[100.0])}
    paths = {name: write_network(name, {"nch_ker": 2, "num_level": 2}, info) for name, info in infos.items()}
    pixels, halo = image(64, 64), 24
    for scopes, steps in (("a,b", 3), ("c,d", 1)):  # one step before the network, or each its own in the graph
        assert main.main([*export, scopes]) == 0
        with zipfile.ZipFile("net.zip") as package:
            description, readme = (package.read(name).decode() for name in ("rdf.yaml", "README.md"))
        assert description.count("id: ensure_dtype") + description.count("unit_variance") == steps
        assert "mean of the probabilities of 2 networks" in readme
        assert f"`{scopes[0]}/em/model_epoch0001.pth`, `{scopes[2]}/em/model_epoch0001.pth`" in readme
        result = core.predict(model="net.zip", inputs={"image": pixels[None, None]}).as_arrays()["probability"][0, 0]
        mirrored = np.pad(pixels, halo, "symmetric")
        expected = predict_array(load([paths[name] for name in scopes.split(",")]), mirrored, tta=False)
        np.testing.assert_allclose(result, expected[halo:-halo, halo:-halo], atol=2e-5)
    assert "trained with --normalize image, others with data" in fails(main.main, [*export, "a,c"])


def test_an_export_may_not_replace_any_of_its_checkpoints(three, work, fails):
    (work / "net.pt").symlink_to(three[1])
    export = ["--mode", "export", "--scope", "a,b,c", "--format", "torchscript", "--output", "net.pt"]
    assert "is the checkpoint itself" in fails(main.main, export)


@pytest.mark.parametrize("mode", ["test", "predict", "export"])
@pytest.mark.parametrize(
    ("scope", "words", "status"),
    [
        ("a,,b", "--scope '' is not a folder name", 2),
        (",", "--scope '' is not a folder name", 2),
        ("a,../b", "is not a folder name", 2),
        ("a,b,a", "--scope a,b,a: names a network twice", 2),
        ("a,none", "no checkpoint in checkpoints/none/em", 1),
    ],
)
def test_scopes_that_name_no_ensemble_are_refused(two, fails, mode, scope, words, status):
    Path("in.npy").write_bytes(b"")
    files = {"test": [], "predict": ["--input", "in.npy", "--output", "out.npy"], "export": ["--output", "out.onnx"]}
    assert words in fails(main.main, ["--mode", mode, *CPU, "--scope", scope, *files[mode]], status=status)


def test_a_training_of_several_scopes_is_refused(two, fails):
    assert "--scope a,b: --mode train trains one network" in fails(main.main, ["--scope", "a,b"], status=2)


OTHER = [
    ({"nch_in": 3, "mean": [0.0] * 3, "std": [1.0] * 3}, r"nch_in 1, checkpoints/z/.* with 3"),
    ({"class_values": [255, 0]}, r"class_values \[0, 255\], checkpoints/z/.* with \[255, 0\]"),
    ({"class_names": ["cell", "membrane"]}, r"class_names \['membrane', 'cell'\], checkpoints/z/.* with \['cell'"),
]


@pytest.mark.parametrize(("other", "words"), OTHER)
def test_networks_of_other_channels_or_classes_are_refused_in_one_line_that_names_both(three, other, words):
    paths = [three[0], write_network("z", {"nch_ker": 2}, replace(INFO, **other))]
    with pytest.raises(UserError, match=f"^{paths[0]} was trained with {words}.*: the networks of an ensemble"):
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
