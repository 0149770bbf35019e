"""Signals that ask a run to stop: Slurm's time limit (SIGUSR1 with `--signal=USR1@300`, or SIGTERM),
a node that is taken away, `kill`."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REQUEUE = 75
"""Exit code of a run that was asked to stop and has saved: EX_TEMPFAIL, start it again."""


class StopSignals:
    """Notes, while it is entered, that one of the signals came. Nothing else happens to the process
    until it asks: the training loop does so once a step.

    After a signal its handlers stay for as long as the process lives, since a launcher repeats its
    SIGTERM when the first of its processes ends.
    """

    def __init__(self):
        self.received = False

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        # Delivers those that a launcher had held back while the process started.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.received:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self.received = True


def ignore_stop_signals(*_: object) -> None:
    """For helper processes: Slurm signals all processes of a job, and a helper that ends takes the
    training process with it before that has saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
