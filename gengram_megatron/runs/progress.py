"""The line on the screen that says how a run is going."""

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
"""Between the lines of one validation where there is no live line."""
VALIDATION_STEP = 1 / 3
"""The time of a validation step over that of a training step, until one has been measured: of the
three products of a training step, validation has the one of the forward pass."""


class Progress:
    """Shows one line: kept up to date at a terminal, printed every `interval` steps elsewhere.

    A terminal that cannot move its cursor (TERM=dumb) gets printed lines, as a pipe does. At a
    terminal, a line holds as many numbers as its width has room for; those that say how the run
    is going come first, and fit into 80 columns.

    Args:
        total_steps: of the whole run.
        interval: steps between lines where no line is kept up to date.
        console: where to; None: standard output.
        validation_interval: steps between validations; None: only after the last step.
        validation_steps: global batches of one validation; 0: the run has no validations.
        clock: seconds, as of time.monotonic.
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
        self._steps, self._trained, self._waited = 0, 0.0, 0.0  # of this job; the last two seconds
        self._first_fields: list[str] = []  # of the last step, before and after the time left
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
        peak_memory_bytes: int | None = None,
    ) -> None:
        """Shows one training step.

        Args:
            step: steps done, this one included.
            loss: nats a base.
            lr: learning rate of this step.
            grad_norm: before clipping.
            tokens_per_second: over all ranks.
            seconds: what this step took; time left is counted with the median of the last ones,
                which a slow checkpoint now and then does not move, and the validations that are
                still due with the median of those that were made.
            data_wait: the share of these seconds that were spent waiting for samples.
            model_flops_utilisation, peak_memory_bytes: as of training.gpu_use, on GPUs.
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
        """Shows how far a validation is; called with done = 0 when it begins.

        Where there is no live line, a validation of minutes gets a line each minute and a short
        one none.

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
        """Prints what a validation came to; it stays on the screen.

        loss, of_sets: nats a base in all, and of each set of a blend by its name.
        """
        self._validation_seconds.append(self._clock() - self._validation_began)
        sets = "".join(f"  {name} {nats:.4f}" for name, nats in of_sets.items())
        self.say(
            f"{self._place(step)}  validation loss {loss:.4f} nats  "
            f"{_bits(loss):.4f} bits/base{sets}"
        )
        if self._first_fields:  # the live line is again that of the step
            fields = [*self._first_fields, *self._left(step, validated=1), *self._last_fields]
            self._show(fields, print_it=False)

    def end(self) -> None:
        """Prints what the steps of this job took, if there were any."""
        if self._steps:
            self.say(
                f"{self._steps} steps in {duration(self._trained)}, "
                f"{self._waited / self._trained:.2%} of it waiting for samples"
            )

    def say(self, line: str) -> None:
        """Prints a line as it is, above the live one where there is one."""
        self._console.print(line, markup=False, soft_wrap=True)

    def _show(self, fields: list[str], print_it: bool) -> None:
        """Updates the live line, or prints the fields where there is none and they are due."""
        line = _joined(fields, self._console.width if self._console.is_terminal else None)
        if self._live.is_started:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif print_it:
            self.say(line)

    def _place(self, step: int) -> str:
        return f"step {step}/{self._total_steps}"

    def _left(self, step: int, validated: float = 0.0) -> list[str]:
        """The time left, once a step of this job has been timed.

        validated: how much of the validation after this step is done, from 0 to 1.
        """
        if not self._seconds:
            return []
        seconds = median(self._seconds)
        left = (self._total_steps - step) * seconds
        if due := self._validations_due(step):
            one = VALIDATION_STEP * seconds * self._validation_steps
            if self._validation_seconds:
                one = median(self._validation_seconds)
            left += (due - validated) * one
        return [f"{duration(left)} left"]

    def _validations_due(self, step: int) -> int:
        """Validations after this step or a later one, to the end of the run."""
        if not self._validation_steps:
            return 0
        interval = self._validation_interval or self._total_steps
        at_end = self._total_steps % interval != 0
        return self._total_steps // interval - max(step - 1, 0) // interval + at_end


def duration(seconds: float) -> str:
    """Seconds for people: 42s, 3m12s, 5h07m, 2d03h."""
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
    """The first fields, as many as fit into the width whole, but at least one; None: all."""
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
    """Without escape sequences where no person looks, whatever FORCE_COLOR says."""
    return Console(highlight=False, force_terminal=None if sys.stdout.isatty() else False)
