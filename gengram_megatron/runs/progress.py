"""Shows the progress of a run as a line on the screen."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from statistics import median

from rich.console import Console
from rich.live import Live
from rich.text import Text

STEPS_REMEMBERED = 50
SECONDS_BETWEEN_LINES = 60.0
"""Time between the lines of one validation if there is no live line."""
VALIDATION_STEP = 1 / 3
"""Estimated ratio of the times of a validation step and a training step, until one has been
measured: validation has only the forward pass, one of the three products of a training step."""


class Progress:
    """Shows one line: a live line at a terminal, a printed line every `interval` steps elsewhere.

    A terminal that cannot move its cursor (TERM=dumb) gets printed lines, like a pipe. At a
    terminal, a line has as many numbers as fit into its width. The most important ones come first,
    and fit into 80 columns.

    Args:
        total_steps: steps of the whole run.
        interval: steps between lines if there is no live line.
        console: where to print; None for standard output.
        validation_interval: steps between validations; None: only after the last step.
        validation_steps: global batches of one validation; 0: the run has no validations.
        clock: returns the time in seconds, like time.monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        interval: int,
        console: Console | None = None,
        *,
        validation_interval: int | None = None,
        validation_steps: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total_steps, self._interval = total_steps, interval
        self._console = console or _standard_output()
        self._validation_interval = validation_interval
        self._validation_steps = validation_steps
        self._clock = clock
        self._seconds: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._validation_seconds: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._validation_began = self._last_line = clock()
        # Of this job: steps, seconds of training, and seconds of waiting for samples.
        self._steps, self._trained, self._waited = 0, 0.0, 0.0
        # Fields of the last step, shown before and after the time left.
        self._first_fields: list[str] = []
        self._last_fields: list[str] = []
        self._live = Live(console=self._console, auto_refresh=False)

    def __enter__(self) -> "Progress":
        if self._console.is_interactive:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def step(
        self,
        *,
        step: int,
        loss: float,
        lr: float,
        grad_norm: float,
        tokens_per_second: float,
        seconds: float,
        data_wait: float,
        model_flops_utilisation: float | None = None,
        peak_memory_bytes: float | None = None,
    ) -> None:
        """Shows one training step.

        Args:
            step: steps done, including this one.
            loss: nats per base.
            lr: learning rate of this step.
            grad_norm: gradient norm before clipping.
            tokens_per_second: over all ranks.
            seconds: duration of this step. The time left is estimated from the median of the last
                steps, which an occasional slow checkpoint does not change, and from the median of
                earlier validations.
            data_wait: the share of these seconds that was spent waiting for samples.
            model_flops_utilisation, peak_memory_bytes: only on GPUs (engine/training/report.py).
        """
        self._seconds.append(seconds)
        self._steps += 1
        self._trained += seconds
        self._waited += data_wait * seconds
        self._first_fields = [
            self._place(step),
            f"loss {loss:.4f}",
            f"{_bits(loss):.4f} bits",
            f"{tokens_per_second:,.0f} tokens/s",
        ]
        self._last_fields = [
            f"lr {lr:.2g}",
            f"grad {grad_norm:.2f}",
            f"wait {data_wait:.1%}",
        ]
        if model_flops_utilisation is not None:
            self._last_fields.append(f"MFU {model_flops_utilisation:.1%}")
        if peak_memory_bytes is not None:
            self._last_fields.append(f"{peak_memory_bytes / 1e9:.1f} GB")
        fields = [*self._first_fields, *self._left(step), *self._last_fields]
        self._show(fields, print_it=step % self._interval == 0 or step == self._total_steps)

    def validating(self, *, step: int, done: int, total: int) -> None:
        """Shows the progress of a validation; called with done = 0 when it begins.

        Without a live line, a line is printed each minute, so short validations have none.

        Args:
            step: training steps done.
            done, total: global batches of this validation.
        """
        now = self._clock()
        if done == 0:
            self._validation_began = self._last_line = now
        fields = [self._place(step), f"validating {done}/{total}", *self._left(step, done / total)]
        due = now - self._last_line >= SECONDS_BETWEEN_LINES
        if due:
            self._last_line = now
        self._show(fields, print_it=due)

    def validation(self, *, step: int, loss: float, of_sets: dict[str, float]) -> None:
        """Prints the loss of a validation; it stays on the screen.

        Args:
            loss: nats per base over all data.
            of_sets: nats per base of each data set of a blend, by its name.
        """
        self._validation_seconds.append(self._clock() - self._validation_began)
        sets = "".join(f"  {name} {nats:.4f}" for name, nats in of_sets.items())
        self.say(
            f"{self._place(step)}  validation loss {loss:.4f} nats  "
            f"{_bits(loss):.4f} bits/base{sets}"
        )
        if self._first_fields:  # the live line shows the step again
            fields = [*self._first_fields, *self._left(step, validated=1), *self._last_fields]
            self._show(fields, print_it=False)

    def end(self) -> None:
        """Prints how long the steps of this job took, if there were any."""
        if self._steps:
            self.say(
                f"{self._steps} steps in {duration(self._trained)}, "
                f"{self._waited / self._trained:.2%} of it waiting for samples"
            )

    def say(self, line: str) -> None:
        """Prints a line unchanged, above the live line if there is one."""
        self._console.print(line, markup=False, soft_wrap=True)

    def _show(self, fields: list[str], print_it: bool) -> None:
        """Updates the live line. Without one, prints the fields if print_it is true."""
        line = _joined(fields, self._console.width if self._console.is_terminal else None)
        if self._live.is_started:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif print_it:
            self.say(line)

    def _place(self, step: int) -> str:
        return f"step {step}/{self._total_steps}"

    def _left(self, step: int, validated: float = 0.0) -> list[str]:
        """Returns the field of the time left, or no field before the first step of this job.

        Args:
            validated: how much of the validation after this step is done, from 0 to 1.
        """
        if not self._seconds:
            return []
        seconds = median(self._seconds)
        left = (self._total_steps - step) * seconds
        if due := self._validations_due(step):
            per_validation = VALIDATION_STEP * seconds * self._validation_steps
            if self._validation_seconds:
                per_validation = median(self._validation_seconds)
            left += (due - validated) * per_validation
        return [f"{duration(left)} left"]

    def _validations_due(self, step: int) -> int:
        """Returns the number of validations from the one after this step to the end of the run."""
        if not self._validation_steps:
            return 0
        interval = self._validation_interval or self._total_steps
        at_end = self._total_steps % interval != 0
        return self._total_steps // interval - max(step - 1, 0) // interval + at_end


def duration(seconds: float) -> str:
    """Returns seconds in a readable form: 42s, 3m12s, 5h07m, 2d03h."""
    seconds = round(seconds)
    for unit, size, part, part_size in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "m", 60),
        ("m", 60, "s", 1),
    ):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // part_size:02}{part}"
    return f"{seconds}s"


def _joined(fields: list[str], width: int | None) -> str:
    """Joins as many fields as fit completely into the width, at least one; all if it is None."""
    line = fields[0]
    for field in fields[1:]:
        longer = f"{line}  {field}"
        if width is not None and len(longer) > width:
            break
        line = longer
    return line


def _bits(nats: float) -> float:
    return nats / math.log(2)


def _standard_output() -> Console:
    """Returns a console without escape sequences unless standard output is a terminal, whatever
    FORCE_COLOR says."""
    return Console(highlight=False, force_terminal=None if sys.stdout.isatty() else False)
