"""Runs tasks in several processes and hashes a file that they are still writing; Ctrl-C may end all
of it at any moment.
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
from ctypes import c_byte, c_ulonglong
from multiprocessing.connection import wait as wait_for
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, TypeVar

from gengram_megatron.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

POLL = 0.1
"""Seconds between two checks of the progress, and until a Ctrl-C takes effect."""


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Delays a Ctrl-C that arrives in this block until its end.

    An executor's threads share locks with the thread that uses it. A KeyboardInterrupt at the wrong
    line of that thread leaves a lock acquired, and the others wait for it forever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if received:
            signal.raise_signal(signal.SIGINT)


def as_finished(
    futures: Collection[Future[Result]], meanwhile: Callable[[], None] = lambda: None
) -> Iterator[Future[Result]]:
    """Yields each future when it is finished.

    Calls `meanwhile` ten times a second, and at least once before each future. Like
    `concurrent.futures.as_completed`, but it can be interrupted anywhere.
    """
    pending = set(futures)
    while pending:
        with interrupts_held_back():
            done, pending = wait(pending, POLL, FIRST_COMPLETED)
        meanwhile()
        yield from done


AT_A_TIME = 1 << 20
"""Bytes that are read and hashed at a time."""


class IncrementalSha256:
    """Hashes a file while its parts are being written, in any order and by any process.

    SHA-256 has to process a file from its beginning, on one core. If it began after the writing,
    all other cores would wait for it, so a thread hashes the file as far as it is complete.

    Args:
        path: the file, which must exist.
        ends: the offset in bytes at which each part ends, in ascending order.
    """

    def __init__(self, path: Path, ends: list[int]):
        self.path = path
        self._ends = ends
        self._missing = set(range(len(ends)))
        self._file = path.open("rb", buffering=0)
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._stop = False

    @property
    def hashed(self) -> int:
        """The number of bytes hashed so far."""
        return self._file.tell()

    def __enter__(self) -> "IncrementalSha256":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        with interrupts_held_back():
            self._thread.shutdown(cancel_futures=True)
        self._file.close()

    def written(self, part: int) -> None:
        """Records that a part, given by its index, is in the file."""
        self._missing.discard(part)
        complete = min(self._missing, default=len(self._ends))
        if complete:
            with interrupts_held_back():
                self._thread.submit(self._hash_to, self._ends[complete - 1])

    def facts(
        self, advance: Callable[[int], None] = lambda count: None, reported: int = 0
    ) -> dict[str, Any]:
        """Returns size and SHA-256 of the whole file. All parts must be written.

        Args:
            advance: is told, while this hashes the rest, how many more bytes were hashed.
            reported: the number of bytes that `advance` need not be told about.
        """
        size = self.path.stat().st_size

        def report_progress() -> None:
            nonlocal reported
            hashed = self.hashed
            advance(hashed - reported)
            reported = hashed

        with interrupts_held_back():
            rest = self._thread.submit(self._hash_to, size)
        for future in as_finished([rest], report_progress):
            future.result()
        return {"bytes": size, "sha256": self._digest.hexdigest()}

    def _hash_to(self, end: int) -> None:
        while not self._stop and (block := self._file.read(min(end - self.hashed, AT_A_TIME))):
            self._digest.update(block)


Advance = Callable[[int], None]
"""A callback that is told how much more was processed, in bases or in bytes of files."""

KEPT = 16 << 20
"""Bytes of the block that `_keep_freed_memory` allocates and frees."""


class Stopped(Exception):
    """Ends a task because another worker has failed, or the user has interrupted the program."""


class Workers:
    """A pool of processes that run tasks; with a `count` of 1 they run in this process.

    A task's function is called as function(task, advance). If it raises an error, the caller gets
    it, and the other tasks end soon: they check for this each time they report their progress.
    Workers exit by themselves when this process does, however it ends.
    """

    def __init__(self, count: int):
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        _keep_freed_memory()
        if self._count > 1:
            # Forked, because importing everything again takes longer than processing a chromosome;
            # and right now, while no thread draws the progress and no lock is held.
            context = multiprocessing.get_context("fork")
            self._amount = context.Value(c_ulonglong, 0)
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
        """Yields each task and its result, in the order in which they finish.

        `advance` is told how much all workers together have processed. Raises the error of a task
        that fails, and UserError if a worker process ended unexpectedly.
        """
        if self._pool is None:
            yield from ((task, function(task, advance)) for task in tasks)
            return
        with interrupts_held_back():
            futures = {self._pool.submit(_run, function, task): task for task in tasks}
        try:
            for future in as_finished(futures, lambda: advance(self._pop_amount())):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process ended unexpectedly, perhaps because memory ran out; run the same "
                "command again with fewer workers (the key workers); finished work is kept"
            ) from None

    def _pop_amount(self) -> int:
        """Returns how much the workers have processed since the last call.

        Returns 0 if the lock is not available: a worker that was killed may hold it forever.
        """
        lock = self._amount.get_lock()
        with interrupts_held_back():
            if not lock.acquire(timeout=POLL):
                return 0
            amount, self._amount.value = self._amount.value, 0
            lock.release()
        return amount


def _keep_freed_memory() -> None:
    """Makes this process, and those that are forked from it, keep freed memory for the next block.

    Otherwise the C library returns each block of text and ids to the kernel, which maps the next
    one again, page by page: a sixth of the time of a build. Once it has freed a block as large as
    this one, it keeps up to twice as much (see mallopt(3) on M_MMAP_THRESHOLD).
    """
    bytes(KEPT)


_shared: dict[str, Any] = {}
"""What a worker shares with all others: how much was processed (amount), and whether to stop."""


def _start_worker(amount: "Synchronized[int]", stop: c_byte) -> None:
    _shared.update(amount=amount, stop=stop)
    # Ctrl-C reaches all processes; the first one handles it and stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    wait_for([parent.sentinel])
    os._exit(1)


def _run(function: Callable[[Task, Advance], Result], task: Task) -> Result:
    return function(task, _advance)


def _advance(amount: int) -> None:
    if _shared["stop"].value:
        raise Stopped
    with _shared["amount"].get_lock():
        _shared["amount"].value += amount
