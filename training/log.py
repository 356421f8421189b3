"""Log of a training: arg.txt, the command, the progress and the TensorBoard curves."""

from __future__ import annotations

import io
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from files import atomic_write
from progress import clock
from utils import UserError, echo, printable

if TYPE_CHECKING:  # imported where they are used: a test needs none of them
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event

# folder of its events below that of the log, which TensorBoard draws in a colour of its own -> what it has of `loss`
RUNS = {"": "loss/train", "validation": "loss/val"}
NO_SCORES = ("learning_rate", "images_per_second")  # curves that are none
WIDTH, EACH = 79, 1.0  # columns of the progress on a terminal, and time [s] until it is shown again
PROGRESS = ("loss", "dice", "pixel_error", "images_per_second")  # scores next to the progress


def command_line(argv: list[str] | None = None) -> str:
    """Command that started this process, quoted for a shell, with additional arguments."""
    return shlex.join(["python", *sys.argv, *(argv or [])])


class TrainingLog:
    """Progress (a bar on a terminal, otherwise plain lines), arg.txt and TensorBoard curves of a training.

    Nothing is written before `open`; then events are on the disk when a method returns, so that no checkpoint is ever
    ahead of its curves (tensorboardX's SummaryWriter queues them, and a killed run would lose the last two minutes).
    If they can't be written, a warning is printed and training continues without curves.
    """

    def __init__(self, folder: Path, first: int, last: int | None, progress: float) -> None:
        from tqdm import tqdm

        self.folder, self.first = folder, first  # TensorBoard hides what an interrupted run wrote from `first` on
        self.writers: dict[str, EventsWriter] = {}  # of each run
        self._waiting: list[tuple[str, Event]] | None = []  # until `open`, with their run; None: none can be written
        self._flags: Event | None = None  # which each file begins with
        self._table: dict[str, Any] = {}  # of arg.txt
        self.bar = tqdm(bar_format="{desc}", disable=None)
        self.texts: dict[str, str] = {}  # scores of the last epoch
        self.of = f"/{last}" if last else ""  # a run that is limited by time has no last epoch
        self.last_shown = 0.0  # time [s]
        self.start, self.before = time.monotonic(), progress  # the fraction of the run that was done before
        self.show(first, progress)

    def open(self) -> None:
        """Write arg.txt and the events until now; called when the files of an earlier training are out of the way."""
        waiting, self._waiting = self._waiting or [], []
        self._begin_files(self.first)
        for run, event in waiting:
            self._put(run, event)

    def _begin_files(self, epoch: int) -> None:
        """Write arg.txt, and begin the files of events."""
        from tensorboardX.event_file_writer import EventsWriter

        width = max(map(len, self._table))
        with atomic_write(self.folder / "arg.txt", "w") as file:
            file.writelines(printable(f"{name.ljust(width)}  {value}") + "\n" for name, value in self._table.items())
        self._name = f".{time.time_ns()}"  # two runs may start in one second
        for run in RUNS:
            (self.folder / run).mkdir(exist_ok=True)
            self.writers[run] = EventsWriter(str(self.folder / run / "events"), self._name)
        for run in RUNS:
            self._put(run, _event(epoch, session_log={"status": "START"}))
        if self._flags:
            self._put("", self._flags)

    def _write(self, epoch: int, run: str = "", **event: Any) -> None:
        """Write an event, or keep it until `open`."""
        if self.writers:
            self._put(run, _event(epoch, **event))
        elif self._waiting is not None:
            self._waiting.append((run, _event(epoch, **event)))

    def _put(self, run: str, event: Event) -> None:
        """Write an event to the disk."""
        if not self.writers:
            return
        try:
            self.writers[run].write_event(event)
            self.writers[run].flush()
        except OSError as error:
            self._abandon()
            self._waiting = None
            reason = f"cannot write {self.folder}: {error.strerror or error}"
            echo(f"warning: {reason}: the training continues, but its curves end at epoch {event.step - 1}", sys.stderr)

    def _abandon(self) -> None:
        """Close the files without writing what their writers still hold."""
        for writer in self.writers.values():
            with suppress(OSError):  # closing flushes again
                writer._py_recordio_writer.close()
        self.writers = {}

    def _mend(self, epoch: int) -> None:
        """Begin other files of events if somebody has removed one of this run."""
        if all(any((self.folder / run).glob(f"events*{self._name}")) for run in self.writers):
            return
        what = f"the log in {self.folder} was removed while the training runs"
        self._abandon()
        try:
            self._begin_files(epoch)
            echo(f"warning: {what}: its curves begin again at epoch {epoch}", sys.stderr)
        except (OSError, UserError) as error:
            self._waiting = None
            echo(f"warning: {what}: {error}: the training continues without curves", sys.stderr)

    def scalars(self, epoch: int, scores: dict[str, float], progress: float) -> None:
        """Add one point to each curve, and show the progress, the fraction of the run that is done."""
        self._mend(epoch)
        self._write(epoch, summary={"value": [{"tag": name, "simple_value": value} for name, value in scores.items()]})
        for run, name in RUNS.items():
            if name in scores:
                self._write(epoch, run, summary={"value": [{"tag": "loss", "simple_value": scores[name]}]})
        self.texts = {name: f"{value:.4g}" for name, value in scores.items() if name.split("/")[0] in PROGRESS}
        self.last_shown = 0.0
        self.show(epoch, progress)
        if self.bar.disable:
            echo(self._line(epoch, progress))

    def show(self, epoch: int, progress: float) -> None:
        """Show the progress on a terminal, if the last time was not just now."""
        if not self.bar.disable and time.monotonic() - self.last_shown >= EACH:
            self.last_shown = time.monotonic()
            self.bar.set_description_str(self._line(epoch, progress, WIDTH))

    def _line(self, epoch: int, progress: float, width: float = inf) -> str:
        """Progress as a line: the time left first, and last as many scores as fit."""
        gone, done = time.monotonic() - self.start, progress - self.before
        left = clock(gone / done * (1 - progress)) if done > 0 else "?"
        line = f"{left} left, {clock(gone)} done, epoch {epoch}{self.of}"
        for name, value in self.texts.items():
            line += text if len(line + (text := f"  {name} {value}")) <= width else ""
        return line

    def note(self, text: str) -> None:
        """Print a line above the progress."""
        self.bar.clear()
        echo(text)
        self.bar.refresh()

    def arguments(self, epoch: int, values: dict[str, Any], network: Mapping[str, Any]) -> None:
        """Add the flags as a table of text; called before `open`."""
        from tensorboardX.summary import text

        self._table = values | {"network": dict(network)}
        rows = "".join(f"| {name} | `{printable(str(value))}` |\n" for name, value in values.items())
        table = text("flags", "| flag | value |\n|---|---|\n" + rows)
        self._flags = _event(epoch, summary=table)

    def hparams(self, epoch: int, values: dict[str, Any], scores: dict[str, float]) -> None:
        """Add the flags and which curves are the scores of the run; TensorBoard shows the last value of each."""
        from tensorboardX.summary import hparams

        plain = {name: v if isinstance(v, int | float | str) else str(v) for name, v in values.items()}
        for summary in hparams(plain, {name: v for name, v in scores.items() if name not in NO_SCORES}):
            self._write(epoch, summary=summary)

    def precision_recall(self, epoch: int, counts: np.ndarray) -> None:
        """Add a precision-recall curve from `metrics.threshold_counts` of all images."""
        from tensorboardX.summary import pr_curve_raw

        above = counts[:, ::-1].cumsum(1)[:, ::-1]  # pixels at least as probable, outside and inside
        fp, tp = above.astype(float)
        fn, tn = tp[0] - tp, fp[0] - fp
        precision, recall = tp / np.maximum(tp + fp, 1), tp / max(tp[0], 1)
        self._write(epoch, summary=pr_curve_raw("foreground", tp, fp, tn, fn, precision, recall, len(tp)))

    def images(self, epoch: int, pictures: dict[str, np.ndarray]) -> None:
        """Add pictures, (H, W) or (H, W, 3) uint8; tensorboardX would write grey as RGB, seven times slower."""
        from PIL import Image

        for name, picture in pictures.items():
            png = io.BytesIO()
            Image.fromarray(picture).save(png, "PNG")
            height, width = picture.shape[:2]
            image = {"height": height, "width": width, "colorspace": 1 if picture.ndim == 2 else 3}
            image["encoded_image_string"] = png.getvalue()
            self._write(epoch, summary={"value": [{"tag": name, "image": image}]})

    def close(self) -> None:
        """Close the bar and the event file."""
        self.bar.close()
        for writer in self.writers.values():
            writer.close()


def _event(step: int, **content: Any) -> Event:
    """Event of an epoch."""
    from tensorboardX.proto.event_pb2 import Event

    return Event(wall_time=time.time(), step=step, **content)


class NoLog:
    """Replaces `TrainingLog` in all processes but the main one: each of its methods does nothing."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_: None


Log = TrainingLog | NoLog
