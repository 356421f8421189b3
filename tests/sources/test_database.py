import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import SMALL, write_stacks

import main as program
from dataset import ENTRIES
from run_make_database import main

fcntl = pytest.importorskip("fcntl")


class Killed(BaseException):
    pass


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def number_of(folder, split):
    return len([*(folder / split).glob("[0-9]????.npy")])


@pytest.fixture
def em(work):
    """datasets/em of three sections to train on."""
    folder = write_stacks(work / "datasets" / "em")
    assert main([]) == 0
    return folder


@pytest.fixture
def cut_off(em, monkeypatch):
    """The same while two sections to train on replace them: killed when `train` is in place and `val` is not."""
    rename = Path.rename

    def kill_before_val(path, goal):
        if path.parent.name == ".new" and path.name == "val":
            raise Killed
        return rename(path, goal)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", kill_before_val)
        main(["--overwrite", "--num_val", "2"])
    assert (em / ".new" / "val").is_dir() and number_of(em, "train") == 2 and not (em / "val").exists()
    return em


@contextmanager
def held(folder, how):
    """The folder's lock, as another process holds it."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, how)
        yield


def test_a_training_completes_an_exchange_that_was_cut_off(cut_off):
    assert program.main([*SMALL, "--num_epoch", "1"]) == 0
    assert [number_of(cut_off, split) for split in ("train", "val", "test")] == [2, 2, 1]
    named = json.loads((cut_off / "dataset.json").read_text())["samples"]
    assert [len(named[split]) for split in ("train", "val", "test")] == [2, 2, 1]
    assert not (cut_off / ".new").exists()


def test_a_program_that_makes_the_database_completes_it_before_it_refuses(cut_off, fails):
    assert "holds a database: add --overwrite" in fails(main, [])
    assert number_of(cut_off, "val") == 2 and not (cut_off / ".new").exists()


@pytest.mark.parametrize("how", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_an_exchange_that_goes_on_is_neither_read_nor_changed(cut_off, fails, how):
    with held(cut_off, how):
        before = snapshot(cut_off)
        assert "datasets/em is in use" in fails(program.main, SMALL)
        assert snapshot(cut_off) == before


@pytest.mark.parametrize("how", [fcntl.LOCK_SH, fcntl.LOCK_EX])
@pytest.mark.parametrize("argv", [["--overwrite"], ["--overwrite", "--synthetic", "4", "--size", "32"]])
def test_a_database_that_another_process_reads_or_writes_is_not_replaced(em, fails, how, argv):
    with held(em, how):
        before = snapshot(em)
        line = fails(main, argv)
        assert "datasets/em is in use" in line and "choose another --name_data" in line
        assert snapshot(em) == before
    assert main(argv) == 0


def test_a_database_that_is_read_is_shared_and_one_that_is_written_is_not_read(em, fails):
    with held(em, fcntl.LOCK_EX):
        assert "datasets/em is in use" in fails(program.main, SMALL)
    with held(em, fcntl.LOCK_SH):
        assert program.main([*SMALL, "--num_epoch", "1"]) == 0


def test_an_interrupt_while_the_imports_run_is_one_line(work, fails, monkeypatch):
    class Interrupted:
        def find_spec(self, name, *_):
            if name == "sources.database":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "sources.database", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert fails(main, ["--synthetic", "3"], status=130) == "interrupted: nothing was left half written"
    assert os.listdir(work) == []  # noqa: PTH208


def test_help_needs_no_torch(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "sources")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it fails
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "--synthetic" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["--synthetic", "2"], 1, "2 image(s), 1 for validation, 1 for the test: none is left to train on"),
        (["--synthetic", "4", "--phantom", "nuclei", "--num_val", "4"], 1, "none is left to train on"),
        (["--synthetic", "-1"], 2, "--synthetic -1: must lie in [0, 10000]"),
        (["--synthetic", "10001"], 2, "--synthetic 10001: must lie in [0, 10000]"),
        (["--synthetic", "10000", "--size", "512"], 2, "--synthetic 10000 --size 512: over"),
        (["--synthetic", "3", "--size", "31"], 2, "--size 31: must lie in [32, 16384]"),
        (["--synthetic", "3", "--size", "16385"], 2, "--size 16385: must lie in"),
        (["--synthetic", "3", "--seed", "-1"], 2, "--seed -1: must lie in"),
        (["--synthetic", "3", "--seed", str(2**63)], 2, "must lie in"),
        (["--synthetic", "3", "--num_val", "-2"], 2, "--num_val -2: must be at least -1"),
    ],
)
def test_what_cannot_be_drawn_or_split_is_one_line_and_leaves_nothing_behind(work, fails, argv, status, words):
    assert words in fails(main, [*argv[:2], "--size", "32", *argv[2:]], status)
    assert list(work.iterdir()) == []


def test_a_failing_split_leaves_the_stacks_that_were_drawn_before(work, fails):
    flags = ["--synthetic", "--size", "32", "--name_data", "d"]
    assert main([flags[0], "4", *flags[1:]]) == 0
    before = snapshot(work)
    assert "none is left" in fails(main, [flags[0], "2", *flags[1:], "--overwrite"])
    assert snapshot(work) == before
    assert {*ENTRIES} < {path.name for path in (work / "datasets" / "d").iterdir()}


def test_an_empty_test_split_says_what_to_do(em, fails):
    assert main(["--overwrite", "--num_test", "0"]) == 0
    assert program.main([*SMALL, "--num_epoch", "1"]) == 0
    line = fails(program.main, ["--mode", "test", *SMALL])
    assert "datasets/em/test: this split of the database is empty: choose another --split" in line
    assert "--num_test 1 or more" in line
