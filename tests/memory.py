"""The peak memory of a process."""

import re
from pathlib import Path


def peak_memory(process: int | str = "self") -> int | None:
    """Most bytes that a process held since it was started; None if it has ended.

    Not getrusage's: that one begins at what the process held that started it.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    return 1024 * int(peak[1]) if peak else None
