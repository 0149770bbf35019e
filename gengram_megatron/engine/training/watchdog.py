"""Ends a job of which a rank hangs, and says which one and where.

Ranks wait for each other, so when one hangs, all stand still. Each rank's watchdog then writes the
stacks of its threads to a file and looks into those of the others: the rank that hangs is the one
that wrote nothing, or has come the least far, or does not wait for others.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gengram_megatron.errors import PREFIX

HUNG = 70
"""Exit code, on every rank."""
GRACE_SECONDS = 5.0
"""For the other ranks to notice and to write."""
_WAITING = ("torch/distributed/", "p2p_communication.py", "param_and_grad_buffer.py")
"""Files whose innermost frame means: this rank waits for others."""


@dataclass(frozen=True)
class Report:
    """The first line of a rank's file."""

    rank: int
    step: int
    doing: str
    marks: int
    waits: bool


class Watchdog:
    """Watches the main thread, from another one, while it is entered.

    Args:
        seconds: without a mark until the job ends; None: watches nothing.
        folder: where all ranks write their stacks; a new one each time a run is started.
        rank, ranks: which this is, of how many.
    """

    def __init__(self, seconds: float | None, folder: Path, rank: int, ranks: int):
        self._seconds, self._folder, self._rank, self._ranks = seconds, folder, rank, ranks
        self._step, self._doing, self._marks, self._since = 0, "starting", 0, time.monotonic()
        self._left = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        faulthandler.cancel_dump_traceback_later()

    def mark(self, step: int, doing: str) -> None:
        """Progress: what the main thread is about to do."""
        self._step, self._doing = step, doing
        self._marks += 1
        self._since = time.monotonic()
        if self._seconds is not None:
            # For code that hangs outside Python and lets no other thread run.
            last = self._seconds + 2 * GRACE_SECONDS
            faulthandler.dump_traceback_later(last, exit=True, file=sys.__stderr__)

    def _watch(self) -> None:
        while not self._left.wait(min(self._seconds / 10, 1)):
            if time.monotonic() - self._since > self._seconds:
                faulthandler.cancel_dump_traceback_later()
                self._write()
                time.sleep(GRACE_SECONDS)
                reports = self.reports()
                if self._rank == min(reports):
                    # Not sys.stderr: the display of progress, which may hang, stands in its place.
                    told = f"{PREFIX}{self.verdict(reports)}"
                    print(told, file=sys.__stderr__, flush=True)
                else:  # those that wait for this rank would end with an error of their own
                    time.sleep(GRACE_SECONDS)
                os._exit(HUNG)

    def _write(self) -> None:
        """This rank's file: its report, then the stacks of all threads."""
        frame = sys._current_frames()[threading.main_thread().ident]
        waits = any(part in frame.f_code.co_filename for part in _WAITING)
        report = Report(self._rank, self._step, self._doing, self._marks, waits)
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"rank_{self._rank}.txt").open("w") as file:
            print(json.dumps(asdict(report)), file=file, flush=True)
            faulthandler.dump_traceback(file)

    def reports(self) -> dict[int, Report]:
        """What all ranks wrote, by rank."""
        found = {}
        for path in self._folder.glob("rank_*.txt"):
            with suppress(ValueError, TypeError), path.open() as file:
                report = Report(**json.loads(file.readline()))
                found[report.rank] = report
        return found

    def verdict(self, reports: dict[int, Report]) -> str:
        """The rank that hangs, and where, in a sentence."""
        silent = [rank for rank in range(self._ranks) if rank not in reports]
        if silent:
            hung = f"rank {silent[0]} gave no sign of life"
        else:
            first = min(reports.values(), key=lambda r: (r.marks, r.waits, r.rank))
            hung = f"rank {first.rank} hangs in step {first.step}, {first.doing}"
        return (
            f"no progress for {self._seconds:g} seconds (train.watchdog_seconds): {hung}; the "
            f"stacks of all ranks are in {self._folder}"
        )
