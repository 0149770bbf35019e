"""The command `gengram sweep`: lists the runs of a sweep, and starts those that are not finished."""

import json
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console

from gengram_megatron.commands.launch import DryRun, Slurm, name_of_start
from gengram_megatron.commands.plan import smallest_world
from gengram_megatron.config.command_line import ConfigFile, Overrides
from gengram_megatron.config.layout import check_layout
from gengram_megatron.errors import UserError
from gengram_megatron.files import check_writable
from gengram_megatron.launch import slurm
from gengram_megatron.launch.job import Job, check_job, write_record
from gengram_megatron.launch.local import check_names, run_here
from gengram_megatron.launch.slurm import queue_states
from gengram_megatron.launch.stop import StopRequests
from gengram_megatron.runs.progress import duration
from gengram_megatron.show import print_table, print_text
from gengram_megatron.signals import REQUEUE
from gengram_megatron.sweep import results
from gengram_megatron.sweep.results import State, read_state
from gengram_megatron.sweep.runs import Runs, read_sweep


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


def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    list_runs: Annotated[
        bool, typer.Option("--list", help="Show every run: differences, folder, how far it is.")
    ] = False,
    launch: Annotated[
        bool, typer.Option("--launch", help="Start what is not finished, one after the other.")
    ] = False,
    use_slurm: Slurm = False,
    collect: Annotated[
        bool, typer.Option("--results", help="Collect validation losses: table, files, figure.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The table of --list or --results for programs.")
    ] = False,
) -> None:
    """Run one config with different settings, and compare.

    CONFIG is the config that all runs share, with one section more:

    \b
        base: ../base/moe_1.2b.yaml
        run: {dir: runs/windows}          # a folder for each run is made in it
        sweep:
          grid:                           # a run for every combination
            model.gengram.layers: [[10], [3, 6, 10]]
            model.gengram.window: [null, 6, 21]
          runs:                           # and these
            baseline: {model.gengram.enabled: false}
          seeds: [1, 2, 3]                # every run with each; without it once
          at_a_time: 4                    # of a Slurm array; without it all

    \b
      gengram sweep configs/sweeps/windows_cpu.yaml                      # the same as --list
      gengram sweep configs/sweeps/windows_cpu.yaml --launch             # on this machine
      gengram sweep configs/sweeps/windows_50b_8k.yaml --launch --slurm  # as an array of jobs
      gengram sweep configs/sweeps/windows_cpu.yaml --results

    A finished run is not run again, one in Slurm's queue is left there, and one that was cut goes
    on, so the same command also continues a sweep. Words of the form key=value go to all runs. How
    runs start is said in the section launch, as for `gengram launch`.

    --results writes results.csv, results.json and results.png into the folder of the sweep: the
    loss of the last validation of every finished run, over the first key of the grid. The other
    keys give lines of their own, and runs without that key are horizontal lines.
    """
    if as_json and (launch or dry_run):
        raise UserError("--json is for --list and --results; leave out --launch and --dry-run")
    found = read_sweep(config, list(overrides or []))
    if collect and found.folder.exists():  # where it does not, there are no results yet
        for file in results.files(found.folder):
            check_writable(file, "--results:")
    code = 0
    if launch or dry_run:
        code = _start(found, use_slurm, dry_run)
    if collect:
        _collect(found, config, as_json)
    elif list_runs or not (launch or dry_run):
        _show(found, _states(found), as_json)
    raise typer.Exit(code)


def _states(found: Runs, to_start: bool = False) -> list[State]:
    """How far each run is. Their layouts are checked on as few processes as they need, because
    results may be read on a machine other than the one that trains.

    to_start: runs are to be started, so Slurm must say which are in its queue already.
    """
    configs = [run.config for run in found.runs]
    try:
        queue = queue_states(configs)
    except UserError:
        if to_start:
            raise
        queue = {}
    return [
        read_state(one, check_layout(one, smallest_world(one)).steps, queue.get(one.run.dir, ""))
        for one in configs
    ]


def _left(found: Runs, use_slurm: bool) -> tuple[list[Job], list[State]]:
    """The jobs that are neither finished nor in Slurm's queue, and how far all runs are; refuses
    folders whose runs had other settings."""
    name = name_of_start()
    jobs = [check_job(run.config, name, use_slurm) for run in found.runs]
    states = _states(found, to_start=True)
    problems = [
        f"{job.run} {state.objection}; remove the folder, or give the sweep another run.dir"
        for job, state in zip(jobs, states)
        if state.objection
    ]
    if problems:
        raise UserError("\n".join(problems))
    left = [job for job, state in zip(jobs, states) if not (state.finished or state.queue)]
    return left, states


def _start(found: Runs, use_slurm: bool, dry_run: bool) -> int:
    """Start the runs that are not finished; the exit code."""
    jobs, states = _left(found, use_slurm)
    finished = sum(state.finished for state in states)
    queued = len(states) - finished - len(jobs)
    in_queue = f", {queued} in Slurm's queue" if queued else ""
    print(f"{len(states)} runs, {finished} finished{in_queue}")
    if not jobs:
        return 0
    if dry_run:
        _say_what_would_start(found, jobs, use_slurm)
    elif use_slurm:
        folder = found.folder.absolute() / "launches" / jobs[0].name
        number = as_array(jobs, folder, found.sweep.at_a_time)
        print(f"job {number} is in the queue, {len(jobs)} runs; its script and logs: {folder}")
    else:
        return run_in_turn(jobs)
    return 0


def _say_what_would_start(found: Runs, jobs: list[Job], use_slurm: bool) -> None:
    if use_slurm:
        folder = found.folder.absolute() / "launches" / jobs[0].name
        print(slurm.script(jobs, folder, found.sweep.at_a_time), end="")
    else:
        print(*(f"would run {job.run}" for job in jobs), sep="\n")


def _collect(found: Runs, path: Path, as_json: bool) -> None:
    """Print the table, and write the files and the figure."""
    rows = _show(found, _states(found), as_json)
    if all(row["loss"] is None for row in rows):
        raise UserError(f"{path}: no run of this sweep is finished; start them with --launch")
    results.write_files(rows, found.folder)
    from gengram_megatron.sweep.plot import plot_results

    *_, picture = results.files(found.folder)
    plot_results(rows, next(iter(found.sweep.grid), None), picture)
    if not as_json:
        print("written:", *results.files(found.folder))


def _show(found: Runs, states: list[State], as_json: bool) -> list[results.Row]:
    """Print the table, and beneath it why a run could not be read; the rows."""
    rows = results.rows(found.runs, states)
    if as_json:
        print(json.dumps(rows, indent=1))
        return rows
    print_table(results.shown(rows, f"{len(rows)} runs, each in {found.folder}/<run>"))
    for row, state in zip(rows, states):
        if state.unreadable:
            print_text(f"{row['folder']} {state.objection}")
    return rows
