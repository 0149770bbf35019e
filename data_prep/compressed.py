"""Files that may be compressed: opening them, and their errors in the user's words."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from xopen import xopen

from gengram_megatron.errors import UserError

BLOCK = 1 << 20
"""Bytes read at a time: some processor caches hold them from one step to the next."""


class Hashed(io.RawIOBase):
    """A file that is hashed as it is read, so that a checksum costs no reading of its own."""

    def __init__(self, path: Path):
        self._file = path.open("rb", buffering=0)
        self._digest = hashlib.sha256()
        self.bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        count = self._file.readinto(buffer)
        self._digest.update(memoryview(buffer)[:count])
        self.bytes += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def finish(self) -> None:
        """Read what is left, such as the padding after compressed data."""
        while self.read(BLOCK):
            pass

    def facts(self) -> dict[str, int | str]:
        """Size and SHA-256 of what was read."""
        return {"bytes": self.bytes, "sha256": self._digest.hexdigest()}


@contextmanager
def unpacked(path: Path, file: Hashed | None = None) -> Iterator[BinaryIO]:
    """The text of a file, decompressed if need be. Given `file`, which reads `path`, all of it is
    read through that.

    Reads plain files, gzip (bgzip too), bzip2, xz and zstd.
    """
    with path.open("rb") as start:
        magic = start.read(2)
    if path.suffix.lower() in (".gz", ".bgz") and magic and magic != b"\x1f\x8b":
        raise UserError(
            f"{path} is not compressed with gzip, whatever its name says; download it again, or "
            "rename it if it is plain text"
        )
    stored = path if file is None else io.BufferedReader(file, BLOCK)
    with xopen(stored, "rb", threads=0) as text:  # no cores beside the workers' own
        yield text
        if file is not None:
            file.finish()


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what goes wrong in the block, which reads `path` unpacked, into UserErrors; `kind`
    says what the text is meant to be, such as "a FASTA file"."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except UnicodeDecodeError:
        raise UserError(f"{path} is not {kind}: it is not text") from None
    except ImportError:  # the one compression that a Python may lack
        raise UserError(
            f"{path} is compressed with zstd, which this Python cannot read: "
            "pip install backports.zstd, or unpack the file"
        ) from None
    except Exception as error:  # each decompressor has errors of its own
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        raise UserError(
            f"{path} cannot be decompressed, it is truncated or damaged: {error}"
        ) from None
