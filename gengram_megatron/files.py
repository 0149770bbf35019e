"""What writers of files share."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Have the disk hold a file, or a folder's list of files, before a rename makes it visible."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
