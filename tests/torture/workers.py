"""Cases in forked workers, so that one that crashes or hangs ends no other."""

from __future__ import annotations

import json
import os
import resource
import selectors
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from .cases import GB, MEMORY, Case, Fault
from .processes import kill_all

Results = Iterator[tuple[int, list[Fault]]]


class TooSlow(BaseException):
    """A case takes too long; no program catches this."""


def try_case(case: Case, folder: Path, rng: Random) -> list[Fault]:
    """Faults of a case in a new folder, which is removed."""
    folder.mkdir(parents=True)
    try:
        return case.run(folder, rng)
    except TooSlow as error:
        return [Fault("hang", f"longer than {case.limit:.0f} s in {_place(error)}")]
    except BaseException as error:
        text = " ".join(str(error).split())[:300]
        return [Fault("traceback", f"{type(error).__name__}: {text} ({_place(error)})")]
    finally:
        kill_all()
        shutil.rmtree(folder, ignore_errors=True)


def _place(error: BaseException) -> str:
    """Innermost function of an error."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno} {last.name}"


def run_cases(cases: Sequence[Case], numbers: list[int], root: Path, seed: str, jobs: int) -> Results:
    """Faults of each case, run by so many workers at a time."""
    root.mkdir(exist_ok=True)
    workers = [Worker(cases, numbers[first::jobs], root, seed) for first in range(min(jobs, len(numbers)))]
    try:
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                worker.fork()
                selector.register(worker.pipe, selectors.EVENT_READ, worker)
            while selector.get_map():
                ready = {key.data: key for key, _ in selector.select(timeout=0.5)}
                for worker in [key.data for key in selector.get_map().values()]:
                    yield from worker.results(worker in ready)
                    if worker.dead:
                        selector.unregister(worker.pipe)
                        yield from worker.bury()
                        if worker.todo:
                            worker.fork()
                            selector.register(worker.pipe, selectors.EVENT_READ, worker)
    finally:
        for worker in workers:
            worker.kill()


class Worker:
    """A forked process that runs cases one after another, and is replaced when it dies."""

    def __init__(self, cases: Sequence[Case], todo: list[int], root: Path, seed: str) -> None:
        self.cases, self.todo, self.root, self.seed = cases, todo, root, seed
        self.pid = 0

    def fork(self) -> None:
        """Start a process for the cases that are left."""
        self.pipe, write = os.pipe()
        self.dead, self._rest, self._since = False, b"", time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.pipe)
            self._work(write)
        os.setpgid(self.pid, self.pid)  # here and there, so that it is done whoever comes first
        os.close(write)

    def _work(self, pipe: int) -> None:
        """Run cases, in the child; never returns."""
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGALRM, _raise_too_slow)
            resource.setrlimit(resource.RLIMIT_AS, (_address_space() + 4 * MEMORY,) * 2)  # spare the machine
            peak = 0
            while self.todo and peak <= MEMORY:  # after a large one, the next worker begins with a small peak
                number = self.todo.pop(0)
                faults = self._try(number)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                if peak > MEMORY:
                    faults.append(Fault("over memory", f"{peak / GB:.1f} GB"))
                line = json.dumps([number, [(fault.kind, fault.text) for fault in faults]])
                os.write(pipe, line.encode() + b"\n")
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _try(self, number: int) -> list[Fault]:
        """Faults of one case."""
        case, folder = self.cases[number], self.root / f"{number:05d}-{os.getpid()}"
        signal.setitimer(signal.ITIMER_REAL, case.limit)
        try:
            return try_case(case, folder, Random(f"{self.seed}-{number}"))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def results(self, ready: bool) -> Results:
        """What the worker has said; a case in which it died or hangs is one of the results."""
        if ready:
            read = os.read(self.pipe, 2**16)
            self.dead = not read
            *lines, self._rest = (self._rest + read).split(b"\n")
            for line in lines:
                number, faults = json.loads(line)
                self.todo.remove(number)
                self._since = time.monotonic()
                yield number, [Fault(*fault) for fault in faults]
        if not self.dead and self.todo and time.monotonic() - self._since > 2 * self.cases[self.todo[0]].limit:
            self.kill()
            yield self.todo.pop(0), [Fault("hang", "killed, its alarm did not wake it")]
            self.dead = True

    def bury(self) -> Results:
        """Clean up after the process; the case in which it died, if it did."""
        os.close(self.pipe)
        if self.pid:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.pid = 0
            if status and self.todo:
                yield self.todo.pop(0), [Fault("traceback", f"the process died, status {status}")]

    def kill(self) -> None:
        """End the process and the programs that it runs."""
        if self.pid:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


def _raise_too_slow(_signum: int, _frame: object) -> None:
    raise TooSlow


def _address_space() -> int:
    """Bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
