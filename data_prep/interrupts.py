"""Ctrl-C while other threads and processes work."""

import signal
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager

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
