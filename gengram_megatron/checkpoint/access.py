"""Whether files can be read and written, asked before the work whose result would be lost."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from gengram_megatron.errors import UserError


def check_writable(folder: Path) -> None:
    """UserError: a folder, which need not be there yet, cannot be made or written to.

    It is tried out, because what permissions say does not hold for root, for file systems that
    are mounted read-only, or on a disk that is full.
    """
    nearest = folder
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        with TemporaryDirectory(prefix=".gengram-", dir=nearest) as trial:
            (Path(trial) / "trial").write_bytes(b"\0")
    except OSError as error:
        where = "" if nearest == folder else f" in {nearest}"
        raise UserError(
            f"{folder} cannot be written to{where}: {error.strerror or error}; give another folder"
        ) from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of the system while `path` is read, or a file in it, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path} cannot be read: {error.strerror or error}; see that it is "
            "there and may be read"
        ) from None


def check_readable(files: Iterable[Path]) -> None:
    """UserError: one of these files cannot be opened and read."""
    for path in files:
        with reading(path), path.open("rb") as file:
            file.read(1)
