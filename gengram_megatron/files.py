"""Helpers for reading and writing files: atomic replacement, checks, locks and checksums."""

import errno
import fcntl
import hashlib
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from gengram_megatron.errors import UserError

if TYPE_CHECKING:  # its import is slow, and most commands draw nothing
    from matplotlib.figure import Figure

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def flush(path: Path) -> None:
    """Flushes a file, or a folder's list of files, to the disk, for example before a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Writes a file atomically, as a context manager. Yields a temporary path to write to. At the
    end that file is flushed to disk and renamed to `path`; after an error it is removed. So nobody
    ever reads a half-written file."""
    beside = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        yield beside
        flush(beside)
        beside.replace(path)
    except OSError as error:
        if error.filename in (str(beside), beside):  # the user does not know the temporary name
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(NotADirectoryError):  # its folder is a file, which is the error raised above
            beside.unlink(missing_ok=True)


def check_writable(path: Path, key: str) -> None:
    """Raises UserError unless a file can be written at `path`, by writing a temporary one beside
    it.

    This is called before the work whose result will be written there.

    Args:
        key: the option or key that names the file.
    """
    if path.is_dir():
        raise UserError(f"{key} {path} is a folder; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{key} {path}: there is no folder {path.parent}; create it")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise UserError(
            f"{key} {path} cannot be written: {error.strerror}; name a file elsewhere"
        ) from None


def check_folder_writable(folder: Path) -> None:
    """Raises UserError if a folder, which need not exist yet, cannot be created or written to.

    This is tested by writing, because permissions do not tell it for root, for file systems that
    are mounted read-only, or for a full disk.
    """
    nearest = folder
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryDirectory(prefix=".gengram-", dir=nearest) as trial:
            (Path(trial) / "trial").write_bytes(b"\0")
    except OSError as error:
        where = "" if nearest == folder else f" in {nearest}"
        raise UserError(
            f"{folder} cannot be written to{where}: {error.strerror or error}; give another folder"
        ) from None


class Locked(Exception):
    """Another process holds the lock; the message names it."""


@contextmanager
def lock(path: Path) -> Iterator[TextIO]:
    """Locks a file while a context lasts, or raises Locked. The file remains after the lock is
    released, without meaning anything.

    The lock belongs to the kernel, so it is released when the process ends in whatever way; child
    processes do not hold it. On file systems that do not support locks (some network ones), nothing
    is locked.
    """
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise Locked(file.read().strip()) from None
            if error.errno not in NO_LOCKS:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield file


def checksum(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_figure(figure: "Figure", out: Path, dpi: int) -> None:
    """Writes a figure to a file, whose suffix decides the format."""
    with replacing(out) as beside:
        figure.savefig(beside, dpi=dpi)
