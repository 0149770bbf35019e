"""Start training commands as real processes, and kill them."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.layouts.launch import ROOT, launch
from tests.training.commands import run_all
from tests.training.tiny import environment


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str


def python(processes: int) -> list[str]:
    """Python, or torchrun where there is more than one process."""
    if processes == 1:
        return [sys.executable]
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *runner]


def run_jobs(processes: int, jobs: dict[str, list[str]], folder: Path) -> dict[str, list[Ended]]:
    """Run jobs (name: words after `gengram`), one after the other; what each rank said, by job."""
    folder.mkdir()
    launch(processes, run_all, jobs, folder, seconds=2000)
    return {
        name: [
            Ended(**json.loads((folder / f"{name}.{rank}.json").read_text()))
            for rank in range(processes)
        ]
        for name in jobs
    }


def start(processes: int, words: list[str], output: Path) -> subprocess.Popen:
    """`gengram WORDS` on so many ranks, in the background, its output to a file."""
    script = ["-m", "gengram_megatron"]
    with output.open("w") as file:
        return subprocess.Popen(
            [*python(processes), *script, *words],
            cwd=ROOT,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a process and all that it started (torchrun's ranks have sessions of their
    own)."""
    for pid in [process.pid, *children(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def children(pid: int) -> list[int]:
    """The processes that a process started, and theirs."""
    parents = _parents()
    family = [pid]
    for member in family:  # grows while it is walked
        family += [child for child, parent in parents.items() if parent == member]
    return family[1:]


def _parents() -> dict[int, int]:
    """The parent of every process of this machine."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # pid (name, which may hold anything) state parent ...
            found[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return found


def wait_for(condition, process: subprocess.Popen, output: Path, seconds: float = 400) -> None:
    """Until a condition holds; fails if the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early:\n{output.read_text()[-8000:]}"
        assert time.monotonic() < end, f"waited too long:\n{output.read_text()[-8000:]}"
        time.sleep(0.01)


NAMELESS = ("unshare", "--uts", "sh", "-c", 'hostname no-such-host && exec "$@"', "sh")
"""Gives a command a machine whose own name does not resolve; only root may."""


def gengram(*words: str, before: tuple[str, ...] = (), **variables: str) -> Ended:
    """A `gengram` command in a process of its own, with variables on top of the environment, and
    words before the command."""
    done = subprocess.run(
        [*before, sys.executable, "-m", "gengram_megatron", *words],
        cwd=ROOT,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return Ended(done.returncode, done.stdout, done.stderr)
