"""Runs torchrun on this machine, alone or as one of several nodes."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from gengram_megatron.errors import EXIT_CODE, NOT_FINITE, PREFIX, UserError, print_message
from gengram_megatron.launch.job import RANK_MODULE, Job, log_file
from gengram_megatron.launch.stop import StoppedBeforeRanks, StopRequests
from gengram_megatron.signals import REQUEUE

if TYPE_CHECKING:  # commands that start nothing need not wait for torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure


def torchrun_words(job: Job) -> list[str]:
    """Returns the command-line arguments of torchrun."""
    launch = job.config.launch
    # By default torchrun has the ranks meet at the machine's own name, which may not resolve.
    rendezvous = ["--standalone", "--local-addr=127.0.0.1"]
    if launch.nodes > 1:
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={launch.rendezvous}"]
        rendezvous += [f"--rdzv-id={job.run.name}"]
    return [
        f"--nnodes={launch.nodes}",
        f"--nproc-per-node={job.processes}",
        *rendezvous,
        f"--log-dir={logs_folder(job) / 'torchrun'}",  # used for its error files only
        "--signals-to-handle=SIGHUP,SIGQUIT",  # the others are forwarded, so that the run saves
        *("-m", RANK_MODULE, str(logs_folder(job)), "train", str(job.config_file)),
    ]


def check_names(job: Job) -> None:
    """Raises UserError if the nodes of a job could not find each other. torchrun would try for ten
    minutes and then fail with a traceback."""
    launch = job.config.launch
    if launch.nodes == 1:
        return
    assert launch.rendezvous is not None  # check_job refuses several nodes without it
    host, _, _ = launch.rendezvous.rpartition(":")
    if not _resolves(host):
        raise UserError(
            f"launch.rendezvous is {launch.rendezvous}, but this machine cannot resolve the name "
            f"{host}: give the name or the address of one of the nodes"
        )
    if not _resolves(name := socket.getfqdn()):
        raise UserError(
            f"launch.nodes is {launch.nodes}, but this machine cannot resolve its own name {name}, "
            "by which the other nodes connect to it: give it an address in DNS or in /etc/hosts of "
            "every node"
        )


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def logs_folder(job: Job) -> Path:
    """Returns the folder of the ranks' logs."""
    return job.run / "logs" / job.name


def environment(job: Job) -> dict[str, str]:
    """Returns the environment variables of the processes. OMP_NUM_THREADS is always set for several
    processes, because torchrun would otherwise set it to 1 with a warning."""
    threads = {"OMP_NUM_THREADS": "1"} if job.processes > 1 else {}
    given = {name: os.environ[name] for name in threads if name in os.environ}
    return {**threads, **given, **job.environment}


def run_here(job: Job, requests: StopRequests) -> int:
    """Runs a job to its end, shows its first rank's log, and returns the exit code.

    SIGTERM, SIGUSR1 and Ctrl-C make the run save and stop; a second Ctrl-C ends it immediately.
    Both give the exit code REQUEUE, as does a request that comes before the run has ranks.

    Args:
        requests: entered by the caller, so that requests during its preparations count too.
    """
    try:
        with requests.passed_on():
            return _run_torchrun(job, requests)
    except StoppedBeforeRanks:
        return _stopped_before_training(job)


def _run_torchrun(job: Job, requests: StopRequests) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # Failures are reported below, in fewer words than torchrun's.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    first_log = _show_first_log(logs_folder(job), job.processes)
    try:
        with _variables(environment(job)), first_log:
            run(parse_args(torchrun_words(job)))
            return 0
    except ChildFailedError as error:
        failed = error
    return _explain(failed, job, requests)


def _stopped_before_training(job: Job) -> int:
    print(
        f"{job.run}: ended before training, as requested; nothing was lost, and the same command "
        "continues"
    )
    return REQUEUE


def _first_failure(error: "ChildFailedError") -> tuple[int, "ProcessFailure"]:
    """Returns the rank that failed first, and its failure. A rank that reports its own error is
    preferred to ranks that lost their connection to it, because failure times have a resolution of
    only one second."""
    reporting_codes = (EXIT_CODE, NOT_FINITE)
    reporting = [item for item in error.failures.items() if item[1].exitcode in reporting_codes]
    return reporting[0] if reporting else error.get_first_failure()


def _explain(error: "ChildFailedError", job: Job, requests: StopRequests) -> int:
    """Reports which rank failed first, and why. Returns the exit code."""
    rank, failure = _first_failure(error)
    if requests.at_once and failure.exitcode == -signal.SIGKILL:
        print(
            f"{job.run}: ended immediately without saving, as requested; the same command resumes "
            "from the last checkpoint"
        )
        return REQUEUE
    if requests.received and failure.exitcode == -signal.SIGTERM:
        return _stopped_before_training(job)
    if failure.exitcode == REQUEUE:
        if not any(job.run.glob("checkpoints/*")):  # the request came before the first step
            return _stopped_before_training(job)
        print(f"{job.run}: saved and stopped, as requested; the same command resumes from there")
        return REQUEUE
    log = log_file(logs_folder(job), rank)
    if failure.exitcode in (EXIT_CODE, NOT_FINITE):
        _show_other_messages(log)
        return failure.exitcode
    why = f"exit code {failure.exitcode}"
    if failure.exitcode < 0:
        why = f"killed by {signal.Signals(-failure.exitcode).name}"
    elif isinstance(failure.message, dict):  # as @record wrote it
        why = failure.message["message"]
    size = job.layout.world_size
    print_message(f"rank {rank} of {size} failed first: {why}")
    print(f"its log: {log}", file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else 1


@contextmanager
def _variables(wanted: dict[str, str]) -> Iterator[None]:
    """Sets environment variables of this process, which torchrun passes on to its own."""
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _show_first_log(logs: Path, processes: int) -> Iterator[None]:
    """Shows the log of this node's first rank while it is written."""
    finished = Event()
    thread = Thread(target=_follow, args=(logs, processes, finished))
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _follow(logs: Path, processes: int, finished: Event) -> None:
    while len(_rank_logs(logs)) < processes and not finished.wait(0.1):
        pass
    if not (files := _rank_logs(logs)):
        return
    with files[0].open(errors="replace") as log:
        while True:
            last = finished.wait(0.1)
            try:
                sys.stdout.write(log.read())
                sys.stdout.flush()
            except OSError as error:  # such as a pipe that nobody reads, or a full disk
                print_message(
                    f"{error.strerror}: the run continues, but is not shown; see {files[0]}"
                )
                return
            if last:
                return


def _show_other_messages(log: Path) -> None:
    """Shows the error messages in a rank's log that are not in the first rank's log. Most errors
    are found by all ranks, and the first rank's log has been shown already."""
    shown = _rank_logs(log.parent)[0].read_text(errors="replace")
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith(PREFIX) and line not in shown:
            print(line, file=sys.stderr)


def _rank_logs(logs: Path) -> list[Path]:
    """Returns the logs of this node's ranks that have started, ordered by rank."""
    return sorted(logs.glob("rank-*.log"), key=lambda log: int(log.stem.removeprefix("rank-")))
