"""What writers and readers of files share."""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that draw nothing need not wait for it
    from matplotlib.figure import Figure


def flush(path: Path) -> None:
    """Have the disk hold a file, or a folder's list of files, before a rename makes it visible."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_figure(figure: "Figure", out: Path, dpi: int) -> None:
    """Beside and renamed: nobody ever sees half a picture."""
    beside = out.with_name(f".{out.stem}.new{out.suffix}")
    figure.savefig(beside, dpi=dpi)
    beside.replace(out)
