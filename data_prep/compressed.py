"""Opens files that may be compressed, and turns errors of reading them into UserErrors."""

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
from typing import TYPE_CHECKING, Any, BinaryIO

from xopen import xopen

from gengram_megatron.errors import UserError

if TYPE_CHECKING:  # known to type checkers only
    from _typeshed import WriteableBuffer

BLOCK = 1 << 20
"""Bytes read at a time: few enough that some processor caches hold them from one step to the
next."""


COMPRESSED_BLOCK = 1 << 14
"""Bytes given to a decompressor at a time: at the highest compression ratios they become 100 MB."""

GZIP = b"\x1f\x8b"

STREAMS: dict[bytes, Callable[[], Any]] = {
    GZIP: partial(zlib.decompressobj, wbits=31),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": lzma.LZMADecompressor,
}
"""What makes a decompressor for one stream, by the stream's first bytes. A file has one or more
streams."""

HEADERS = {
    GZIP: re.compile(rb"\x1f\x8b\x08[\x00-\x1f]"),
    b"BZh": re.compile(rb"BZh[1-9]1AY&SY"),
    b"\xfd7zXZ\x00": re.compile(rb"\xfd7zXZ\x00"),
}
"""A pattern for more of a stream's first bytes, which other data is very unlikely to match."""

LONGEST_HEADER = 10

_bytes_after: dict[Path, int] = {}
"""What `bytes_after` returns, for the files that have such bytes."""


class HashingReader(io.RawIOBase):
    """A file that is hashed while it is read, so that its checksum needs no second reading."""

    def __init__(self, path: Path):
        self._file = path.open("rb", buffering=0)
        self._digest = hashlib.sha256()
        self.bytes = 0

    def readable(self) -> bool:
        """Returns True: the file is open for reading."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Reads bytes of the file into `buffer`, hashes them, and returns their number."""
        count = self._file.readinto(buffer)
        self._digest.update(memoryview(buffer)[:count])
        self.bytes += count
        return count

    def close(self) -> None:
        """Closes the file that is read, too."""
        self._file.close()
        super().close()

    def finish(self) -> None:
        """Reads and hashes the rest of the file, such as padding after compressed data."""
        while self.read(BLOCK):
            pass

    def facts(self) -> dict[str, int | str]:
        """Returns the size in bytes and the SHA-256 of what was read."""
        return {"bytes": self.bytes, "sha256": self._digest.hexdigest()}


@contextmanager
def decompressed(path: Path, file: HashingReader | None = None) -> Iterator[BinaryIO]:
    """Opens a file for reading its text, decompressed if necessary.

    Reads plain files, gzip (also bgzip), bzip2, xz and zstd. Bytes after the last stream of gzip,
    bzip2 or xz are ignored, as gunzip does; `bytes_after` returns their number.

    Args:
        path: the file.
        file: if given, a reader of `path` through which all of the file is read.
    """
    with path.open("rb") as start:
        first = start.read(max(map(len, STREAMS)))
    if path.suffix.lower() in (".gz", ".bgz") and first and not first.startswith(GZIP):
        raise UserError(
            f"{path} is not compressed with gzip, although its name says so; download it again, or "
            "rename it if it is plain text"
        )
    magic = next((magic for magic in STREAMS if first.startswith(magic)), None)
    with _opened(path, file, magic) as text:
        yield text
        if file is not None:
            file.finish()


@contextmanager
def _opened(path: Path, file: HashingReader | None, magic: bytes | None) -> Iterator[BinaryIO]:
    """Opens the text of a file that begins with `magic`, which is None for plain text and zstd."""
    with io.BufferedReader(file, BLOCK) if file else path.open("rb") as stored:
        if magic in (None, GZIP):
            with xopen(stored, "rb", threads=0) as text:  # the workers use all cores already
                yield io.BufferedReader(_GzipReader(path, text), BLOCK) if magic else text
        else:
            yield io.BufferedReader(_BlockReader(_streams(path, stored, magic)), BLOCK)


def bytes_after(path: Path) -> int:
    """Returns how many bytes follow the compressed data of a file without being part of it.

    This process must have read the file to its end.
    """
    return _bytes_after.get(path, 0)


class _BlockReader(io.RawIOBase):
    """A readable file over an iterator of byte blocks."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks = blocks
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        while not self._block:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._block = memoryview(block)
        free = memoryview(buffer)
        count = min(len(free), len(self._block))
        free[:count] = self._block[:count]
        self._block = self._block[count:]
        return count


class _GzipReader(_BlockReader):
    """The text of a gzip file.

    The fast reader cannot tell bytes after the stream from damage, so if it fails, the file is read
    again with a slower one that can.
    """

    def __init__(self, path: Path, text: BinaryIO):
        super().__init__(self._read(path, text))

    @staticmethod
    def _read(path: Path, text: BinaryIO) -> Iterator[bytes]:
        yielded = 0
        try:
            while block := text.read(BLOCK):
                yielded += len(block)
                yield block
            return
        except Exception as error:  # each library has errors of its own
            if isinstance(error, OSError) and error.errno is not None:
                raise
        with path.open("rb") as file:
            for block in _streams(path, file, GZIP):
                skipped = min(yielded, len(block))
                yielded -= skipped
                yield block[skipped:]


def _streams(path: Path, file: BinaryIO, magic: bytes) -> Iterator[bytes]:
    """Yields the text of all streams of a file whose first one begins with `magic`.

    Raises EOFError if a stream is cut off, or if other bytes lie between two streams.
    """
    blocks = iter(partial(file.read, COMPRESSED_BLOCK), b"")
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
    count, window = 0, b""
    for block in chain([rest], blocks):
        count += len(block)
        window = window[-LONGEST_HEADER:] + block
        # Another stream after these bytes means that a stream in between has a damaged beginning.
        if HEADERS[magic].search(window):
            raise EOFError("it has other bytes between its compressed data")
    _bytes_after[path] = count


@contextmanager
def explain_read_errors(path: Path, kind: str) -> Iterator[None]:
    """Turns errors in the block, which reads `path` with `decompressed`, into UserErrors.

    Args:
        path: the file that the block reads.
        kind: what the text should be, such as "a FASTA file".
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except UnicodeDecodeError:
        raise UserError(f"{path} is not {kind}: it is not text") from None
    except ImportError:  # zstd is the one compression that Python may lack
        raise UserError(
            f"{path} is compressed with zstd, which this Python cannot read: "
            "pip install backports.zstd, or decompress the file"
        ) from None
    except Exception as error:  # each decompressor has errors of its own
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        raise UserError(
            f"{path} cannot be decompressed because it is truncated or damaged: {error}"
        ) from None
