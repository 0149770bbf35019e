"""torchrun on this machine, alone or as one node of several."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from gengram_megatron.errors import EXIT_CODE, NOT_FINITE, PREFIX, UserError, print_message
from gengram_megatron.launch.job import RANK_MODULE, Job, log_file
from gengram_megatron.launch.stop import StoppedBeforeRanks, StopRequests
from gengram_megatron.signals import REQUEUE


def torchrun_words(job: Job) -> list[str]:
    """The words after `torchrun`."""
    launch = job.config.launch
    # torchrun would tell the ranks to meet at the machine's own name, which need not resolve.
    meet = ["--standalone", "--local-addr=127.0.0.1"]
    if launch.nodes > 1:
        meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={launch.rendezvous}"]
        meet += [f"--rdzv-id={job.run.name}"]
    return [
        f"--nnodes={launch.nodes}",
        f"--nproc-per-node={job.processes}",
        *meet,
        f"--log-dir={logs_folder(job) / 'torchrun'}",  # of its error files only
        "--signals-to-handle=SIGHUP,SIGQUIT",  # the others are forwarded, so that the run saves
        *("-m", RANK_MODULE, str(logs_folder(job)), "train", str(job.config_file)),
    ]


def check_names(job: Job) -> None:
    """UserError where the nodes of a job could not find each other. torchrun would look for ten
    minutes and then fail with a traceback."""
    launch = job.config.launch
    if launch.nodes == 1:
        return
    host, _, _ = launch.rendezvous.rpartition(":")
    if not _resolves(host):
        raise UserError(
            f"launch.rendezvous is {launch.rendezvous}, and this machine cannot resolve the name "
            f"{host}: give the name or the address of one of the nodes"
        )
    if not _resolves(own := socket.getfqdn()):
        raise UserError(
            f"launch.nodes is {launch.nodes}, and this machine cannot resolve its own name {own}, "
            "under which the other nodes look for it: give it an address in DNS or in /etc/hosts "
            "of every node"
        )


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def logs_folder(job: Job) -> Path:
    """Where the logs of the ranks lie."""
    return job.run / "logs" / job.name


def environment(job: Job) -> dict[str, str]:
    """Variables of the processes. torchrun gives each one thread, and warns, if nobody decides."""
    threads = {"OMP_NUM_THREADS": "1"} if job.processes > 1 else {}
    given = {name: os.environ[name] for name in threads if name in os.environ}
    return {**threads, **given, **job.environment}


def run_here(job: Job, requests: StopRequests) -> int:
    """Run a job to its end and show its first rank's log; its exit code.

    SIGTERM, SIGUSR1 and Ctrl-C have the run save and stop; a second Ctrl-C ends it at once. Both
    give the code REQUEUE, and so does a request that came before the run has ranks.

    requests: entered by the caller, so that one that comes while it prepares the job is noted.
    """
    try:
        with requests.passed_on():
            return _run_torchrun(job, requests)
    except StoppedBeforeRanks:
        return _stopped_before_training(job)


def _run_torchrun(job: Job, requests: StopRequests) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # said better below
    shown = _show_first_log(logs_folder(job), job.processes)
    try:
        with _variables(environment(job)), shown:
            run(parse_args(torchrun_words(job)))
            return 0
    except ChildFailedError as error:
        failed = error
    return _explain(failed, job, requests)


def _stopped_before_training(job: Job) -> int:
    print(
        f"{job.run}: ended before it trained, as it was told to; nothing was lost, and the same "
        "command goes on"
    )
    return REQUEUE


def _first_failure(error) -> tuple:
    """The rank that failed first, and how. One that says itself what was wrong comes before those
    that lost their connection to it in the same second, which is all that times tell."""
    own_words = (EXIT_CODE, NOT_FINITE)
    saying = [item for item in error.failures.items() if item[1].exitcode in own_words]
    return saying[0] if saying else error.get_first_failure()


def _explain(error, job: Job, requests: StopRequests) -> int:
    """Name the rank that failed first, and why; the exit code for it."""
    rank, failure = _first_failure(error)
    if requests.at_once and failure.exitcode == -signal.SIGKILL:
        print(
            f"{job.run}: ended at once without saving, as it was told to; the same command goes on "
            "from the last checkpoint"
        )
        return REQUEUE
    if requests.received and failure.exitcode == -signal.SIGTERM:
        return _stopped_before_training(job)
    if failure.exitcode == REQUEUE:
        if not any(job.run.glob("checkpoints/*")):  # it came before the first step
            return _stopped_before_training(job)
        print(f"{job.run}: saved and stopped, as it was told to; the same command goes on")
        return REQUEUE
    log = log_file(logs_folder(job), rank)
    if failure.exitcode in (EXIT_CODE, NOT_FINITE):
        _show_what_only_it_says(log)
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
    """Variables of this process, which torchrun hands on."""
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _show_first_log(logs: Path, processes: int) -> Iterator[None]:
    """Copy what the first rank of this node writes to its log, as it is written."""
    over = Event()
    thread = Thread(target=_follow, args=(logs, processes, over))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _follow(logs: Path, processes: int, over: Event) -> None:
    while len(_rank_logs(logs)) < processes and not over.wait(0.1):
        pass
    if not (files := _rank_logs(logs)):
        return
    with files[0].open(errors="replace") as log:
        while True:
            last = over.wait(0.1)
            try:
                sys.stdout.write(log.read())
                sys.stdout.flush()
            except OSError as error:  # such as a pipe that nobody reads, or a full disk
                print_message(
                    f"{error.strerror}: the run goes on unseen; its output is in {files[0]}"
                )
                return
            if last:
                return


def _show_what_only_it_says(log: Path) -> None:
    """The sentences of a rank that says itself what is wrong. Most faults are found by all ranks,
    and the screen has shown the first one's log."""
    shown = _rank_logs(log.parent)[0].read_text(errors="replace")
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith(PREFIX) and line not in shown:
            print(line, file=sys.stderr)


def _rank_logs(logs: Path) -> list[Path]:
    """Of the ranks of this node that have begun, in their order."""
    return sorted(logs.glob("rank-*.log"), key=lambda log: int(log.stem.removeprefix("rank-")))
