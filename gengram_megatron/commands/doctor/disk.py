"""The run's folder: whether it can be written to, its room, and the speed of its file system."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gengram_megatron.errors import UserError
from gengram_megatron.runs.folder import make_folder

BLOCK = 8 << 20
BLOCKS = 32
"""256 MiB: more than the buffers of disks, and soon written."""


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """The folder, for as long as it is looked at; what was not there before goes again.

    Raises UserError where it cannot be made or written to.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder)
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # never made, or a run has begun to use it
                path.rmdir()


def room(folder: Path) -> int:
    """Free bytes."""
    return shutil.disk_usage(folder).free


def speed(folder: Path) -> dict:
    """Bytes a second, written to the disk itself and read back. Raises UserError if there is too
    little room.

    What was written is dropped from memory before it is read, where the system allows it; network
    file systems may still answer from theirs.
    """
    if room(folder) < 2 * BLOCKS * BLOCK:
        raise UserError(f"{folder} has too little room to measure the speed of its file system")
    block = os.urandom(BLOCK)  # neither compressible nor all the same
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-", buffering=0) as file:
        began = time.perf_counter()
        for _ in range(BLOCKS):
            file.write(block)
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(BLOCK):
            pass
        read = time.perf_counter() - began
    size = BLOCKS * BLOCK
    return {
        "bytes": size,
        "written_bytes_per_second": size / written,
        "read_bytes_per_second": size / read,
    }
