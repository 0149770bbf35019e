"""`gengram` commands on DeepSpeed, one after the other, each on ranks of its own.

All ranks are forked from one process that has imported DeepSpeed, which takes longer than a tiny
run. What a run leaves behind in its processes (gloo's threads say) does not slow the next ones.
"""

import json
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.layouts.launch import launch
from tests.training.commands import run_all
from tests.training.launch import Ended


@dataclass(frozen=True)
class Job:
    """A command: the words after `gengram`."""

    words: list[str]
    processes: int = 2
    half_of: Path | None = None
    """A run of four steps, from whose checkpoint in the middle this one goes on."""
    broken: Callable[[], None] | None = None
    """Called in each rank first, to break something in it."""


def run(jobs: dict[str, Job], runs: Path, folder: Path) -> dict[str, list[Ended]]:
    """What each rank of each job said. runs: where a job's run lies, under its name."""
    folder.mkdir()
    launch(1, _run_all, jobs, runs, folder, seconds=2000)
    return {
        name: [
            Ended(**json.loads((folder / f"{name}.{rank}.json").read_text()))
            for rank in range(job.processes)
        ]
        for name, job in jobs.items()
    }


def _run_all(jobs: dict[str, Job], runs: Path, folder: Path) -> None:
    from gengram_megatron.engine.training.engines.deepspeed import import_deepspeed

    import_deepspeed()
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401, by its first engine

    fork = multiprocessing.get_context("fork")
    for name, job in jobs.items():
        if job.half_of is not None:
            shutil.copytree(job.half_of, runs / name)
            shutil.rmtree(runs / name / "checkpoints" / "step_00000004")
        launch(job.processes, _run, name, job, folder, context=fork)


def _run(name: str, job: Job, folder: Path) -> None:
    if job.broken is not None:
        job.broken()
    run_all({name: job.words}, folder)
