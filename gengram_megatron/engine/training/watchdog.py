"""Ends a job in which a rank hangs, and says which rank and where.

Ranks wait for each other, so when one hangs, all of them stop. Each rank's watchdog then writes the
stacks of its threads to a file and reads the other ranks' files: the rank that hangs is the one
that wrote nothing, or made the least progress, or is not waiting for other ranks.
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
"""Exit code of every rank."""
GRACE_SECONDS = 5.0
"""Time for the other ranks to notice the hang and write their files."""
_WAITING = ("torch/distributed/", "p2p_communication.py", "param_and_grad_buffer.py")
"""If the innermost frame of a rank's main thread is in one of these files, the rank is waiting for
other ranks."""


@dataclass(frozen=True)
class Report:
    """The first line of a rank's file, as JSON.

    Attributes:
        doing: what the main thread was doing, in words.
        marks: calls of Watchdog.mark so far.
        waits: whether the main thread is waiting for other ranks.
    """

    rank: int
    step: int
    doing: str
    marks: int
    waits: bool


class Watchdog:
    """A context manager that watches the main thread from another thread.

    Args:
        seconds: time without a mark after which the job is ended. None: watch nothing.
        folder: where all ranks write their stacks; a new folder for each start of a run.
        rank, ranks: this rank and the number of ranks.
    """

    def __init__(self, seconds: float | None, folder: Path, rank: int, ranks: int):
        self._seconds, self._folder, self._rank, self._ranks = seconds, folder, rank, ranks
        self._step, self._doing, self._marks, self._since = 0, "starting", 0, time.monotonic()
        self._exited = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            threading.Thread(target=self._watch, args=(self._seconds,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._exited.set()
        faulthandler.cancel_dump_traceback_later()

    def mark(self, step: int, doing: str) -> None:
        """Records progress. doing: what the main thread is about to do."""
        self._step, self._doing = step, doing
        self._marks += 1
        self._since = time.monotonic()
        if self._seconds is not None and sys.__stderr__ is not None:  # None: it was closed (2>&-)
            # For native code that hangs without releasing the GIL: _watch cannot run then.
            timeout = self._seconds + 2 * GRACE_SECONDS
            faulthandler.dump_traceback_later(timeout, exit=True, file=sys.__stderr__)

    def _watch(self, seconds: float) -> None:
        while not self._exited.wait(min(seconds / 10, 1)):
            if time.monotonic() - self._since > seconds:
                faulthandler.cancel_dump_traceback_later()
                self._write()
                time.sleep(GRACE_SECONDS)
                reports = self.reports()
                if self._rank == min(reports):
                    # Not sys.stderr: the progress display replaces it, and may hang.
                    message = f"{PREFIX}{self.verdict(reports)}"
                    print(message, file=sys.__stderr__, flush=True)
                else:  # if this rank exited first, ranks that wait for it would fail on their own
                    time.sleep(GRACE_SECONDS)
                os._exit(HUNG)

    def _write(self) -> None:
        """Writes this rank's file: its report, then the stacks of all threads."""
        main = threading.main_thread().ident
        assert main is not None  # it has started
        frame = sys._current_frames()[main]
        waits = any(part in frame.f_code.co_filename for part in _WAITING)
        report = Report(self._rank, self._step, self._doing, self._marks, waits)
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"rank_{self._rank}.txt").open("w") as file:
            print(json.dumps(asdict(report)), file=file, flush=True)
            faulthandler.dump_traceback(file)

    def reports(self) -> dict[int, Report]:
        """Returns the reports that ranks have written, by rank."""
        reports = {}
        for path in self._folder.glob("rank_*.txt"):
            with suppress(ValueError, TypeError), path.open() as file:
                report = Report(**json.loads(file.readline()))
                reports[report.rank] = report
        return reports

    def verdict(self, reports: dict[int, Report]) -> str:
        """Returns a sentence that names the rank that hangs, and where it hangs."""
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
