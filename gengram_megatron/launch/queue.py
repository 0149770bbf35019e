"""What the login node of a Slurm cluster knows: its partitions, and the jobs in its queue."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from gengram_megatron.config.launch import UNLIMITED, Slurm
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from gengram_megatron.launch.job import SLURM_FILE, seconds

SECONDS = 30
"""That Slurm may take to answer."""


def partition_problems(slurm: Slurm) -> Iterator[str]:
    """A sentence for each reason why the partition cannot take a job. sbatch refuses a name it does
    not know as well, but puts a job whose limit is too long into the queue, where it stays."""
    limits = _partitions()
    if not limits:  # nothing is known of them here
        return
    names = slurm.partition.split(",") if slurm.partition else [n for n in limits if n[-1] == "*"]
    limits = {name.rstrip("*"): limit for name, limit in limits.items()}
    names = [name.rstrip("*") for name in names]
    for name in names:
        if name not in limits:
            yield (
                f"launch.slurm.partition is {slurm.partition}, and this cluster has no partition "
                f"{name}; it has {', '.join(sorted(limits))}"
            )
            return
    longest = max((seconds(limits[name]) for name in names), default=float("inf"))
    # A quality of service may allow more than the partition does.
    if slurm.time is not None and slurm.qos is None and seconds(slurm.time) > longest:
        allowed = " and ".join(f"{name} allows {limits[name]}" for name in names)
        yield (
            f"launch.slurm.time is {slurm.time}, and the partition {allowed}: the job would wait "
            "for ever; ask for less, or give another launch.slurm.partition"
        )


def _partitions() -> dict[str, str]:
    """The time limit of each partition, by its name; the default's ends in *. Empty where Slurm
    does not say."""
    done = _ask("sinfo", "--all", "--noheader", "-o", "%P %l")
    found = dict(line.split() for line in done.stdout.splitlines()) if done.returncode == 0 else {}
    return {name: UNLIMITED[0] if limit == "n/a" else limit for name, limit in found.items()}


def recorded_job(run: Path) -> str | None:
    """The number under which the newest start of a run was given to Slurm, such as 17 or, in an
    array, 17_2; None where it was not."""
    files = [*run.glob(f"launches/*/{SLURM_FILE}")]
    newest = max(files, key=lambda file: file.stat().st_mtime_ns, default=None)
    return newest.read_text().strip() if newest else None


def queue_states(runs: list[Config]) -> dict[str, str]:
    """The state of each run that is in Slurm's queue, such as PENDING or RUNNING, by its run.dir.

    Raises UserError where Slurm does not say, as on a machine that has lost its controller.
    """
    numbers = {one.run.dir: number for one in runs if (number := recorded_job(Path(one.run.dir)))}
    if not numbers or shutil.which("squeue") is None:
        return {}
    jobs = ",".join(sorted({number.partition("_")[0] for number in numbers.values()}))
    done = _ask(
        *("squeue", "--noheader", "--array", f"--user={os.getuid()}", f"--jobs={jobs}"),
        *("-o", "%i %T"),
    )
    # Slurm forgets a job minutes after its end.
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(
            "squeue does not say which runs are in the queue already "
            f"({' '.join(done.stderr.split())}): try again when Slurm answers"
        )
    states = dict(line.split() for line in done.stdout.splitlines())
    return {run: states[number] for run, number in numbers.items() if number in states}


def _ask(*command: str) -> subprocess.CompletedProcess:
    """What one of Slurm's commands says; a command that is missing or hangs has failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
