import os
import pickle
import resource

import pytest
import torch

import checkpoint
from utils import UserError

STATE = dict.fromkeys(checkpoint.OURS, 0) | {"net": {"w": torch.arange(1000.0)}}


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("code_ran",))


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = checkpoint.path_of(tmp_path / "new" / "folder", 7)
    checkpoint.save(path, STATE)
    loaded = checkpoint.load(path)
    assert loaded["net"]["w"].equal(STATE["net"]["w"])
    assert [file.name for file in path.parent.iterdir()] == ["model_epoch0007.pth"]


def test_a_checkpoint_with_a_flipped_bit_in_its_weights_is_refused(tmp_path):
    checkpoint.save(tmp_path / "a.pth", STATE)
    damaged = bytearray((tmp_path / "a.pth").read_bytes())
    damaged[damaged.index(torch.tensor(500.0).numpy().tobytes())] ^= 1
    (tmp_path / "a.pth").write_bytes(damaged)
    assert not torch.load(tmp_path / "a.pth", weights_only=True)["net"]["w"].equal(STATE["net"]["w"])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(tmp_path / "a.pth")


def test_the_newest_is_found_by_number_with_any_count_of_digits(tmp_path):
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


def test_no_checkpoint_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="run --mode train first"):
        checkpoint.find(tmp_path / "none")


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path, fraction):
    path = tmp_path / "model_epoch0001.pth"
    checkpoint.save(path, STATE)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(UserError, match="model_epoch0001"):
        checkpoint.load(path)


@pytest.mark.parametrize("save", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save(STATE | {"net": Evil()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="could run code"):
        checkpoint.load(tmp_path / "a.pth")
    assert not (tmp_path / "code_ran").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(3)])
def test_a_foreign_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match="another program"):
        checkpoint.load(tmp_path / "a.pth")


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    checkpoint.save(tmp_path / "a.pth", STATE)
    monkeypatch.undo()
    with pytest.raises(UserError, match="newer version"):
        checkpoint.load(tmp_path / "a.pth")


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_part(tmp_path):
    path = tmp_path / "model_epoch0001.pth"
    checkpoint.save(path, STATE)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a disk that fills up
    try:
        with pytest.raises(UserError, match="cannot write"):
            checkpoint.save(path, STATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
