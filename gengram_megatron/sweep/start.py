"""Starting the runs of a sweep that are not finished."""

import time
from pathlib import Path
from statistics import median

from rich.console import Console

from gengram_megatron.errors import UserError
from gengram_megatron.launch import slurm
from gengram_megatron.launch.job import Job
from gengram_megatron.launch.local import check_names, run_here
from gengram_megatron.launch.record import write_record
from gengram_megatron.launch.stop import StopRequests
from gengram_megatron.signals import REQUEUE
from gengram_megatron.training.progress import duration


def run_in_turn(jobs: list[Job]) -> int:
    """Run jobs one after the other; a failed one does not stop the rest. The exit code.

    A request to stop (see run_here) ends the run at hand, which saves, and the sweep with it; one
    that comes at a run's end keeps the next from starting.
    """
    console, seconds, failed = Console(highlight=False), [], []
    for job in jobs:
        check_names(job)
    with StopRequests() as requests:  # over all runs: one may come between two of them
        for number, job in enumerate(jobs, start=1):
            if requests.received:
                print(f"stopped before {job.run}, as it was told to; the same command goes on")
                return REQUEUE
            left = duration((len(jobs) - number + 1) * median(seconds)) if seconds else ""
            left = left and f", {left} left"
            console.rule(f"run {number} of {len(jobs)}: {job.run.name}{left}", characters="=")
            began = time.monotonic()
            write_record(job)
            code = run_here(job, requests)
            if code == REQUEUE:
                return REQUEUE
            if code:
                failed.append(job)
            seconds.append(time.monotonic() - began)
    for job in failed:
        print(f"failed: {job.run}")
    return 1 if failed else 0


def as_array(jobs: list[Job], folder: Path, at_a_time: int | None) -> str:
    """Submit jobs as one array, its script in a folder; the number of the array.

    The members of an array ask for the same machines, so the jobs must.
    """
    for job in jobs:
        if (job.config.launch, job.environment) != (jobs[0].config.launch, jobs[0].environment):
            raise UserError(
                f"{jobs[0].run.name} and {job.run.name} differ in launch or in what megatron needs "
                "of it, and cannot be one Slurm array: put them into sweeps of their own"
            )
    return slurm.submit(jobs, folder, at_a_time)
