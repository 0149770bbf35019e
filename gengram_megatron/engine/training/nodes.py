"""What the ranks of a run check together before anything is built.

They may be on several nodes, each with file systems of its own. All must write to the same run
folder, or a checkpoint has only a part of its files in each; all must read the same data; and that
data must be what was built. Whatever one rank finds wrong is told, in the same sentence, on all of
them, so that none is left waiting.
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

TURN_SECONDS = 2.0
"""Ranks that wait while others read the data hear from them this often."""
REPORT_SECONDS = 10.0
"""Time between two lines that say how far the reading is."""


@contextmanager
def telling_all_nodes(world_size: int, join: Callable[[], None]) -> Iterator[None]:
    """Where a rank looks at what it has, before the process groups: an error that a person can mend
    also ends the other ranks, which would wait for this one to join them.

    join: starts the process groups. The other ranks then call check_nodes.
    """
    try:
        yield
    except (OSError, UserError) as error:
        sentence = explain(error) if isinstance(error, OSError) else str(error)
        if world_size > 1 and sentence is not None:
            with suppress(OSError, RuntimeError):  # perhaps nobody is there any more
                join()
                gather(f"{sentence} (found on {_host()})")
            end_processes()
        raise


def check_nodes(folder: Path, data: RunData, signals: StopSignals) -> None:
    """Raises UserError, on every rank, unless all ranks share the run's folder and read the same
    data sets, which are undamaged.

    signals: once one asks a rank to stop, the rest of the data is left to the job that goes on.
    """
    # What another rank has found wrong before the groups started.
    for problem in filter(None, gather(None)):
        raise UserError(problem)
    check_run_folder(folder)
    check_same_data(data)
    check_content(data.files, signals)


def check_run_folder(folder: Path) -> None:
    """Raises UserError unless every rank sees in the run's folder what the first one writes."""
    first, name = dist.get_rank() == 0, [f".all-ranks-see-this-{uuid4().hex}"]
    dist.broadcast_object_list(name)
    path, problem = folder.absolute() / name[0], None
    if first:
        try:
            path.touch()
        except OSError as error:
            problem = error.strerror
    # Also has the others look only when the file is there.
    if problem := gather(problem)[0]:
        raise UserError(f"run.dir {path.parent} cannot be written to: {problem}")
    try:
        ranks = gather((_host(), str(path.parent), _appears(path)))
    finally:
        if first:
            path.unlink(missing_ok=True)
    apart = list(dict.fromkeys(f"{there} on {host}" for host, there, seen in ranks if not seen))
    if apart:
        others = f" and {len(apart) - 1} others" if len(apart) > 1 else ""
        raise UserError(
            f"run.dir is not one folder on all nodes: {apart[0]}{others} does not hold what rank 0 "
            f"has written to {ranks[0][1]} on {ranks[0][0]}; give a run.dir on a file system that "
            "all nodes share"
        )


def _appears(path: Path) -> bool:
    """Whether a file is in its folder, now or some seconds later."""
    end = time.monotonic() + VISIBLE_SECONDS
    while True:
        # A list of the folder is read anew where a single file is remembered to be missing.
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
    for rank, (host, found) in enumerate(ranks):
        who = f"rank {rank} on {host}"
        if [one.key_and_share for one in found] != [one.key_and_share for one in expected]:
            raise UserError(
                f"data: {who} mixes other data sets than rank 0 on {first_host}; start all ranks "
                "with the same config"
            )
        for one, other in zip(found, expected):
            if one.checksums != other.checksums:
                raise UserError(
                    f"{one.key}: {who} has other samples in {one.folder} than rank 0 on "
                    f"{first_host} has in {other.folder}; give all nodes the same data set"
                )


@dataclass(frozen=True)
class _Contents:
    """A data set as one rank has it."""

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
class _Turn:
    """What a rank says of its reading."""

    host: str
    read: int
    total: int
    done: bool
    problem: str | None
    stop: bool
    """Whether the rank was asked to stop."""


def check_content(files: list[DataFile], signals: StopSignals) -> None:
    """Raises UserError unless the files have the checksums of their manifests.

    One rank of each node reads those that no earlier run has checked there; a file that several
    nodes have in common is read by one of them. The others wait, by short turns: a single wait for
    all of a large data set would outlast a collective's time limit.
    """
    files = not_checked_yet(files) if is_first_on_its_node() else []
    keys = list(map(identity, files))
    reads = readers(gather(keys))
    reading = _Reading(
        [
            file
            for file, key in zip(files, keys)
            if reads.get(key, dist.get_rank()) == dist.get_rank()
        ]
    )
    began, said = time.monotonic(), None
    while True:
        turns = gather(reading.turn(signals))
        for one in turns:
            if one.problem is not None:
                raise UserError(f"{one.problem} (found on {one.host})")
        if all(one.done for one in turns) or any(one.stop for one in turns):
            return
        now = time.monotonic()
        if dist.get_rank() == 0 and (said is None or now - said >= REPORT_SECONDS):
            said = now
            print(_report(turns, now - began), flush=True)


def readers(ranks: list[list[tuple | None]]) -> dict[tuple, int]:
    """Which rank reads each file: of those that have it one, another one for each file.

    ranks: the identities of the files that each rank has, in the order of the ranks. None is a file
    that has none; whoever has it reads it.
    """
    having: dict[tuple, list[int]] = {}
    for rank, keys in enumerate(ranks):
        for key in keys:
            if key is not None:
                having.setdefault(key, []).append(rank)
    return {key: own[number % len(own)] for number, (key, own) in enumerate(having.items())}


class _Reading:
    """Compares files with their checksums, some seconds at a time."""

    def __init__(self, files: list[DataFile]):
        self._blocks = self._read_all(files)
        self._read = self._total = 0

    def turn(self, signals: StopSignals) -> _Turn:
        """Read on for some seconds, or until a signal comes."""
        done, problem, end = True, None, time.monotonic() + TURN_SECONDS
        try:
            for size in self._blocks:
                self._read += size
                if time.monotonic() > end or signals.received:
                    done = False
                    break
        except (OSError, UserError) as error:
            problem = str(error)
        return _Turn(_host(), self._read, self._total, done, problem, signals.received)

    def _read_all(self, files: list[DataFile]) -> Iterator[int]:
        self._total = sum(file.path.stat().st_size for file in files)
        for file in files:
            yield from check(file)


def _report(turns: list[_Turn], seconds: float) -> str:
    read, total = sum(one.read for one in turns), sum(one.total for one in turns)
    return (
        f"checking data: {read / total:.0%} of {decimal(total)} compared with their checksums, "
        f"{decimal(int(read / seconds))}/s; done once a data set"
    )


def _host() -> str:
    return socket.gethostname()
