"""A run whose ranks are started one by one, as srun does it: each can be signalled, and each has
an exit code and output of its own."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.forked import context
from tests.training.launch import Ended, children


@dataclass
class Ranks:
    """The processes of a run, and where each writes what it says."""

    processes: list
    outputs: list[Path]

    def signal(self, rank: int, number: signal.Signals, helpers: bool = False) -> None:
        """To one rank; with helpers also to all processes that it started, as Slurm does."""
        family = children(self.processes[rank].pid) if helpers else []
        for pid in (self.processes[rank].pid, *family):
            os.kill(pid, number)

    def wait(self, seconds: float = 240) -> list[Ended]:
        """How each ended; those that take longer are killed."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0))
        self.kill()
        return self.said()

    def wait_for(self, condition: Callable[[], object], seconds: float = 240) -> None:
        """Until a condition holds; fails if the first rank ends before."""
        end = time.monotonic() + seconds
        while not condition():
            assert not self.ended(), self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)

    def ended(self) -> bool:
        """Whether the first rank has."""
        return not self.processes[0].is_alive()

    def kill(self) -> None:
        """Everything that is left of the run."""
        for process in self.processes:
            for pid in [*children(process.pid), process.pid]:
                if process.is_alive():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.join()

    def said(self) -> list[Ended]:
        """Exit codes (of a signal: negative; None: goes on) and outputs."""
        return [
            Ended(process.exitcode, out.read_text(), out.with_suffix(".err").read_text())
            for process, out in zip(self.processes, self.outputs, strict=True)
        ]


def start_ranks(
    count: int, words: list[str], folder: Path, before: Callable[[], None] | None = None
) -> Ranks:
    """`gengram WORDS` on so many ranks. Each writes to folder/<rank>.out and .err.

    before: called in each process first, to break something in it.
    """
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = Ranks([], [folder / f"{rank}.out" for rank in range(count)])
    for rank, path in enumerate(ranks.outputs):
        path.touch()
        path.with_suffix(".err").touch()
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        process = context.Process(target=_rank, args=({**meet, **place}, words, path, before))
        process.start()
        ranks.processes.append(process)
    return ranks


def _rank(environment: dict[str, str], words: list[str], path: Path, before) -> None:
    from gengram_megatron.commands.cli import main

    for file, descriptor in ((path, 1), (path.with_suffix(".err"), 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.update({**environment, "COLUMNS": "400"})
    multiprocessing.set_start_method("fork", force=True)  # the default where nothing was forked
    sys.argv = ["gengram", *words]
    if before is not None:
        before()
    main()
