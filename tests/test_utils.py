import os
import signal

import pytest

from utils import StopRequest, UserError, atomic_folder, atomic_write, move_aside, pick_device, program


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path, "w") as file:
        file.write("old")
    with pytest.raises(KeyError), atomic_write(path, "w") as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_takes_no_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/a\.txt"), atomic_write(tmp_path / "file" / "a.txt"):
        pass
    with pytest.raises(UserError, match="cannot write"), atomic_folder(tmp_path / "file" / "b", ["a"]):
        pass


def test_a_folders_entries_are_exchanged_together_or_stay(tmp_path):
    def fill(text, fail=False):
        with atomic_folder(tmp_path, ["images", "index"]) as partial:
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


def test_an_exchange_that_was_killed_midway_is_undone_by_the_next(tmp_path):
    (tmp_path / ".old").mkdir()
    (tmp_path / ".old" / "a").write_text("old")  # set aside, and the new one not yet there
    with pytest.raises(KeyError), atomic_folder(tmp_path, ["a"]):
        raise KeyError
    assert (tmp_path / "a").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_files_of_an_earlier_run_move_into_numbered_folders(tmp_path):
    assert move_aside(tmp_path, []) is None
    for number in (1, 2):
        (tmp_path / "a.pth").write_text(str(number))
        assert move_aside(tmp_path, [tmp_path / "a.pth"]) == tmp_path / f"earlier-{number}"
    assert (tmp_path / "earlier-2" / "a.pth").read_text() == "2"


def test_a_signal_is_noted_and_a_second_interrupt_raises():
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop and stop.signum == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def _raiser(error):
    def main(_argv):
        raise error

    return program(main)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("no such stack"), 1),
        (KeyboardInterrupt(), 130),
        (PermissionError(13, "Permission denied", "some/file"), 1),
        (OSError(28, "No space left on device"), 1),
        (MemoryError(), 1),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1),
    ],
)
def test_what_the_user_can_mend_is_one_line(error, status, fails):
    assert fails(_raiser(error), [], status)


def test_a_defect_of_ours_keeps_its_traceback():
    for error in (RuntimeError("shapes differ"), KeyError("x"), OSError("no number")):
        with pytest.raises(type(error)):
            _raiser(error)([])


def test_a_gpu_that_is_not_there_warns_and_gives_the_cpu(capsys):
    assert pick_device("-1").type == "cpu"
    assert capsys.readouterr().err == ""
    assert pick_device("99").type == "cpu"
    assert "no GPU 99 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "taken"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_idle_threads_sleep_soon_unless_the_user_says_else(monkeypatch, given, taken):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what the program sets is undone
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert program(lambda _: None)([]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == taken
