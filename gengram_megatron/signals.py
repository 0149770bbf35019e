"""Handles signals that ask a run to stop: Slurm's time limit (SIGUSR1 with `--signal=USR1@300`, or
SIGTERM), preemption of a node, `kill`, Ctrl-C."""

import os
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REQUEUE = 75
"""Exit code of a run that saved and stopped on request, and can be started again (EX_TEMPFAIL)."""


class StopSignals:
    """A context manager that records whether one of the signals came. The signals have no other
    effect: the training loop checks `received` once per step and per validation batch. Only a
    second SIGINT ends the process immediately, as it would without a handler.

    After a signal the handlers stay until the process ends, because a launcher repeats SIGTERM when
    the first of its processes ends.

    Args:
        announce: write a line to stderr on SIGINT, for the person who pressed Ctrl-C, because the
            current step may take a while.
    """

    def __init__(self, announce: bool = False):
        self.received = False
        self._announce, self._interrupted = announce, False

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        # Delivers signals that were blocked while the process started (see commands/rank.py).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.received:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.received = True
        if number != signal.SIGINT:
            return
        if self._interrupted:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        elif self._announce:
            # Not print, because the handler may have interrupted a print, and text streams are not
            # reentrant.
            os.write(2, b"\ngengram: Ctrl-C: saving after this step; again: ends without saving\n")
        self._interrupted = True


def ignore_stop_signals(*_: object) -> None:
    """Makes a helper process ignore stop signals. Slurm and terminals signal all processes of a
    job, and if a helper ended, it would end the training process before that has saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
