import os
import signal

import pytest

from main import memory_advice
from signals import StopRequest
from utils import UserError, program


def test_stop_request_notes_a_signal_and_raises_at_a_second_interrupt():
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
def test_program_prints_one_line_of_what_the_user_can_mend(error, status, fails):
    assert fails(_raiser(error), [], status)


def test_program_raises_a_signal_that_would_kill_so_that_partial_files_go(fails, monkeypatch):
    signals = [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
    for signum in signals:
        assert "interrupted" in fails(program(lambda _, signum=signum: signal.raise_signal(signum)), [], 128 + signum)
        assert signal.getsignal(signum) == signal.SIG_DFL
    monkeypatch.setenv("RANK", "1")  # of torchrun, which ends processes that hang
    handlers = []
    assert program(lambda _: handlers.extend(map(signal.getsignal, signals)))([]) == 0
    assert handlers == [signal.SIG_DFL] * 2


def test_program_prints_names_on_one_line_that_do_not_steer_the_terminal(fails):
    line = fails(_raiser(UserError("a\nerror: fake\x1b[31m\udcff.png: no image")), [])
    assert line == r"error: a\nerror: fake\x1b[31m\udcff.png: no image"


def test_program_tells_a_path_with_store_in_it_and_advice_about_memory(fails):
    error = PermissionError(13, "Permission denied", "/data/restored/x.tif")
    assert fails(_raiser(error), []).startswith("error: /data/restored/x.tif: Permission denied")

    @program
    def hungry(_argv):
        with memory_advice("lower --tile"):
            raise RuntimeError("could not create a primitive")

    assert fails(hungry, []) == "error: out of memory: lower --tile"


def test_program_keeps_the_traceback_of_a_defect_of_ours():
    for error in (RuntimeError("shapes differ"), KeyError("x"), OSError("no number")):
        with pytest.raises(type(error)):
            _raiser(error)([])


@pytest.mark.parametrize(
    ("variables", "expected"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_program_lets_idle_threads_sleep_unless_the_user_sets_it(monkeypatch, variables, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what the program sets is undone
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert program(lambda _: None)([]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == expected
