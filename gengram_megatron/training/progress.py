"""The line on the screen that says how a run is going."""

import math
from collections import deque
from statistics import median

from rich.console import Console
from rich.live import Live
from rich.text import Text

STEPS_REMEMBERED = 50


class Progress:
    """Shows one line: kept up to date at a terminal, printed every `interval` steps elsewhere.

    Args:
        total_steps: of the whole run.
        interval: steps between lines where there is no terminal.
        console: where to; null: standard output.
    """

    def __init__(self, total_steps: int, interval: int, console: Console | None = None):
        self._total_steps = total_steps
        self._interval = interval
        self._console = console or Console(highlight=False)
        self._seconds: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._steps, self._trained, self._waited = 0, 0.0, 0.0  # of this job; the last two seconds
        self._live = Live(console=self._console, auto_refresh=False)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
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
    ) -> None:
        """Shows one training step.

        Args:
            step: steps done, this one included.
            loss: nats a base.
            lr: learning rate of this step.
            grad_norm: before clipping.
            tokens_per_second: over all ranks.
            seconds: what this step took; time left is counted with the median of the last ones,
                which a validation or a slow checkpoint now and then does not move.
            data_wait: the share of these seconds that were spent waiting for samples.
        """
        self._seconds.append(seconds)
        self._steps += 1
        self._trained += seconds
        self._waited += data_wait * seconds
        left = (self._total_steps - step) * median(self._seconds)
        line = (
            f"step {step}/{self._total_steps}  {_loss(loss)}  lr {lr:.2g}  grad {grad_norm:.2f}  "
            f"{tokens_per_second:,.0f} tokens/s  wait {data_wait:.1%}  {duration(left)} left"
        )
        if self._live.is_started:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif step % self._interval == 0 or step == self._total_steps:
            self.say(line)

    def validation(self, *, step: int, loss: float, of_sets: dict[str, float]) -> None:
        """Prints one validation; it stays on the screen.

        loss, of_sets: nats a base in all, and of each set of a blend by its name.
        """
        sets = "".join(f"  {name} {nats:.4f}" for name, nats in of_sets.items())
        self.say(f"step {step}/{self._total_steps}  validation {_loss(loss)}{sets}")

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


def _loss(nats: float) -> str:
    return f"loss {nats:.4f} nats  {nats / math.log(2):.4f} bits/base"
