"""Programs as forks of one process that has imported torch and the project: they start in milliseconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext  # Windows has none

ROOT = Path(__file__).resolve().parents[1]
# what the programs import early or late; torch._dynamo, for several processes and --compile on, takes a second
IMPORTED = ["torture.processes", "train", "predict", "prediction.export", "evaluation.test", "distributed"]
IMPORTED += ["sources.database"]
IMPORTED += ["torch._dynamo.convert_frame", "torch.distributed.run"]


class Fork:
    """A process that calls a program; its methods are those of `subprocess.Popen`.

    Parameters
    ----------
    program : callable
        Function of a module, or a `partial` of one, that takes the arguments and returns the exit status.
    argv : list of str
        The arguments.
    folder : Path
        Its current folder; its output goes to hidden files there.
    environment : dict of str to str
        Variables beside those of the server.
    out : Path, optional
        Where the standard output goes instead, such as a named pipe.
    """

    def __init__(
        self,
        program: Callable[[list[str]], int | None],
        argv: list[str],
        folder: Path,
        environment: dict[str, str],
        out: Path | None = None,
    ) -> None:
        server = _server()
        name = os.urandom(4).hex()
        self._texts = (folder / f".{name}.out", folder / f".{name}.err")
        targets = (out or self._texts[0], self._texts[1])
        self._alive, held = server.Pipe(duplex=False)
        self._process = server.Process(target=_become, args=(program, argv, folder, environment, targets, held))
        self._process.start()
        held.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.returncode is None:
            os.kill(self._process.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 60.0) -> tuple[str, str]:
        """What it has written, once it and all its forks have ended."""
        if not self._alive.poll(timeout):
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        self._process.join()
        out, err = (path.read_text() if path.exists() else "" for path in self._texts)
        return out, err


@cache
def _server() -> ForkServerContext:
    """Start the process that all forks come from; it has no thread, which a fork would miss."""
    from multiprocessing.forkserver import ensure_running  # Windows has none

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        ensure_running()
    return server


def _become(
    program: Callable[[list[str]], int | None],
    argv: list[str],
    folder: Path,
    environment: dict[str, str],
    targets: tuple[Path, Path],
    _held: Connection,
) -> None:
    """Be the program; the connection closes when nobody has it any more."""
    from torture.processes import become

    out, err = (path.open("ab") for path in targets)
    become(
        partial(program, argv), [str(ROOT / "main.py"), *argv], folder, lambda: os.environ.update(environment), out, err
    )


def as_nobody(program: Callable[[list[str]], int], argv: list[str]) -> int:
    """Call a program as an account that owns no file, and may not be able to read those of Python or the project."""
    import PIL.PngImagePlugin  # noqa: F401

    from evaluation.results_page import load_template

    load_template("database.html")
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    return program(argv)


def note_operations(program: Callable[[list[str]], int], argv: list[str]) -> int:
    """Call a program in the folder `run`, and note there beside in `operations` what a power cut may undo."""
    from torture.powercut import Recorder

    os.chdir("run")
    Recorder(Path.cwd(), Path("../operations").resolve()).install()
    return program(argv)


def launch_two(argv: list[str]) -> None:
    """Call `main.py` in two forks, and wait for them; knows nothing of signals."""
    import main

    for rank in "01":
        if not os.fork():
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = rank
            os._exit(main.main(argv))
    for _ in range(2):
        os.wait()
