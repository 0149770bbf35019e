"""The command `gengram sweep`: lists the runs of a sweep, starts the unfinished ones, and collects
their results."""

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
    """Runs jobs one after the other, also after a failed one, and returns the exit code.

    A request to stop (see run_here) ends the current run, which saves, and the sweep with it. A
    request at the end of a run keeps the next one from starting.
    """
    console = Console(highlight=False)
    seconds: list[float] = []
    failed: list[Job] = []
    for job in jobs:
        check_names(job)
    with StopRequests() as requests:  # around all runs: a request may come between two of them
        for number, job in enumerate(jobs, start=1):
            if requests.received:
                print(f"stopped before {job.run}, as requested; the same command continues")
                return REQUEUE
            remaining = duration((len(jobs) - number + 1) * median(seconds)) if seconds else ""
            remaining = remaining and f", {remaining} left"
            console.rule(f"run {number} of {len(jobs)}: {job.run.name}{remaining}", characters="=")
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
    """Submits jobs as one Slurm array, writes its script into a folder, and returns its job number.

    All members of an array request the same resources. Raises UserError if the jobs differ in
    them.
    """
    for job in jobs:
        if (job.config.launch, job.environment) != (jobs[0].config.launch, jobs[0].environment):
            raise UserError(
                f"{jobs[0].run.name} and {job.run.name} differ in launch or in the environment that "
                "megatron needs, so they cannot be one Slurm array: put them into separate sweeps"
            )
    return slurm.submit(jobs, folder, at_a_time)


def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    list_runs: Annotated[
        bool, typer.Option("--list", help="Show every run: differences, folder, progress.")
    ] = False,
    launch: Annotated[
        bool, typer.Option("--launch", help="Start the unfinished runs, one after the other.")
    ] = False,
    use_slurm: Slurm = False,
    collect: Annotated[
        bool, typer.Option("--results", help="Collect validation losses: table, files, figure.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the table of --list or --results as JSON.")
    ] = False,
) -> None:
    """Run variants of one config, and compare their results.

    CONFIG is the config that all runs share, with the additional section sweep:

    \b
        base: ../base/moe_1.2b.yaml
        run: {dir: runs/windows}          # gets a subfolder for each run
        sweep:
          grid:                           # a run for every combination
            model.gengram.layers: [[10], [3, 6, 10]]
            model.gengram.window: [null, 6, 21]
          runs:                           # further runs
            baseline: {model.gengram.enabled: false}
          seeds: [1, 2, 3]                # run each with all seeds; default: only once
          at_a_time: 4                    # in a Slurm array; default: all

    \b
      gengram sweep configs/sweeps/windows_cpu.yaml                      # the same as --list
      gengram sweep configs/sweeps/windows_cpu.yaml --launch             # on this machine
      gengram sweep configs/sweeps/windows_50b_8k.yaml --launch --slurm  # as an array of jobs
      gengram sweep configs/sweeps/windows_cpu.yaml --results

    Finished runs are not run again, runs in Slurm's queue are left there, and interrupted runs
    resume, so the same command also continues a sweep. Arguments of the form key=value apply to all
    runs. The section launch decides how runs start, as for `gengram launch`.

    --results writes results.csv, results.json and results.png into the folder of the sweep: the
    loss of the last validation of every finished run. The figure plots it over the first key of the
    grid, with a line for each setting of the other keys, and a horizontal line for each run that
    does not set that key.
    """
    if as_json and (launch or dry_run):
        raise UserError("--json is for --list and --results; leave out --launch and --dry-run")
    runs = read_sweep(config, list(overrides or []))
    if collect and runs.folder.exists():  # if it does not exist, there are no results yet
        for file in results.files(runs.folder):
            check_writable(file, "--results:")
    code = 0
    if launch or dry_run:
        code = _start(runs, use_slurm, dry_run)
    if collect:
        _collect(runs, config, as_json)
    elif list_runs or not (launch or dry_run):
        _show(runs, _states(runs), as_json)
    raise typer.Exit(code)


def _states(runs: Runs, to_start: bool = False) -> list[State]:
    """Returns the progress of each run. Layouts are checked on as few processes as they need,
    because results may be read on a different machine from the one that trains.

    Args:
        to_start: whether runs will be started. Then it is an error if Slurm's queue cannot be read,
            because queued runs must not be started again.
    """
    configs = [run.config for run in runs.runs]
    try:
        queue = queue_states(configs)
    except UserError:
        if to_start:
            raise
        queue = {}
    return [
        read_state(
            config,
            check_layout(config, smallest_world(config)).steps,
            queue.get(config.run.dir, ""),
        )
        for config in configs
    ]


def _unfinished_jobs(runs: Runs, use_slurm: bool) -> tuple[list[Job], list[State]]:
    """Returns the jobs that are neither finished nor in Slurm's queue, and the progress of all
    runs. Raises UserError if a run's folder holds a run with other settings."""
    name = name_of_start()
    jobs = [check_job(run.config, name, use_slurm) for run in runs.runs]
    states = _states(runs, to_start=True)
    problems = [
        f"{job.run} {state.objection}; remove the folder, or give the sweep another run.dir"
        for job, state in zip(jobs, states)
        if state.objection
    ]
    if problems:
        raise UserError("\n".join(problems))
    unfinished = [job for job, state in zip(jobs, states) if not (state.finished or state.queue)]
    return unfinished, states


def _start(runs: Runs, use_slurm: bool, dry_run: bool) -> int:
    """Starts the unfinished runs, and returns the exit code."""
    jobs, states = _unfinished_jobs(runs, use_slurm)
    finished = sum(state.finished for state in states)
    queued = len(states) - finished - len(jobs)
    in_queue = f", {queued} in Slurm's queue" if queued else ""
    print(f"{len(states)} runs, {finished} finished{in_queue}")
    if not jobs:
        return 0
    if dry_run:
        _print_dry_run(runs, jobs, use_slurm)
    elif use_slurm:
        folder = runs.folder.absolute() / "launches" / jobs[0].name
        number = as_array(jobs, folder, runs.sweep.at_a_time)
        print(f"job {number} is in the queue, {len(jobs)} runs; its script and logs: {folder}")
    else:
        return run_in_turn(jobs)
    return 0


def _print_dry_run(runs: Runs, jobs: list[Job], use_slurm: bool) -> None:
    if use_slurm:
        folder = runs.folder.absolute() / "launches" / jobs[0].name
        print(slurm.script(jobs, folder, runs.sweep.at_a_time), end="")
    else:
        print(*(f"would run {job.run}" for job in jobs), sep="\n")


def _collect(runs: Runs, path: Path, as_json: bool) -> None:
    """Prints the table of results, and writes the files and the figure."""
    rows = _show(runs, _states(runs), as_json)
    if all(row["loss"] is None for row in rows):
        raise UserError(f"{path}: no run of this sweep is finished; start them with --launch")
    results.write_files(rows, runs.folder)
    from gengram_megatron.sweep.plot import plot_results

    *_, picture = results.files(runs.folder)
    plot_results(rows, next(iter(runs.sweep.grid), None), picture)
    if not as_json:
        print("written:", *results.files(runs.folder))


def _show(runs: Runs, states: list[State], as_json: bool) -> list[results.Row]:
    """Prints the table of runs, and below it why a run could not be read. Returns the rows."""
    rows = results.rows(runs.runs, states)
    if as_json:
        print(json.dumps(rows, indent=1))
        return rows
    print_table(results.shown(rows, f"{len(rows)} runs, each in {runs.folder}/<run>"))
    for row, state in zip(rows, states):
        if state.unreadable:
            print_text(f"{row['folder']} {state.objection}")
    return rows
