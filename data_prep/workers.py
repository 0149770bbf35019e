"""Work on many sources by several processes, the checksum of a file that they are still writing,
and Ctrl-C, which may end all of it at any moment.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, TypeVar

from gengram_megatron.errors import UserError

POLL = 0.1
"""Seconds between two looks at how far the work is, and until a Ctrl-C takes effect."""


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """A Ctrl-C that comes in this block takes effect at its end.

    An executor's threads share locks with the one that uses it. A KeyboardInterrupt at the wrong
    line of that one leaves a lock taken, and the others wait for it for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)


def as_finished(
    futures: Collection[Future], meanwhile: Callable[[], None] = lambda: None
) -> Iterator[Future]:
    """Each future when it is finished; `meanwhile` is called ten times a second, and at least once
    before each. What `concurrent.futures.as_completed` does, but can be interrupted anywhere."""
    left = set(futures)
    while left:
        with interrupts_held_back():
            done, left = wait(left, POLL, FIRST_COMPLETED)
        meanwhile()
        yield from done


AT_A_TIME = 1 << 20
"""Bytes that are read and hashed at a time."""


class IncrementalSha256:
    """A file whose parts are written in any order, by any process, and hashed meanwhile.

    SHA-256 goes through a file from its beginning, on one core, so at the end all others would
    wait for it: a thread hashes as far as the file is complete.
    """

    def __init__(self, path: Path, ends: list[int]):
        """`ends` are the bytes at which the parts end, one after the other."""
        self.path = path
        self._ends = ends
        self._missing = set(range(len(ends)))
        self._file = path.open("rb", buffering=0)
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._stop = False

    @property
    def hashed(self) -> int:
        """How many bytes have been gone through."""
        return self._file.tell()

    def __enter__(self) -> "IncrementalSha256":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        with interrupts_held_back():
            self._thread.shutdown(cancel_futures=True)
        self._file.close()

    def written(self, part: int) -> None:
        """Say that a part, by its number, is in the file."""
        self._missing.discard(part)
        complete = min(self._missing, default=len(self._ends))
        if complete:
            with interrupts_held_back():
                self._thread.submit(self._hash_to, self._ends[complete - 1])

    def facts(
        self, advance: Callable[[int], None] = lambda count: None, told: int = 0
    ) -> dict[str, Any]:
        """Size and SHA-256 of the whole file, to be asked for when all parts are written; `advance`
        is told meanwhile how many more bytes were gone through, from byte `told` on."""
        size = self.path.stat().st_size

        def print_message() -> None:
            nonlocal told
            hashed = self.hashed
            advance(hashed - told)
            told = hashed

        with interrupts_held_back():
            rest = self._thread.submit(self._hash_to, size)
        for future in as_finished([rest], print_message):
            future.result()
        return {"bytes": size, "sha256": self._digest.hexdigest()}

    def _hash_to(self, end: int) -> None:
        while not self._stop and (block := self._file.read(min(end - self.hashed, AT_A_TIME))):
            self._digest.update(block)


Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Is told how much more was gone through, in bases or in bytes of files."""

KEPT = 16 << 20
"""Bytes."""


class Stopped(Exception):
    """Another worker has failed, or the user has had enough."""


class Workers:
    """Processes that go through tasks; with `count` 1 it is this one.

    A task's function is called as function(task, advance). What it raises, the caller gets, and
    the others end soon: each time that they report their advance they look whether they may go on.
    Workers end by themselves when this process does, however it ends.
    """

    def __init__(self, count: int):
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        _keep_freed_memory()
        if self._count > 1:
            # Forked, because to import all anew takes longer than a chromosome; and at once, as
            # long as no progress is drawn by a thread and no lock is held.
            context = multiprocessing.get_context("fork")
            self._amount = context.Value("Q", 0)
            self._stop = context.Value("b", 0, lock=False)
            with interrupts_held_back():
                self._pool = ProcessPoolExecutor(
                    self._count, context, _start_worker, (self._amount, self._stop)
                )
                self._pool.submit(int).result()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            with interrupts_held_back():
                self._stop.value = 1
                self._pool.shutdown(cancel_futures=True)

    def run(
        self, function: Callable[[Task, Advance], Result], tasks: list[Task], advance: Advance
    ) -> Iterator[tuple[Task, Result]]:
        """Each task and its result, in the order in which they are finished. `advance` is told
        how much all workers together went through."""
        if self._pool is None:
            yield from ((task, function(task, advance)) for task in tasks)
            return
        with interrupts_held_back():
            futures = {self._pool.submit(_run, function, task): task for task in tasks}
        try:
            for future in as_finished(futures, lambda: advance(self._taken())):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was ended from outside, perhaps because memory ran out; start "
                "again with fewer workers (the key workers), the work that is done is kept"
            ) from None

    def _taken(self) -> int:
        """How much workers went through since the last look; 0 if that cannot be said now, as a
        worker that was killed holds the lock for ever."""
        lock = self._amount.get_lock()
        with interrupts_held_back():
            if not lock.acquire(timeout=POLL):
                return 0
            amount, self._amount.value = self._amount.value, 0
            lock.release()
        return amount


def _keep_freed_memory() -> None:
    """Have this process, and those that are forked from it, keep freed memory for the next block.

    Else the C library gives each block of text and ids back to the kernel, which maps the next
    one anew, page by page: a sixth of the time of a build. Once it has freed a block as large as
    this one, it keeps up to twice as much (mallopt(3), on M_MMAP_THRESHOLD).
    """
    bytes(KEPT)


_shared: dict[str, Any] = {}
"""A worker's view of what all share: how much was gone through, and whether to stop."""


def _start_worker(amount: Any, stop: Any) -> None:
    _shared.update(amount=amount, stop=stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; one process answers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait_for([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _run(function: Callable[[Task, Advance], Result], task: Task) -> Result:
    return function(task, _advance)


def _advance(amount: int) -> None:
    if _shared["stop"].value:
        raise Stopped
    with _shared["amount"].get_lock():
        _shared["amount"].value += amount
