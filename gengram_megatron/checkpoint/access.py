"""Whether files can be read, asked before the work whose result would be lost."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gengram_megatron.errors import UserError


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
