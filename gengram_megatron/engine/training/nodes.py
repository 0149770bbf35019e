"""Checks that the ranks of a run make together before anything is built.

The ranks may be on several nodes, each with its own file systems. All of them must write to the
same run folder, or the files of a checkpoint would be spread over several folders; all must read
the same data; and the data must be undamaged. A problem that one rank finds is reported on all of
them, in the same sentence, so that no rank is left waiting.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch.distributed as dist
from rich.filesize import decimal

from gengram_megatron.config.layout import is_first_on_its_node
from gengram_megatron.data_set import DataFile, check, identity, not_checked_yet
from gengram_megatron.engine.data.run_data import RunData
from gengram_megatron.engine.processes import end_processes, gather
from gengram_megatron.errors import UserError, explain
from gengram_megatron.runs.folder import VISIBLE_SECONDS
from gengram_megatron.signals import StopSignals

READ_SECONDS = 2.0
"""How long a rank reads data before it exchanges its progress with the other ranks."""
REPORT_SECONDS = 10.0
"""Time between two lines that report the progress of the check."""


@contextmanager
def sharing_errors(world_size: int, join: Callable[[], None]) -> Iterator[None]:
    """Shares the errors of a rank's own checks, made in this context before the process groups
    exist: an error that the user can fix also ends the other ranks, which would otherwise wait for
    this one to join them.

    join: starts the process groups. The other ranks then call check_nodes.
    """
    try:
        yield
    except (OSError, UserError) as error:
        sentence = explain(error) if isinstance(error, OSError) else str(error)
        if world_size > 1 and sentence is not None:
            with suppress(OSError, RuntimeError):  # the other ranks may have ended already
                join()
                gather(f"{sentence} (found on {_host()})")
            end_processes()
        raise


def check_nodes(folder: Path, data: RunData, signals: StopSignals) -> None:
    """Raises UserError, on every rank, unless all ranks share the run's folder and read the same,
    undamaged data sets.

    signals: once a rank is asked to stop, the rest of the data is left for the job that resumes.
    """
    # Problems that another rank found before the groups started.
    for problem in filter(None, gather(None)):
        raise UserError(problem)
    check_run_folder(folder)
    check_same_data(data)
    check_content(data.files, signals)


def check_run_folder(folder: Path) -> None:
    """Raises UserError unless every rank sees in the run's folder a file that rank 0 writes."""
    first, name = dist.get_rank() == 0, [f".all-ranks-see-this-{uuid4().hex}"]
    dist.broadcast_object_list(name)
    path, problem = folder.absolute() / name[0], None
    if first:
        try:
            path.touch()
        except OSError as error:
            problem = error.strerror
    # This also makes the other ranks wait until the file has been written.
    if problem := gather(problem)[0]:
        raise UserError(f"run.dir {path.parent} cannot be written to: {problem}")
    try:
        ranks = gather((_host(), str(path.parent), _appears(path)))
    finally:
        if first:
            path.unlink(missing_ok=True)
    separate = list(dict.fromkeys(f"{run} on {host}" for host, run, seen in ranks if not seen))
    if separate:
        more = f" and {len(separate) - 1} others" if len(separate) > 1 else ""
        raise UserError(
            f"run.dir is not the same folder on all nodes: {separate[0]}{more} does not contain "
            f"what rank 0 has written to {ranks[0][1]} on {ranks[0][0]}; give a run.dir on a file "
            "system that all nodes share"
        )


def _appears(path: Path) -> bool:
    """Returns whether a file is in its folder, now or within VISIBLE_SECONDS."""
    end = time.monotonic() + VISIBLE_SECONDS
    while True:
        # A network file system may cache that a file is missing; listing the folder reads it again.
        with suppress(OSError):
            if path.name in os.listdir(path.parent):
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def check_same_data(data: RunData) -> None:
    """Raises UserError unless every rank has the same data sets in the same shares."""
    ranks = gather((_host(), _contents(data)))
    first_host, expected = ranks[0]
    for rank, (host, contents) in enumerate(ranks):
        who = f"rank {rank} on {host}"
        if [one.key_and_share for one in contents] != [one.key_and_share for one in expected]:
            raise UserError(
                f"data: {who} has different data sets, or different shares of them, from rank 0 on "
                f"{first_host}; start all ranks with the same config"
            )
        for one, first in zip(contents, expected):
            if one.checksums != first.checksums:
                raise UserError(
                    f"{one.key}: {who} has different samples in {one.folder} from those that rank "
                    f"0 on {first_host} has in {first.folder}; give all nodes the same data set"
                )


@dataclass(frozen=True)
class _Contents:
    """What one rank has found in a data set."""

    key: str
    share: str
    folder: str
    checksums: tuple[str, ...]

    @property
    def key_and_share(self) -> tuple[str, str]:
        return self.key, self.share


def _contents(data: RunData) -> list[_Contents]:
    return [
        _Contents(
            one.train.key,
            str(one.share),
            str(one.train.folder.absolute()),
            (one.train.sha256, one.validation.sha256),
        )
        for one in data.sets
    ]


@dataclass(frozen=True)
class _CheckProgress:
    """How far one rank's check has come; `read` and `total` are in bytes."""

    host: str
    read: int
    total: int
    done: bool
    problem: str | None
    stop: bool
    """Whether the rank was asked to stop."""


def check_content(files: list[DataFile], signals: StopSignals) -> None:
    """Raises UserError unless the files have the checksums of their manifests.

    One rank of each node reads the files that no earlier run has checked there; a file that several
    nodes share is read by one of them. All ranks exchange their progress every READ_SECONDS: a
    single wait for a large data set would exceed a collective's time limit.
    """
    files = not_checked_yet(files) if is_first_on_its_node() else []
    keys = list(map(identity, files))
    reader_of = readers(gather(keys))
    check_of_this_rank = _IncrementalCheck(
        [file for file, key in zip(files, keys) if key is None or reader_of[key] == dist.get_rank()]
    )
    began, reported = time.monotonic(), None
    while True:
        ranks = gather(check_of_this_rank.read_some(signals))
        for one in ranks:
            if one.problem is not None:
                raise UserError(f"{one.problem} (found on {one.host})")
        if all(one.done for one in ranks) or any(one.stop for one in ranks):
            return
        now = time.monotonic()
        if dist.get_rank() == 0 and (reported is None or now - reported >= REPORT_SECONDS):
            reported = now
            print(_report(ranks, now - began), flush=True)


def readers(ranks: list[list[tuple[int, ...] | None]]) -> dict[tuple[int, ...], int]:
    """Returns the rank that reads each file: one of the ranks that have the file, in turn, so that
    the files are spread over the ranks.

    ranks: the identities of the files that each rank has, in the order of the ranks. None stands
    for a file without an identity, which every rank that has it reads.
    """
    holders: dict[tuple[int, ...], list[int]] = {}
    for rank, keys in enumerate(ranks):
        for key in keys:
            if key is not None:
                holders.setdefault(key, []).append(rank)
    return {
        key: having[number % len(having)] for number, (key, having) in enumerate(holders.items())
    }


class _IncrementalCheck:
    """Compares files with their checksums, a few seconds at a time."""

    def __init__(self, files: list[DataFile]):
        self._blocks = self._read_all(files)
        self._read = self._total = 0

    def read_some(self, signals: StopSignals) -> _CheckProgress:
        """Continues reading for READ_SECONDS, or until a signal comes."""
        done, problem, end = True, None, time.monotonic() + READ_SECONDS
        try:
            for size in self._blocks:
                self._read += size
                if time.monotonic() > end or signals.received:
                    done = False
                    break
        except (OSError, UserError) as error:
            problem = str(error)
        return _CheckProgress(_host(), self._read, self._total, done, problem, signals.received)

    def _read_all(self, files: list[DataFile]) -> Iterator[int]:
        self._total = sum(file.path.stat().st_size for file in files)
        for file in files:
            yield from check(file)


def _report(ranks: list[_CheckProgress], seconds: float) -> str:
    read, total = sum(one.read for one in ranks), sum(one.total for one in ranks)
    return (
        f"checking data: {read / total:.0%} of {decimal(total)} compared with their checksums, "
        f"{decimal(int(read / seconds))}/s; done only once per data set"
    )


def _host() -> str:
    return socket.gethostname()
