"""What a training tells: its parameters, its command, its progress, its curves."""

from __future__ import annotations

import io
import math
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset import DataInfo
from files import atomic_write
from utils import printable, say

FEW, ENOUGH = 1000, 1800  # steps of a training; see "Few annotated sections" in benchmarks/README.md
SHOWN = ("loss", "dice", "pixel_error", "images_per_second")  # beside the progress


def write_arguments(path: Path, values: dict[str, Any]) -> None:
    """Write `arg.txt`, the readable table of a run's parameters."""
    width = max(map(len, values))
    with atomic_write(path, "w") as file:
        file.writelines(printable(f"{name.ljust(width)}  {value}") + "\n" for name, value in values.items())


def say_what_is_trained(
    info: DataInfo, num_weight: int, device: torch.device, num_step: int, num_epoch: int | None
) -> None:
    """Print the fractions of the classes, the size of the network, and whether its training has few steps.

    Parameters
    ----------
    info : DataInfo
        Of the training data.
    num_weight : int
        Of the network.
    device : torch.device
        What is trained on.
    num_step : int
        Steps of an epoch.
    num_epoch : int or None
        Epochs; None for a run that ends by the clock.
    """
    parts = zip(info.class_names, info.class_share, strict=True)
    say("training pixels: " + ", ".join(f"{name} {part:.1%}" for name, part in parts))
    say(f"{num_weight:,} weights on {device}")
    if num_epoch and num_step < 4 and num_step * num_epoch < FEW:
        advice = f"--num_epoch {math.ceil(ENOUGH / num_step)}, or --max_minutes"
        say(f"note: {num_step * num_epoch} steps are few: with so few images add {advice}")


def command_line(argv: list[str] | None = None) -> str:
    """Command that started this process, as one would type it, with further arguments."""
    return shlex.join(["python", *sys.argv, *(argv or [])])


class TrainingLog:
    """Progress and curves of a training: a bar on a terminal, plain lines elsewhere, TensorBoard events.

    Events are on the disk when a method returns, so that no checkpoint is ever ahead of its curves
    (tensorboardX's SummaryWriter queues them, and a killed run would lose the last two minutes). A disk that takes no
    more of them ends the curves with a warning, and not the training.

    Parameters
    ----------
    folder : Path
        Where the events go.
    first : int
        First epoch of this run. What an interrupted run wrote of epochs from it on is hidden.
    last : int or None
        Last epoch; None for a run that ends by the clock.
    progress : float
        Share of the run that was over before.
    """

    def __init__(self, folder: Path, first: int, last: int | None, progress: float) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tqdm import tqdm

        self.folder = folder
        self.writer: EventsWriter | None = EventsWriter(
            str(folder / "events"), f".{time.time_ns()}"
        )  # two runs may start in one second
        self._write(first, session_log={"status": "START"})
        self.bar = tqdm(total=last, initial=first - 1, unit="epoch", disable=None, dynamic_ncols=True)
        self.of = f"/{last}" if last else ""
        self.start, self.before = time.monotonic(), progress

    def _write(self, epoch: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        if self.writer is None:
            return
        try:
            self.writer.write_event(Event(wall_time=time.time(), step=epoch, **what))
            self.writer.flush()
        except OSError as error:
            with suppress(OSError):  # flushes once more
                self.writer._py_recordio_writer.close()
            self.writer = None
            reason = f"cannot write {self.folder}: {error.strerror or error}"
            say(f"warning: {reason}: the training goes on, its curves end at epoch {epoch - 1}", sys.stderr)

    def scalars(self, epoch: int, scores: dict[str, float], progress: float) -> None:
        """Add one point to each curve, and show the progress, the share of the run that is over."""
        self._write(epoch, summary={"value": [{"tag": name, "simple_value": value} for name, value in scores.items()]})
        shown = {name: f"{value:.4g}" for name, value in scores.items() if name.split("/")[0] in SHOWN}
        left = self._left(progress)
        self.bar.set_postfix(shown | {"left": left}, refresh=False)
        self.bar.update()
        if self.bar.disable:
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            say(f"epoch {epoch}{self.of}  {text}  {left} left")

    def images(self, epoch: int, pictures: dict[str, np.ndarray]) -> None:
        """Add pictures, (H, W) or (H, W, 3) uint8; tensorboardX itself writes grey as colours, seven times slower."""
        from PIL import Image

        for name, picture in pictures.items():
            png = io.BytesIO()
            Image.fromarray(picture).save(png, "PNG")
            height, width = picture.shape[:2]
            image = {"height": height, "width": width, "colorspace": 1 if picture.ndim == 2 else 3}
            image["encoded_image_string"] = png.getvalue()
            self._write(epoch, summary={"value": [{"tag": name, "image": image}]})

    def _left(self, progress: float) -> str:
        """Time to the end at the pace so far."""
        pace = (time.monotonic() - self.start) / max(progress - self.before, 1e-9)
        minutes, seconds = divmod(round(pace * (1 - progress)), 60)
        return f"{minutes}:{seconds:02d}"

    def close(self) -> None:
        """Write what is pending."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


class NoLog:
    """Stands for a `TrainingLog` in the processes that have none."""

    def scalars(self, *_: Any) -> None:
        """Do nothing."""

    def images(self, *_: Any) -> None:
        """Do nothing."""


Log = TrainingLog | NoLog
