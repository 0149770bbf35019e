"""The command `gengram launch`."""

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

Slurm = Annotated[bool, typer.Option("--slurm", help="Give it to sbatch.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done; do nothing.")]


def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes of each node: launch.processes.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines: launch.nodes.")] = None,
    use_slurm: Slurm = False,
    dry_run: DryRun = False,
) -> None:
    """Start a run: torchrun on this machine, or a job of Slurm.

    \b
      gengram launch configs/smoke/cpu.yaml
      gengram launch my_run.yaml --nproc 8
      gengram launch my_run.yaml --nodes 4 --nproc 8 launch.rendezvous=node1:29500
      gengram launch my_run.yaml --nodes 4 --nproc 8 --slurm launch.slurm.time=2-00:00:00

    The third form is given on each of the nodes. Settings that stay, such as account, partition,
    container and variables of NCCL, belong into the section launch of the config;
    `gengram config --keys` lists them.

    The run's folder keeps, in launches/, the config with all its values, commit and changes of
    the code, packages and environment of every start; in logs/, a file for each rank. The first
    rank that failed is named with its error.

    SIGTERM, SIGUSR1 or Ctrl-C let the run save and stop, with exit code 75. On Slurm that
    happens by itself launch.slurm.save_before seconds before the time limit; then the job goes
    back into the queue and on from there.
    """
    words = list(overrides or [])
    words += [f"launch.processes={nproc}"] if nproc is not None else []
    words += [f"launch.nodes={nodes}"] if nodes is not None else []
    here = not (use_slurm or dry_run)
    with StopRequests() if here else nullcontext() as requests:
        job = check_job(load_config(config, words, Config), name_of_start(), use_slurm)
        if use_slurm:
            _with_slurm(job, dry_run)
        else:
            _here(job, config, dry_run, requests)


def name_of_start() -> str:
    """The name of a start: when, on which machine, and by which process, as the nodes of a run may
    all start it in the same second."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{os.getpid()}"


def _with_slurm(job: Job, dry_run: bool) -> None:
    if dry_run:
        print(slurm.script([job], job.run / "logs"), end="")
        return
    number = slurm.submit([job], job.record)
    print(f"job {number} is in the queue; its logs: {job.run / 'logs'}/job-{number}*")


def _here(job: Job, config_file: Path, dry_run: bool, requests: StopRequests | None) -> None:
    if dry_run:
        print(f"# keeps config, code version and environment in {job.record}, and starts")
        print(*(f"{name}={quote(value)}" for name, value in local.environment(job).items()), end="")
        print(" torchrun", join(local.torchrun_words(job)))
        return
    local.check_names(job)
    if job.config.launch.nodes == 1:  # several nodes tell each other, once they have met
        check_data_sets_exist(job.config, config_file)
    write_record(job)
    raise typer.Exit(local.run_here(job, requests))
