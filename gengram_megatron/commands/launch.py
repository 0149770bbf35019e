"""The command `gengram launch`: starts a run with torchrun or Slurm."""

import os
import socket
import time
from contextlib import nullcontext
from pathlib import Path
from shlex import join, quote
from typing import Annotated

import typer

from gengram_megatron.config.command_line import ConfigFile, Overrides
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.data_set import check_data_sets_exist
from gengram_megatron.launch import local, slurm
from gengram_megatron.launch.job import Job, check_job, write_record
from gengram_megatron.launch.stop import StopRequests
from gengram_megatron.runs.store import check_load

Slurm = Annotated[bool, typer.Option("--slurm", help="Submit to Slurm with sbatch.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")]


def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes per node; sets launch.processes.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Number of machines; sets launch.nodes.")
    ] = None,
    use_slurm: Slurm = False,
    dry_run: DryRun = False,
) -> None:
    """Start a run with torchrun on this machine, or as a Slurm job.

    \b
      gengram launch configs/smoke/cpu.yaml
      gengram launch my_run.yaml --nproc 8
      gengram launch my_run.yaml --nodes 4 --nproc 8 launch.rendezvous=node1:29500
      gengram launch my_run.yaml --nodes 4 --nproc 8 --slurm launch.slurm.time=2-00:00:00

    Give the third command on each of the nodes. Permanent settings, such as account, partition,
    container and NCCL variables, belong in the section launch of the config;
    `gengram config --keys launch` lists them.

    In the run's folder, launches/ records for every start the whole config, the commit and
    uncommitted changes of the code, packages and environment, and logs/ has a file for each rank.
    If ranks fail, the first one is reported with its error.

    SIGTERM, SIGUSR1 or Ctrl-C make the run save and stop with exit code 75. On Slurm this happens
    automatically, launch.slurm.save_before seconds before the time limit; then the job goes back
    into the queue and resumes when it restarts.
    """
    words = list(overrides or [])
    words += [f"launch.processes={nproc}"] if nproc is not None else []
    words += [f"launch.nodes={nodes}"] if nodes is not None else []
    here = not (use_slurm or dry_run)
    with StopRequests() if here else nullcontext() as requests:
        job = check_job(load_config(config, words, Config), name_of_start(), use_slurm)
        if use_slurm:
            _with_slurm(job, dry_run)
        elif requests is None:
            _print_start(job)
        else:
            _here(job, config, requests)


def name_of_start() -> str:
    """Returns a name for a start made of time, machine and process, because the nodes of a run may
    all start it in the same second."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{os.getpid()}"


def _with_slurm(job: Job, dry_run: bool) -> None:
    if dry_run:
        print(slurm.script([job], job.run / "logs"), end="")
        return
    number = slurm.submit([job], job.record)
    print(f"job {number} is in the queue; its logs: {job.run / 'logs'}/job-{number}*")


def _print_start(job: Job) -> None:
    print(f"# records config, code version and environment in {job.record}, and starts")
    print(*(f"{name}={quote(value)}" for name, value in local.environment(job).items()), end="")
    print(" torchrun", join(local.torchrun_words(job)))


def _here(job: Job, config_file: Path, requests: StopRequests) -> None:
    local.check_names(job)
    if job.config.launch.nodes == 1:  # with several nodes, the ranks check this together
        check_load(job.config)
        check_data_sets_exist(job.config, config_file)
    write_record(job)
    raise typer.Exit(local.run_here(job, requests))
