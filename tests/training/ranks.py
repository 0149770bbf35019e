"""A run whose ranks are started one by one, as srun does it: each can be signalled, and each has
an exit code and output of its own."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.layouts.launch import ROOT
from tests.training.launch import Ended, children, kill, wait_for
from tests.training.tiny import environment

GENGRAM = ("-m", "gengram_megatron")


@dataclass
class Ranks:
    """The processes of a run, and where each writes what it says."""

    processes: list[subprocess.Popen]
    outputs: list[Path]

    def signal(self, rank: int, number: signal.Signals, helpers: bool = False) -> None:
        """To one rank; with helpers also to all processes that it started, as Slurm does."""
        family = children(self.processes[rank].pid) if helpers else []
        for pid in (self.processes[rank].pid, *family):
            os.kill(pid, number)

    def wait(self, seconds: float = 120) -> list[Ended]:
        """How each ended. Those that wait for one that is gone for longer are killed."""
        try:
            codes = [process.wait(seconds) for process in self.processes]
        finally:
            self.kill()
        return [
            Ended(code, path.read_text(), path.with_suffix(".err").read_text())
            for code, path in zip(codes, self.outputs, strict=True)
        ]

    def wait_for(self, condition, seconds: float = 120) -> None:
        wait_for(condition, self.processes[0], self.outputs[0].with_suffix(".err"), seconds)

    def kill(self) -> None:
        """Everything that is left of the run."""
        for process in self.processes:
            kill(process)


def start_ranks(
    count: int, words: list[str], folder: Path, program: tuple[str, ...] = GENGRAM
) -> Ranks:
    """`gengram WORDS` on so many ranks. Each writes to folder/<rank>.out and .err."""
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = Ranks([], [folder / f"{rank}.out" for rank in range(count)])
    for rank, path in enumerate(ranks.outputs):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = {name: str(value) for name, value in {**place, **meet}.items()}
        with path.open("w") as out, path.with_suffix(".err").open("w") as err:
            ranks.processes.append(
                subprocess.Popen(
                    [sys.executable, *program, *words],
                    cwd=ROOT,
                    env={**environment(), **own},
                    stdout=out,
                    stderr=err,
                )
            )
    return ranks
