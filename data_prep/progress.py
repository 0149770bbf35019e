"""Shows how far a command is, its speed and the time left: at a terminal or in a log."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

SECONDS_BETWEEN_LINES = 30.0
"""The time between two progress lines in a log, where no line can be updated in place."""

UNITS = {"bases": (1e6, "Mbp"), "bytes": (1e6, "MB")}
"""For each unit: how many of them make one of the unit that is displayed, and its name."""


@dataclass(frozen=True)
class Phase:
    """A part of a command's work, whose size is known when it begins."""

    name: str
    total: int
    unit: str  # the unit of `total`: a key of UNITS, or a plural that is displayed as it is


Report = Callable[[Phase, int], None]
"""A callback that is told which phase is running and how much more of it is done."""


def share_done(phase: Phase, done: int, seconds: float) -> dict[str, str]:
    """Returns what is displayed of a phase: share, amount, speed and time left, as text."""
    scale, unit = UNITS.get(phase.unit, (1, phase.unit))
    digits = 1 if scale > 1 else 0
    share = min(done / phase.total, 1.0) if phase.total else 1.0
    left = ""  # unknown until something is done
    if share:
        left = f"{timedelta(seconds=round(seconds * (1 - share) / share))} left"
    return {
        "share": f"{int(100 * share)} %",
        "amount": f"{done / scale:,.{digits}f} of {phase.total / scale:,.{digits}f} {unit}",
        "speed": f"{done / scale / max(seconds, 1e-3):,.0f} {unit}/s",
        "left": left,
    }


class Display:
    """Shows one line with the progress, and above it messages that stay.

    At a terminal the progress line is updated in place. In a log file, a pipe, or a terminal that
    cannot move its cursor (TERM=dumb), a progress line is printed now and then.

    Args:
        console: where to print.
        seconds_between_lines: the time between two progress lines in a log.
        clock: returns seconds, counted from any moment.
    """

    def __init__(
        self,
        console: Console,
        seconds_between_lines: float = SECONDS_BETWEEN_LINES,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console = console
        self._seconds_between_lines = seconds_between_lines
        self._clock = clock
        self._phase: Phase | None = None
        self._done, self._begun, self._printed = 0, 0.0, clock()
        self._prints_lines = not console.is_terminal or console.is_dumb_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            *(TextColumn(f"{{task.fields[shown][{key}]}}") for key in ("share", "speed", "left")),
            console=console,
            transient=True,
            expand=True,
            disable=self._prints_lines,
        )

    def __enter__(self) -> "Display":
        return self  # the line starts with the first report, after the workers were forked

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def report(self, phase: Phase, amount: int) -> None:
        """Reports that `amount` more of a phase is done; a phase begins with its first report."""
        now = self._clock()
        if phase != self._phase:
            self._phase, self._done, self._begun = phase, 0, now
            self._begin(phase)
        self._done += amount
        shown = share_done(phase, self._done, now - self._begun)
        if not self._prints_lines:
            self._progress.update(self._progress.task_ids[0], completed=self._done, shown=shown)
        elif now - self._printed >= self._seconds_between_lines:
            self._printed = now
            self.say(f"{phase.name}: {', '.join(filter(None, shown.values()))}")

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _begin(self, phase: Phase) -> None:
        if self._prints_lines:
            return
        self._progress.start()
        for finished in self._progress.task_ids:
            self._progress.remove_task(finished)
        shown = share_done(phase, 0, 0)
        self._progress.add_task(phase.name, total=phase.total, shown=shown)
