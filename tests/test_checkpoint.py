import os
import pickle
import resource
import tracemalloc
import zipfile
from dataclasses import asdict, replace

import pytest
import torch

import checkpoint
from checkpoint import Checkpoint
from description import DataInfo
from model import UNet
from utils import UserError

NET = UNet(1, 1, 2)
INFO = DataInfo(1, [0, 255], ["a", "b"], [0.5, 0.5], [0.0], [1.0], [0.0, 255.0])
STATE = {"net": NET.state_dict(), "optim": {}, "arch": NET.arguments, "data": asdict(INFO), "config": {}}
STATE |= {"epoch": 1, "whole": True, "losses": [0.5]}
SAVED = Checkpoint(NET.state_dict(), {}, NET.arguments, INFO, {}, epoch=1, epoch_complete=True, losses=[0.5])
FIRST = "encoders.0.0.conv.weight"


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("code_ran",))


def test_load_gives_back_what_save_wrote(tmp_path):
    path = checkpoint.path_of(tmp_path / "new" / "folder", 7)
    SAVED.save(path)
    loaded = Checkpoint.load(path)
    assert all(loaded.net[name].equal(weights) for name, weights in STATE["net"].items())
    assert [file.name for file in path.parent.iterdir()] == ["model_epoch0007.pth"]


@pytest.mark.parametrize("num_level", [3, 4])
def test_load_gives_back_all_fields_and_network_the_averaged_weights(tmp_path, num_level):
    net, average = UNet(1, 1, 2, num_level=num_level), UNet(1, 1, 2, num_level=num_level)
    states = {"net": net.state_dict(), "optim": {}, "average": {"net": average.state_dict(), "num_step": 3}}
    saved = Checkpoint(**states, arch=net.arguments, info=INFO, config={"seed": 1}, epoch=2, epoch_complete=True)
    saved.save(tmp_path / "a.pth")
    loaded = Checkpoint.load(tmp_path / "a.pth")
    assert (loaded.info, loaded.config, loaded.epoch, loaded.epoch_complete) == (INFO, {"seed": 1}, 2, True)
    assert loaded.network(tmp_path / "a.pth").state_dict()[FIRST].equal(average.state_dict()[FIRST])


def test_load_refuses_a_flipped_bit_in_the_weights(tmp_path):
    SAVED.save(tmp_path / "a.pth")
    damaged = bytearray((tmp_path / "a.pth").read_bytes())
    damaged[damaged.index(STATE["net"][FIRST].numpy().tobytes())] ^= 1
    (tmp_path / "a.pth").write_bytes(damaged)
    assert not torch.load(tmp_path / "a.pth", weights_only=True)["net"][FIRST].equal(STATE["net"][FIRST])
    with pytest.raises(UserError, match="damaged"):
        Checkpoint.load(tmp_path / "a.pth")


def test_find_goes_by_number_with_any_count_of_digits(tmp_path):
    for name in (
        "model_epoch0009.pth",
        "model_epoch00010.pth",
        "model_epoch8.pth",
        ".model_epoch0011.pth.partial",
        "x.pth",
    ):
        (tmp_path / name).touch()
    assert checkpoint.find(tmp_path).name == "model_epoch00010.pth"
    assert checkpoint.find(tmp_path, 8).name == "model_epoch8.pth"
    with pytest.raises(UserError, match="8, 9, 10"):
        checkpoint.find(tmp_path, 7)


def test_find_best_goes_by_its_word_and_is_no_epoch(tmp_path):
    with pytest.raises(UserError, match=r"no model_best\.pth"):
        checkpoint.find(tmp_path, "best")
    for name in ("model_epoch0009.pth", "model_best.pth"):
        (tmp_path / name).touch()
    assert checkpoint.find(tmp_path, "best").name == "model_best.pth"
    assert checkpoint.find(tmp_path).name == "model_epoch0009.pth" and list(checkpoint.list_epochs(tmp_path)) == [9]


def test_load_of_an_older_checkpoint_has_no_best_epoch(tmp_path):
    torch.save(STATE, tmp_path / "a.pth")
    loaded = Checkpoint.load(tmp_path / "a.pth")
    assert (loaded.best_epoch, loaded.best_score) == (0, None)


def test_find_without_a_checkpoint_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="run --mode train first"):
        checkpoint.find(tmp_path / "none")


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9, 0.99])
def test_load_refuses_a_truncated_checkpoint(tmp_path, fraction):
    path = tmp_path / "model_epoch0001.pth"
    SAVED.save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(UserError, match="model_epoch0001"):
        Checkpoint.load(path)


@pytest.mark.parametrize("save", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_load_refuses_a_checkpoint_that_would_run_code(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save(STATE | {"net": Evil()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="could run code"):
        Checkpoint.load(tmp_path / "a.pth")
    assert not (tmp_path / "code_ran").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(3)])
def test_load_refuses_a_checkpoint_of_another_program(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match="another program"):
        Checkpoint.load(tmp_path / "a.pth")


def test_load_refuses_a_newer_format(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    SAVED.save(tmp_path / "a.pth")
    monkeypatch.undo()
    with pytest.raises(UserError, match="newer version"):
        Checkpoint.load(tmp_path / "a.pth")


@pytest.mark.parametrize("size", [10, 1000, 20_000])
def test_save_that_fails_leaves_the_old_checkpoint_and_no_part(tmp_path, size):
    path = tmp_path / "model_epoch0001.pth"
    SAVED.save(path)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # as a disk that fills up
    try:
        with pytest.raises(UserError, match="cannot write"):
            SAVED.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_save_makes_no_second_copy_in_memory(tmp_path):
    large = replace(SAVED, optim={"state": {0: torch.zeros(10_000_000)}})  # 40 MB
    SAVED.save(tmp_path / "a.pth")
    tracemalloc.start()
    large.save(tmp_path / "a.pth")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5_000_000 < 40_000_000 < (tmp_path / "a.pth").stat().st_size


WRONG = [{"format": "x"}, {"arch": [1]}, {"arch": NET.arguments | {"depth": 3}}, {"epoch": "one"}, {"losses": 0.5}]
WRONG += [{"data": asdict(INFO) | {"class_values": [0, 1, 2]}}, {"data": 5}, {"threshold": "high"}, {"optim": None}]
WRONG += [{"best_epoch": -1}, {"best_score": "low"}, {"best_score": float("nan")}]
WRONG += [
    {"average": {"net": 1}},
    {"config": {1: 2}},
    {"config": {"lr": torch.ones(2)}},
    {"losses": [float("nan")]},
    {"net": {FIRST: 1.0}},
]
WRONG += [{"arch": NET.arguments | {"nch_ker": 3000}}, {"arch": NET.arguments | {"nch_ker": 10**19}}]
WRONG += [{"arch": NET.arguments | {"norm": "lnorm"}}, {"net": STATE["net"] | {FIRST: torch.zeros(1, 1, 3, 3)}}]
WRONG += [{"net": STATE["net"] | {FIRST: torch.zeros(1).expand(10**6, 10**6)}}, {"plan": {"seed": torch.zeros(2)}}]


@pytest.mark.parametrize("values", WRONG, ids=lambda values: next(iter(values)))
def test_load_refuses_a_wrong_entry(tmp_path, values):
    SAVED.save(tmp_path / "a.pth")
    torch.save(STATE | values, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth"):
        Checkpoint.load(tmp_path / "a.pth")


def test_load_ignores_an_unknown_entry_of_the_description(tmp_path):
    torch.save(STATE | {"data": asdict(INFO) | {"later": 1}}, tmp_path / "a.pth")
    assert Checkpoint.load(tmp_path / "a.pth").info == INFO


def test_load_refuses_a_packed_checkpoint_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.pth"):
        Checkpoint.load(tmp_path / "a.pth")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_load_and_find_do_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "model_epoch0099.pth")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        Checkpoint.load(tmp_path / "model_epoch0099.pth")


def test_load_gives_a_checkpoint_of_an_older_version_the_batch_settings_of_its_flags(tmp_path):
    torch.save(STATE | {"config": {"batch_size": 4, "seed": 3}}, tmp_path / "a.pth")
    assert Checkpoint.load(tmp_path / "a.pth").batch_settings == {"batch_size": 4, "seed": 3}
