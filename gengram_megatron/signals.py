"""Signals that ask a run to stop: Slurm's time limit (SIGUSR1 with `--signal=USR1@300`, or SIGTERM),
a node that is taken away, `kill`, Ctrl-C."""

import os
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REQUEUE = 75
"""Exit code of a run that was asked to stop and has saved: EX_TEMPFAIL, start it again."""


class StopSignals:
    """Notes, while it is entered, that one of the signals came. Nothing else happens to the process
    until it asks: the training loop does so once a step and once a batch of a validation. Only a
    second SIGINT ends the process at once, as it would have without a handler.

    After a signal its handlers stay for as long as the process lives, since a launcher repeats its
    SIGTERM when the first of its processes ends.

    Args:
        announce: write a line to stderr when SIGINT comes, for the person who pressed Ctrl-C: the
            step at hand may take a while.
    """

    def __init__(self, announce: bool = False):
        self.received = False
        self._announce, self._interrupted = announce, False

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        # Delivers those that a launcher had held back while the process started.
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
            # Not print: the handler may have interrupted one, and text streams are not reentrant.
            os.write(2, b"\ngengram: Ctrl-C: saving after this step; again: ends without saving\n")
        self._interrupted = True


def ignore_stop_signals(*_: object) -> None:
    """For helper processes: Slurm and terminals signal all processes of a job, and a helper that
    ends takes the training process with it before that has saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
