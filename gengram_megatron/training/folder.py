"""The run's folder: its config as resolved, and what it was before a run went on with another."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gengram_megatron.config.load import dump_config
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError

LOCK = ".lock"
"""Who holds the folder; it stays when the run ends, and then means nothing."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def make_folder(folder: Path) -> None:
    """Make the run's folder, or say in one sentence why that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.dir {folder} cannot be made: {error.strerror}; give another run.dir"
        ) from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"run.dir {folder} cannot be written to; give another run.dir")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder; a second run that wants it is told who has it.

    The lock is the kernel's, so it ends with its process however that ends. File systems without
    locks (some network ones) give none, and are used without.
    """
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UserError(
                    f"run.dir {folder} is in use by another run, {file.read().strip()}: wait for "
                    "its end, or give another run.dir"
                ) from None
            if error.errno not in NO_LOCKS:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def write_config(folder: Path, config: Config, step: int) -> None:
    """Write config.yaml. One that says something else is kept as config.until-step-N.yaml."""
    path, text = folder / "config.yaml", dump_config(config)
    if path.exists():
        if path.read_text() == text:
            return
        os.replace(path, folder / f"config.until-step-{step}.yaml")
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)
