"""How long a training will take, said after its first steps."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from config import LAPTOP, Config
from flags import as_typed
from progress import clock

HOUR = 3600  # [s] a training that takes longer says so
NUM_STEP = 3  # the first one warms up, the others are timed


class Forecast:
    """Times the first steps of a run of `num_step` steps, and prints a line if it will take over an hour."""

    def __init__(self, num_step: int, config: Config, echo: Callable[[str], None]) -> None:
        self.num_step, self.config, self.echo = num_step, config, echo
        self.times: list[float] = []

    def note(self, loss: Tensor) -> None:
        """Count a step with its loss, for which the device is waited."""
        if self.config.max_minutes or len(self.times) == NUM_STEP:
            return
        loss.item()
        self.times.append(time.perf_counter())
        seconds = (self.times[-1] - self.times[0]) / (NUM_STEP - 1) * self.num_step
        if len(self.times) == NUM_STEP and seconds > HOUR:
            flags = {name: value for name, value in LAPTOP.items() if getattr(self.config, name) != value}
            typed = as_typed(flags | {"train_continue": False})
            words = " ".join(f"{name} {value}" for name, value in typed.items())
            what = f"note: this training takes about {clock(seconds)} h by its first steps, besides the validation"
            cost = "V_Info of the ISBI 2012 stack 0.985, and 0.986 after an hour with --nch_ker 32"
            self.echo(f"{what}: for ten minutes, press Ctrl-C and add {words} (docs/results.md: {cost})")
