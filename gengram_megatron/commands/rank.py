"""One process of a launched run: `python -m gengram_megatron.commands.rank LOGS train CONFIG`.

It runs `gengram train` with a log file named for its rank, and an error file if it fails.
"""

import os
import signal
import sys
from pathlib import Path

from gengram_megatron.signals import STOP_SIGNALS, ignore_stop_signals

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def main() -> None:
    """Trains as the rank that torchrun or srun assigned to this process."""
    # The signals are blocked before the first slow import, so that a request to stop stays pending
    # and does not kill the process until `gengram train` has handlers (see StopSignals).
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    from gengram_megatron.config.layout import world_size_from_environment
    from gengram_megatron.launch.job import log_file

    logs = Path(sys.argv[1])
    sys.argv = ["gengram", *sys.argv[2:]]
    _, rank = world_size_from_environment()
    if ERROR_FILE in os.environ:  # torchrun leaves the output to its processes
        _write_output_to(log_file(logs, rank))
    else:
        os.environ[ERROR_FILE] = str(log_file(logs, rank).with_suffix(".error.json"))
    from torch.distributed.elastic.multiprocessing.errors import record

    record(_train)()


def _train() -> None:
    from gengram_megatron.commands.cli import main as gengram

    try:
        gengram(own_log=True)
    finally:
        # Everything is reported and saved. A request to stop that comes now must not make this
        # process end as a failed one.
        ignore_stop_signals()


def _write_output_to(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


if __name__ == "__main__":
    main()
