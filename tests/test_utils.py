import os
import signal

import pytest

from device import pick_device
from signals import StopRequest
from utils import UserError, memory_advice, program


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


def test_a_signal_that_would_kill_is_raised_so_that_partial_files_go(fails, monkeypatch):
    signals = [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
    for signum in signals:
        assert "interrupted" in fails(program(lambda _, signum=signum: signal.raise_signal(signum)), [], 128 + signum)
        assert signal.getsignal(signum) == signal.SIG_DFL
    monkeypatch.setenv("RANK", "1")  # of torchrun, which ends processes that hang
    handlers = []
    assert program(lambda _: handlers.extend(map(signal.getsignal, signals)))([]) == 0
    assert handlers == [signal.SIG_DFL] * 2


def test_names_in_messages_are_one_line_and_do_not_steer_the_terminal(fails):
    line = fails(_raiser(UserError("a\nerror: fake\x1b[31m\udcff.png: no image")), [])
    assert line == r"error: a\nerror: fake\x1b[31m\udcff.png: no image"


def test_a_path_with_store_in_it_has_its_own_message_and_memory_its_advice(fails):
    error = PermissionError(13, "Permission denied", "/data/restored/x.tif")
    assert fails(_raiser(error), []).startswith("error: /data/restored/x.tif: Permission denied")

    @program
    def hungry(_argv):
        with memory_advice("lower --tile"):
            raise RuntimeError("could not create a primitive")

    assert fails(hungry, []) == "error: out of memory: lower --tile"


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
