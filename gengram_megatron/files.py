"""What writers and readers of files share."""

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

if TYPE_CHECKING:  # commands that draw nothing need not wait for it
    from matplotlib.figure import Figure

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def flush(path: Path) -> None:
    """Have the disk hold a file, or a folder's list of files, before a rename makes it visible."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of a file, or becomes one: it does so when the disk holds
    it, and not after an error, so nobody ever reads half of it."""
    beside = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        yield beside
        flush(beside)
        beside.replace(path)
    except OSError as error:
        if error.filename in (str(beside), beside):  # a name that means nothing to the user
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(NotADirectoryError):  # its folder is a file: so the error above says
            beside.unlink(missing_ok=True)


def check_writable(path: Path, key: str) -> None:
    """Raise UserError unless a file can be written there, by trying it beside its place.

    Called before work whose result the file is to hold. key: the option or key that named the file.
    """
    if path.is_dir():
        raise UserError(f"{key} {path} is a folder; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{key} {path}: there is no folder {path.parent}; make it")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise UserError(
            f"{key} {path} cannot be written: {error.strerror}; name a file elsewhere"
        ) from None


def check_folder_writable(folder: Path) -> None:
    """UserError: a folder, which need not be there yet, cannot be made or written to.

    It is tried out, because what permissions say does not hold for root, for file systems that
    are mounted read-only, or on a disk that is full.
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
    """Another process holds the lock; the message says which."""


@contextmanager
def lock(path: Path) -> Iterator[TextIO]:
    """Hold a lock file, or raise Locked. It stays when it is given back, and then means nothing.

    The lock is the kernel's, so it ends with its process however that ends; processes that this
    one starts do not hold it. File systems without locks (some network ones) give none, and are
    used without.
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
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_figure(figure: "Figure", out: Path, dpi: int) -> None:
    """Draw a picture into a file, whose ending decides the format."""
    with replacing(out) as beside:
        figure.savefig(beside, dpi=dpi)
