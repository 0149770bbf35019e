"""Work on many sources by several processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from data_prep.interrupts import POLL, as_finished, interrupts_held_back
from gengram_megatron.errors import UserError

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
