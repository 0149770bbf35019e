"""Files that may be compressed: opening them, and their errors in the user's words."""

import bz2
import hashlib
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from xopen import xopen

from gengram_megatron.errors import UserError

BLOCK = 1 << 20
"""Bytes read at a time: some processor caches hold them from one step to the next."""


FED = 1 << 14
"""Bytes given to a decompressor at a time: of the best compressed ones it makes 100 MB."""

GZIP = b"\x1f\x8b"

STREAMS: dict[bytes, Callable[[], Any]] = {
    GZIP: partial(zlib.decompressobj, wbits=31),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": lzma.LZMADecompressor,
}
"""What decompresses one stream, by its first bytes; a file has one stream or several."""

HEADERS = {
    GZIP: re.compile(rb"\x1f\x8b\x08[\x00-\x1f]"),
    b"BZh": re.compile(rb"BZh[1-9]1AY&SY"),
    b"\xfd7zXZ\x00": re.compile(rb"\xfd7zXZ\x00"),
}
"""More of a stream's first bytes, so that hardly any other bytes look like them."""

LONGEST_HEADER = 10

_bytes_after: dict[Path, int] = {}
"""What `bytes_after` returns, of the files that have any."""


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

    Reads plain files, gzip (bgzip too), bzip2, xz and zstd. Bytes after the last stream of gzip,
    bzip2 or xz are ignored, as gunzip does; `bytes_after` tells of them.
    """
    with path.open("rb") as start:
        first = start.read(max(map(len, STREAMS)))
    if path.suffix.lower() in (".gz", ".bgz") and first and not first.startswith(GZIP):
        raise UserError(
            f"{path} is not compressed with gzip, whatever its name says; download it again, or "
            "rename it if it is plain text"
        )
    magic = next((magic for magic in STREAMS if first.startswith(magic)), None)
    with _opened(path, file, magic) as text:
        yield text
        if file is not None:
            file.finish()


@contextmanager
def _opened(path: Path, file: Hashed | None, magic: bytes | None) -> Iterator[BinaryIO]:
    """The text of a file that begins with `magic`; None for one that is plain or zstd."""
    with io.BufferedReader(file, BLOCK) if file else path.open("rb") as stored:
        if magic in (None, GZIP):
            with xopen(stored, "rb", threads=0) as text:  # no cores beside the workers' own
                yield io.BufferedReader(_GzipReader(path, text), BLOCK) if magic else text
        else:
            yield io.BufferedReader(_BlockReader(_streams(path, stored, magic)), BLOCK)


def bytes_after(path: Path) -> int:
    """How many bytes that are no part of it follow the compressed data of a file, which this
    process has read to its end."""
    return _bytes_after.get(path, 0)


class _BlockReader(io.RawIOBase):
    """A file that reads from an iterator of byte blocks."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks = blocks
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        while not self._block:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._block = memoryview(block)
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count


class _GzipReader(_BlockReader):
    """The text of a gzip file. The fast reader does not tell bytes after the stream from damage, so
    where it fails, the file is read once more by a slower one that does."""

    def __init__(self, path: Path, text: BinaryIO):
        super().__init__(self._read(path, text))

    @staticmethod
    def _read(path: Path, text: BinaryIO) -> Iterator[bytes]:
        given = 0
        try:
            while block := text.read(BLOCK):
                given += len(block)
                yield block
            return
        except Exception as error:  # each library has errors of its own
            if isinstance(error, OSError) and error.errno is not None:
                raise
        with path.open("rb") as file:
            for part in _streams(path, file, GZIP):
                known = min(given, len(part))
                given -= known
                yield part[known:]


def _streams(path: Path, file: BinaryIO, magic: bytes) -> Iterator[bytes]:
    """The text of all streams of a file that begins with one."""
    blocks = iter(partial(file.read, FED), b"")
    rest = b""
    while True:
        stream = STREAMS[magic]()
        while not stream.eof:
            rest = rest or next(blocks, b"")
            if not rest:
                raise EOFError("it ends in the middle of its compressed data")
            yield stream.decompress(rest)
            rest = stream.unused_data
        rest = rest.lstrip(b"\0")
        while len(rest) < len(magic) and (block := next(blocks, b"")):
            rest = (rest + block).lstrip(b"\0")  # streams may be padded
        if not rest.startswith(magic):
            break
    if not rest:
        return
    if magic.startswith(rest):
        raise EOFError("it ends in the middle of its compressed data")
    count, before = 0, b""
    for block in chain([rest], blocks):
        count += len(block)
        before = before[-LONGEST_HEADER:] + block
        if HEADERS[magic].search(
            before
        ):  # then it is the beginning of a stream in between that is damaged
            raise EOFError("something else lies between its compressed data")
    _bytes_after[path] = count


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
