"""Handles requests to stop a run that this process has started, or is about to start."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from gengram_megatron.errors import print_message
from gengram_megatron.signals import REQUEUE, STOP_SIGNALS

if TYPE_CHECKING:  # commands that start nothing need not wait for it
    import psutil

POLL_SECONDS = 0.1


class StoppedBeforeRanks(BaseException):
    """A request came before the first rank was started.

    It derives from BaseException, as KeyboardInterrupt does, because torchrun retries after an
    Exception while it waits for other nodes.
    """


class StopRequests:
    """A context manager that records SIGTERM, SIGUSR1 and SIGINT, during one run or several.

    Each rank runs in its own session, so signals reach it only through this process. Each rank gets
    SIGTERM once, also if it starts after the request. A second SIGINT kills the ranks.

    After a request the handlers stay until the process ends, because a launcher or an impatient
    user repeats the signal while the ranks save.

    Attributes:
        received: whether a request came.
        at_once: whether a second SIGINT came.
    """

    def __init__(self) -> None:
        self.received = self.at_once = self._interrupted = False
        # None: no ranks are about to start, so none have to be signalled.
        self._has_ranks: bool | None = None

    def __enter__(self) -> "StopRequests":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if not self.received:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    @contextmanager
    def passed_on(self) -> Iterator[None]:
        """Passes requests on to the child processes of this process, which are the ranks of a run,
        while a context lasts.

        Raises StoppedBeforeRanks if a request has come already, or comes before any rank exists.
        """
        _children()  # imports psutil here, so that the signal handler does not have to
        self._has_ranks, finished = False, threading.Event()
        thread = threading.Thread(target=self._signal_ranks, args=(finished,), daemon=True)
        thread.start()
        try:
            if self.received:
                raise StoppedBeforeRanks
            yield
        finally:
            self._has_ranks = None
            finished.set()
            thread.join()

    def _note(self, number: int, frame: object) -> None:
        """Handles a signal. It takes no lock, because the interrupted code may hold it."""
        if number == signal.SIGINT:
            self.at_once, self._interrupted = self._interrupted, True
            if not self.at_once:
                # Not print, because the handler may have interrupted a print.
                os.write(
                    2,
                    b"\ngengram: Ctrl-C: the run saves after this step and stops; press it again "
                    b"to end immediately\n",
                )
        self.received = True
        if self._has_ranks is None:
            if self.at_once:
                print_message("stopped immediately; the same command continues")
                os._exit(REQUEUE)
        elif not self._has_ranks and not _children():
            # Signal handlers run in the main thread, which also starts the ranks: none can be
            # starting right now.
            raise StoppedBeforeRanks

    def _signal_ranks(self, finished: threading.Event) -> None:
        from psutil import NoSuchProcess

        signalled: set[tuple[int, int]] = set()
        while not finished.wait(POLL_SECONDS):
            ranks = _children()
            self._has_ranks = self._has_ranks or bool(ranks)
            for rank in ranks if self.received else ():
                number = signal.SIGKILL if self.at_once else signal.SIGTERM
                if (rank.pid, number) not in signalled:
                    signalled.add((rank.pid, number))
                    with suppress(NoSuchProcess):
                        rank.send_signal(number)


def _children() -> "list[psutil.Process]":
    import psutil

    return psutil.Process().children()
