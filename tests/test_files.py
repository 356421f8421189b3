import errno
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
from conftest import ROOT, SMALL, Killed, kill_before
from forks import as_nobody, note_operations
from torture.powercut import cuts, recorded, tree_of, write_tree

import locks
import main
import run_make_database
from evaluation.tables import RESULTS
from exchange import atomic_folder, finish_exchange, reading
from files import atomic_write, check_writable, move_aside, swap_folders
from locks import locked
from samples import ENTRIES, list_samples
from utils import UserError

if sys.platform != "win32":
    import fcntl

ADVICE = "choose another folder"
ABC = dict.fromkeys("abc", "file")


@pytest.fixture
def shared(database, work):
    """A database in folders that every account may search and write."""
    parents = {parent: parent.stat().st_mode for parent in work.parents if parent.stat().st_mode & 1 == 0}
    for parent in parents:
        parent.chmod(0o711)
    for folder in (work, *(path for path in work.rglob("*") if path.is_dir())):
        folder.chmod(0o777)
    yield database
    for parent, mode in parents.items():
        parent.chmod(mode)


needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs two accounts")
OVERWRITE = ["--overwrite", "--synthetic", "4", "--size", "32"]


def test_atomic_write_leaves_a_complete_file_or_none(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path, "w") as file:
        file.write("old")
    with pytest.raises(KeyError), atomic_write(path, "w") as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_atomic_write_names_a_folder_that_takes_no_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/a\.txt"), atomic_write(tmp_path / "file" / "a.txt"):
        pass
    with pytest.raises(UserError, match="cannot write"), atomic_folder(tmp_path / "file" / "b", {"a": ""}, ADVICE):
        pass


def test_atomic_folder_exchanges_all_entries_or_none(tmp_path):
    def fill(text, fail=False):
        with atomic_folder(tmp_path, {"images": r"[a-z]+", "index": ""}, ADVICE) as partial:
            (partial / "images").mkdir()
            (partial / "images" / text).touch()
            if fail:
                raise KeyboardInterrupt
            (partial / "index").write_text(text)

    (tmp_path / "mine").touch()
    fill("one")
    fill("two")
    with pytest.raises(KeyboardInterrupt):
        fill("three", fail=True)
    assert (tmp_path / "index").read_text() == "two"
    assert [file.name for file in (tmp_path / "images").iterdir()] == ["two"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images", "index", "mine"]


@pytest.mark.parametrize("point", range(40))
def test_exchange_cut_off_anywhere_leaves_the_old_or_is_completed_by_a_reader(tmp_path, monkeypatch, point):
    """A kill before each single rename and removal: `b` goes away, `c` is new, `a` is replaced."""
    write(tmp_path, {"a": "old", "b": "old"})
    with monkeypatch.context() as patch:
        kill_before(patch, ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"), point)
        with suppress(Killed), atomic_folder(tmp_path, ABC, ADVICE) as partial:
            write(partial, {"a": "new", "c": "new"})
    finish_exchange(tmp_path, ABC)
    found = {file.parent.name: file.read_text() for file in tmp_path.glob("[abc]/file")}
    assert found in ({"a": "old", "b": "old"}, {"a": "new", "c": "new"})
    assert not (tmp_path / ".new").exists()


def write(folder, texts):
    for name, text in texts.items():
        (folder / name).mkdir()
        (folder / name / "file").write_text(text)


def failing(monkeypatch, numbers, error=errno.EBUSY, folder=".new"):
    """Let some renames from or to a folder fail, by their number from 0."""
    rename, count = os.rename, iter(range(99))

    def run(source, target, **options):
        if folder in f"{source} {target}" and next(count) in numbers:
            raise error if isinstance(error, BaseException) else OSError(error, os.strerror(error), str(source))
        return rename(source, target, **options)

    monkeypatch.setattr(os, "rename", run)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("number", "error"), [(number, errno.EBUSY) for number in range(7)] + [(4, errno.EPERM), (4, errno.EROFS)]
)
def test_exchange_that_fails_is_undone_and_nothing_happens_later(database, fails, monkeypatch, number, error):
    """Four old entries move away, three new ones take their place, one rename says that it is done."""
    (database / "train" / "notes.txt").write_text("mine")
    before = contents(database)
    with monkeypatch.context() as patch:
        failing(patch, [number], error)
        line = fails(run_make_database.main, ["--overwrite", "--synthetic", "4", "--num_val", "0", "--num_test", "2"])
    assert f"cannot write {Path('datasets/em')}: {os.strerror(error)}" in line
    assert contents(database) == before
    assert len(list_samples(database / "train")) == 6
    assert contents(database) == before


def test_exchange_for_which_the_disk_has_no_room_is_undone(tmp_path, monkeypatch):
    write(tmp_path, {"a": "old"})
    mkdir = os.mkdir

    def full(path, *arguments, **options):
        if ".replaced" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return mkdir(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        message = f"cannot write {tmp_path}: No space left"
        with pytest.raises(UserError, match=message), atomic_folder(tmp_path, ABC, ADVICE) as partial:
            write(partial, {"a": "new"})
    finish_exchange(tmp_path, ABC)
    assert contents(tmp_path) == {"a/file": b"old"}


@pytest.mark.parametrize("number", range(9))
def test_exchange_that_is_interrupted_is_undone(tmp_path, monkeypatch, number):
    for name in "abc":
        (tmp_path / name).mkdir()
    for name in ("a/file", "a/mine", "b/file", "b/mine"):
        (tmp_path / name).write_text("old")
    before = contents(tmp_path)
    failing(monkeypatch, [number], KeyboardInterrupt())
    with suppress(KeyboardInterrupt), atomic_folder(tmp_path, ABC, ADVICE) as partial:
        write(partial, {"a": "new"})
    after = {"a/file": b"new", "a/mine": b"old", "b/mine": b"old"}
    assert contents(tmp_path) == (before if number < 7 else after)
    finish_exchange(tmp_path, ABC)
    assert contents(tmp_path) == (before if number < 7 else after)


def test_exchange_that_cannot_be_undone_says_what_the_next_command_does(database, fails, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        failing(patch, range(3, 99))
        line = fails(run_make_database.main, ["--overwrite", "--synthetic", "4", "--size", "32"])
    assert "could it be undone" in line and "the next command that uses this folder, whoever runs it, completes" in line
    assert len(list_samples(database / "train")) == 2
    assert f"begun by process {os.getpid()} on" in capfd.readouterr().out
    assert [path.name for path in database.glob(".*")] == []


@needs_root
def test_exchange_that_was_cut_off_is_completed_by_an_account_that_may(shared, work, start, monkeypatch):
    with monkeypatch.context() as patch, suppress(UserError):
        failing(patch, range(3, 99))
        run_make_database.main(OVERWRITE)
    shared.chmod(0o755)
    _, err = (process := start(partial(as_nobody, main.main), "--gpu_ids", "-1")).communicate()
    assert process.returncode == 1 and err.count("\n") == 1 and "this account can't complete it: any program" in err
    assert len(list_samples(shared / "train")) == 2


PREDICT = ["--mode", "predict", "--gpu_ids", "-1", "--tta", "off", "--input", "datasets/em/train-volume.tif"]
OUTPUTS = ["--output", "p.zarr", "--what", "probability,table"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    ("program", "argv", "path"),
    [
        (run_make_database.main, OVERWRITE, "datasets/em"),
        (run_make_database.main, ["--name_data", "new", *OVERWRITE], "datasets/new"),
        (main.main, [*SMALL, "--num_epoch", "2", "--train_continue", "on"], "checkpoints/unet/em"),
        (main.main, ["--mode", "test", "--gpu_ids", "-1", "--tta", "off"], "results/unet/em"),
        (main.main, [*PREDICT, "--output", "out/p.tif"], "out/p.tif"),
        (main.main, [*PREDICT, *OUTPUTS], "p-probability.zarr"),
        (main.main, [*PREDICT, *OUTPUTS], "p-table.csv"),
    ],
)
def test_power_cut_at_any_moment_leaves_the_old_or_the_new(trained, work, start, program, argv, path):
    (work / "run").mkdir()
    for name in ("datasets", "checkpoints", "log"):
        (work / name).rename(work / "run" / name)
    before = tree_of(work / "run")
    process = start(partial(note_operations, program), *argv)
    process.communicate()
    assert process.returncode == 0
    found = cuts(before, recorded(work / "operations"), Random(0))
    old, new = (visible(tree, path) for tree in (before, tree_of(work / "run")))
    assert len(found) > 3 and old != new
    for number, cut in enumerate(found):
        write_tree(work / str(number), cut.tree)
        for parent in (work / str(number) / "datasets").glob("*"):
            finish_exchange(parent, ENTRIES)
        finish_exchange(work / str(number) / "results/unet/em", RESULTS)
        now = visible(tree_of(work / str(number)), path)
        whole = now in (old, new) or (path.startswith("checkpoints") and now.items() <= (old | new).items())
        assert now == new if cut.last else whole, f"cut {cut.operation}"
        shutil.rmtree(work / str(number))


def visible(tree, path):
    """Files of a tree that readers see below a path."""
    return {
        name: content
        for name, content in tree.items()
        if content is not None and f"{name}/".startswith(f"{path}/") and not re.search(r"/\.|\.partial|\.old", name)
    }


@needs_root
def test_exchange_that_another_account_may_not_do_is_undone(shared, work, start):
    before = contents(shared)
    shared.chmod(0o1777)
    _, err = (process := start(partial(as_nobody, run_make_database.main), *OVERWRITE)).communicate()
    assert process.returncode == 1 and err.count("\n") == 1 and "Operation not permitted" in err
    assert len(list_samples(shared / "train")) == 6
    assert contents(shared) == before


def test_exchange_keeps_files_of_the_user_in_replaced_folders(trained, work, capsys):
    test = ["--mode", "test", "--gpu_ids", "-1", "--tta", "off"]
    assert main.main(test) == 0
    results = work / "results" / "unet" / "em" / "images"
    for folder in (results, trained / "train", trained / "val"):
        (folder / "mine").mkdir()
        (folder / "mine" / "0000-input.png").write_text("mine")
        (folder / "notes.txt").write_text("mine")
        (folder / ".DS_Store").write_text("")
    (results / "0099-output.png").write_text("of an earlier test")
    capsys.readouterr()
    assert main.main(test) == 0
    assert (
        f"note: {Path('results/unet/em')}: kept what this program did not write: images/mine, images/notes.txt\n"
        in (capsys.readouterr().out)
    )
    assert run_make_database.main(["--overwrite", "--synthetic", "3", "--size", "32", "--num_val", "0"]) == 0
    own = {
        f"{folder}/{name}" for folder in ("train", "val") for name in (".DS_Store", "mine/0000-input.png", "notes.txt")
    }
    names = {path.as_posix() for path in map(Path, contents(trained))}
    assert {name for name in names if not name.endswith((".npy", ".tif", ".json", ".html"))} == own
    assert not (trained / "val" / "00000.npy").exists() and len(list_samples(trained / "train")) == 2
    assert not (results / "0099-output.png").exists() and (results / "mine" / "0000-input.png").exists()


def test_exchange_names_a_file_of_the_user_that_would_be_a_sample(database, fails):
    (database / "train" / "mine.npy").write_bytes(b"mine")
    before = contents(database)
    line = fails(run_make_database.main, ["--overwrite", "--synthetic", "3", "--size", "32"])
    assert f"{Path('datasets/em/train/mine.npy')}: not a sample of this program's" in line and "move it" in line
    assert contents(database) == before


def test_exchange_replaces_a_pair_layout_by_a_new_database(work):
    (work / "datasets" / "em" / "train").mkdir(parents=True)
    for name in ("input_000.npy", "label_000.npy", "input_000.distance.npy"):
        np.save(work / "datasets" / "em" / "train" / name, np.zeros((4, 4)))
    assert run_make_database.main(["--overwrite", "--synthetic", "3", "--size", "32", "--num_val", "0"]) == 0
    assert {path.name[:5] for path in (work / "datasets" / "em" / "train").iterdir()} == {"00000", "00001"}


def test_exchange_of_other_entries_takes_nothing_away_from_its_reader(tmp_path, monkeypatch):
    write(tmp_path, {"train": "old", "stack": "old"})

    with (
        monkeypatch.context() as patch,
        suppress(Killed),
        atomic_folder(tmp_path, {"stack": "file"}, ADVICE) as partial,
    ):
        write(partial, {"stack": "new"})
        kill_before(patch, ("rename",), 1)
    assert (tmp_path / ".new").is_dir()
    finish_exchange(tmp_path, {"train": "file", "val": "file"})
    assert {file.parent.name: file.read_text() for file in tmp_path.glob("*/file")} == {"train": "old", "stack": "new"}


@pytest.mark.parametrize("note", ["", "3", "{}", '{"names": ["../mine"], "provided": []}'])
def test_exchange_with_a_damaged_note_is_one_line_and_removes_nothing(tmp_path, note):
    write(tmp_path, {"mine": "mine", "here": "old"})
    (tmp_path / "here" / ".new").mkdir()
    (tmp_path / "here" / ".new" / ".provided").write_text(note)
    with pytest.raises(UserError, match=r"\.provided is damaged"):
        finish_exchange(tmp_path / "here", {"file": ""})
    assert (tmp_path / "mine" / "file").read_text() == "mine" and (tmp_path / "here" / "file").read_text() == "old"


def test_reading_sees_no_exchange_that_is_cut_off_while_it_takes_its_lock(tmp_path, monkeypatch):
    write(tmp_path, {"a": "old"})
    open_file = os.open

    def writer_comes_and_is_killed(path, *arguments, **options):
        if Path(path).name == ".lock" and not (tmp_path / "done").exists():
            (tmp_path / "done").touch()
            write(tmp_path, {".new": "x"})
            write(tmp_path / ".new", {"a": "new"})
            (tmp_path / ".new" / ".provided").write_text('{"names": ["a"], "provided": ["a"]}')
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(os, "open", writer_comes_and_is_killed)
    with reading(tmp_path, {"a": "file"}, ADVICE):
        assert (tmp_path / "a" / "file").read_text() == "new"


@pytest.mark.parametrize("name", [".new", ".partial"])
def test_atomic_folder_follows_no_links_that_somebody_planted(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_text("mine")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / name).symlink_to(tmp_path / "mine")
    with suppress(UserError), atomic_folder(tmp_path / "here", {"a": ""}, ADVICE) as partial:
        (partial / "a").write_text("new")
    assert [(file.name, file.read_text()) for file in (tmp_path / "mine").iterdir()] == [("a", "mine")]


def test_atomic_write_replaces_a_link_and_sweeps_what_killed_processes_left(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a").symlink_to(tmp_path / "mine")
    (tmp_path / ".a.1234.partial").write_text("half")
    with atomic_write(tmp_path / "a", "w") as first:
        first.write("first")
        with atomic_write(tmp_path / "a", "w") as second:  # does not take the first for a dead one's
            second.write("second")
    assert (tmp_path / "a").read_text() == "first"
    assert (tmp_path / "mine").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "mine"]


def test_atomic_write_by_many_processes_at_once_and_of_a_long_name(tmp_path):
    code = "import sys, files\nfor n in range(300):\n with files.atomic_write(sys.argv[1]) as f: f.write(b'x' * 9)"
    target = tmp_path / ("n" * 255)
    processes = [subprocess.Popen([sys.executable, "-c", code, target], cwd=ROOT, stderr=-1) for _ in range(3)]
    assert [process.communicate()[1] for process in processes] == [b""] * 3
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(target.name, b"x" * 9)]


def test_check_writable_leaves_a_file_of_the_user(tmp_path):
    (tmp_path / ".writable").write_text("mine")
    check_writable(tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(".writable", "mine")]


HOLD = """
import pathlib, sys, locks
with locks.locked(pathlib.Path(sys.argv[1]), "", shared=sys.argv[2] == "r"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_lock_has_one_writer_or_many_readers_and_ends_with_its_process(tmp_path):
    def held(how):
        process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path, how], cwd=ROOT, stdin=-1, stdout=-1)
        assert process.stdout.readline() == b"held\n"
        return process

    with held("w") as writer:
        for shared in (False, True):
            with (
                pytest.raises(UserError, match=rf"in use \(process {writer.pid} on .*rest"),
                locked(tmp_path, "rest", shared=shared),
            ):
                pass
        writer.kill()
    with held("r") as reader:
        with locked(tmp_path, "", shared=True):
            pass
        with pytest.raises(UserError, match="another process reads it"), locked(tmp_path, ""):
            pass
        reader.kill()
    (tmp_path / "link").symlink_to(tmp_path)
    with locked(tmp_path, ""), locked(tmp_path / "link", ""):
        pass
    with held("r") as reader, locked(tmp_path, "", shared=True):
        with pytest.raises(UserError, match="another process reads it"), locked(tmp_path, ""):
            pass
        reader.kill()
        reader.wait()
        with locked(tmp_path, ""):
            code = "import locks, sys, pathlib\nwith locks.locked(pathlib.Path(sys.argv[1]), '', shared=True): pass"
            other = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
            assert f"process {os.getpid()} on" in other.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["link"]


@needs_root
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o600])
@pytest.mark.parametrize("sticky", [0, 0o1000])
def test_lock_of_another_accounts_dead_process_is_replaced(shared, work, start, mode, sticky):
    (shared / ".lock").write_text("process 1 on nowhere: python main.py")
    (shared / ".lock").chmod(mode)
    for entry in shared.rglob("*"):
        os.chown(entry, 65534, 65534)
    os.chown(shared / ".lock", 0, 0)
    shared.chmod(0o777 | sticky)
    process = start(partial(as_nobody, run_make_database.main), *OVERWRITE)
    _, err = process.communicate()
    if mode == 0o644:
        assert (process.returncode, err) == (0, "")
        assert np.load(shared / "train" / "00000.npy").shape == (32, 32)
    else:  # nobody can tell whether it is held
        assert process.returncode == 1 and err.count("\n") == 1
        assert f"{shared}/.lock: a lock of another account".removeprefix(f"{work}/") in err


@needs_root
def test_lock_of_another_accounts_living_process_is_named(shared, work, start):
    with locked(shared, ""):
        process = start(partial(as_nobody, run_make_database.main), *OVERWRITE)
        _, err = process.communicate()
        assert process.returncode == 1 and f"is in use (process {os.getpid()} on" in err
        assert (shared / ".lock").stat().st_mode & 0o777 == 0o666  # who may write in the folder may lock it


@needs_root
def test_sweep_removes_a_partial_file_of_another_accounts_dead_process(shared, work, start):
    (work / ".net.pt.1234.partial").touch(0o644)
    process = start(partial(as_nobody, write_net), "net.pt")
    assert process.communicate() == ("", "") and process.returncode == 0
    assert not list(work.glob(".*.partial")) and (work / "net.pt").exists()


def write_net(argv):
    with atomic_write(argv[0]):
        return 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EACCES])
def test_lock_warns_once_of_a_file_system_without_locks_and_partial_files_go_by_age(work, monkeypatch, capfd, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "_without_locks", set())
    monkeypatch.setattr(fcntl, "flock", flock)
    for name, age in (("old", 2 * 86400), ("young", 60)):
        (work / f".p.csv.{name}.partial").touch()
        os.utime(work / f".p.csv.{name}.partial", (time.time() - age,) * 2)
    assert run_make_database.main(["--synthetic", "4", "--size", "32"]) == 0
    with locked(work, ""), atomic_write(work / "p.csv"):
        pass
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "warning: " in err and "the file system has no locks" in err
    assert [path.name for path in work.glob(".*")] == [".p.csv.young.partial"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_lock_that_another_machine_holds_by_smb_is_in_use(work, monkeypatch):
    """SMB's answer is that of a missing permission, which a new file does not get."""
    flock = fcntl.flock

    def refuse(descriptor, operation):
        if (work / ".lock").exists() and os.fstat(descriptor).st_ino == (work / ".lock").stat().st_ino:
            raise OSError(errno.EACCES, "Permission denied")
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match="is in use"), locked(work, ""):
        pass


def test_lock_works_on_a_full_disk_that_takes_no_note_of_the_process(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with locked(tmp_path, ADVICE):
            pass
    assert list(tmp_path.iterdir()) == []


def test_move_aside_makes_numbered_folders(tmp_path):
    assert move_aside(tmp_path, []) is None
    for number in (1, 2):
        (tmp_path / "a.pth").write_text(str(number))
        assert move_aside(tmp_path, [tmp_path / "a.pth"]) == tmp_path / f"earlier-{number}"
    assert (tmp_path / "earlier-2" / "a.pth").read_text() == "2"


def test_lock_leaves_no_empty_folder_that_it_made(tmp_path):
    with locked(tmp_path / "new" / "deep", ADVICE):
        assert (tmp_path / "new" / "deep").is_dir()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="cannot write"), locked(tmp_path / "loop" / "a", ADVICE):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2")
def test_swap_folders_exchanges_two_folders_in_one_step(tmp_path):
    write(tmp_path, {"a": "one", "b": "two"})
    assert swap_folders(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name / "file").read_text() for name in "ab"] == ["two", "one"]
    assert not swap_folders(tmp_path / "a", tmp_path / "none")
