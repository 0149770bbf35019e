"""Reads FASTA files as token ids, a small range of bases at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from data_prep.compressed import BLOCK, HashingReader, decompressed, explain_read_errors
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import BASE_IDS, PIECES, DnaTokenizer

N = PIECES.index("N")

LONGEST_HEADER = 1 << 20  # bytes
BYTE_ORDER_MARK = "\ufeff"

BLANKS = b" \t\r\n\v\f"
"""The bytes that may stand between bases, or in an empty line."""

LOWER_CASE = np.uint8(0x20)
"""The bit of an ASCII letter that makes it lower case."""


@dataclass(frozen=True)
class TokenRange:
    """Consecutive bases of a record, as token ids."""

    name: str  # the record's name: the first word of its header
    header: str  # the record's header without the '>'
    start: int  # the position of the first base in the record, counted from 0
    ids: np.ndarray  # [bases] token ids


@dataclass(frozen=True)
class BlockCounts:
    """The number of bases of each kind in a block of a record's lines."""

    name: str  # the record's name
    header: str  # the record's header without the '>'
    composition: np.ndarray  # [5] counts, in the order of BASES
    ids: np.ndarray | None  # the token ids of the bases; None if they are all A, C, G or T


def read_token_ranges(
    path: Path, multiple: int, file: HashingReader | None = None
) -> Iterator[TokenRange]:
    """Yields all bases of a file in small ranges, so that no record has to fit into memory.

    The ranges of a record are contiguous, and each except the last one has a multiple of `multiple`
    bases. Reads plain, gzip, bgzip, bzip2, xz and zstd files; `file`, if given, reads `path`, and
    all reading goes through it. Raises UserError, as soon as reading gets there, for a file that is
    missing, damaged, not FASTA or not DNA, and for records that are empty or share a name (which
    would make coordinates ambiguous).
    """
    for record, blocks in groupby(_records(path, file), key=itemgetter(0)):
        builder = _RangeBuilder(record, multiple)
        for _, lines in blocks:
            yield from builder.add(record.encode(lines))
        yield from builder.flush()


def read_counts(path: Path, file: HashingReader | None = None) -> Iterator[BlockCounts]:
    """Yields the base counts of a file, block by block.

    Takes half the time of `read_token_ranges`, with the same arguments and errors.
    """
    for record, lines in _records(path, file):
        ids, composition = None, _count_acgt(lines)
        if composition is None:
            ids = record.encode(lines)
            composition = np.array([np.count_nonzero(ids == base) for base in BASE_IDS])
        else:
            record.bases += int(composition.sum())
        yield BlockCounts(record.name, record.header, composition, ids)


def read_fasta(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and all token ids of each record, which has to fit into memory.

    Raises the same errors as `read_token_ranges`.
    """
    for name, ranges in groupby(read_token_ranges(path, 1), key=lambda it: it.name):
        yield name, np.concatenate([token_range.ids for token_range in ranges])


def _count_acgt(lines: bytes) -> np.ndarray | None:
    """Returns how often the lines have each of BASES, [5].

    Returns None if they have any character other than A, C, G, T and line ends; then the lines have
    to be encoded, which takes longer.
    """
    letters = np.frombuffer(lines, dtype=np.uint8)
    upper = letters & ~LOWER_CASE
    counts = [np.count_nonzero(upper == ord(base)) for base in "ACGT"]
    known = sum(counts) + np.count_nonzero(letters == ord("\n"))
    return np.array([*counts, 0]) if known == len(lines) else None


class _Record:
    """A record that is being read, with the number of its bases read so far."""

    def __init__(self, path: Path, header: str, names: set[str]):
        self._path, self.header, self.bases = path, header, 0
        self.name = header.split()[0] if header else ""
        if not self.name:
            raise UserError(f"{path}: record {len(names) + 1} has no name after its '>'")
        if self.name in names:
            raise UserError(f"{path}: two records are named {self.name}; names must be unique")
        names.add(self.name)

    def check_not_empty(self) -> None:
        """Raises UserError if the record has ended without any bases."""
        if self.bases:
            return
        if "\r" in self.header:
            raise UserError(
                f"{self._path}: lines end with a carriage return alone, as on old Macs; convert "
                "them with tr '\\r' '\\n'"
            )
        raise UserError(
            f"{self._path}: record {self.name} has no bases; remove it, or download the file again"
        )

    def encode(self, lines: bytes) -> np.ndarray:
        """Returns the token ids [bases] of further lines, and counts their bases."""
        try:
            ids = DnaTokenizer().encode(lines, skip=BLANKS, first=self.bases + 1)
        except UserError as error:
            raise UserError(
                f"{self._path}: this is not DNA: in record {self.name}, {error}"
            ) from None
        if b"U" in lines or b"u" in lines:
            raise UserError(
                f"{self._path}: record {self.name} looks like RNA because it has the letter U; "
                "give the DNA instead, or replace U with T"
            )
        self.bases += len(ids)
        return ids


class _RangeBuilder:
    """Builds the token ranges of a record; bases that do not complete a multiple are buffered."""

    def __init__(self, record: _Record, multiple: int):
        self._record, self._multiple = record, multiple
        self._start = 0  # the position of the first buffered base
        self._buffered: list[np.ndarray] = []
        self._count = 0  # the number of buffered bases

    def add(self, ids: np.ndarray) -> Iterator[TokenRange]:
        """Adds bases and yields the ranges that they complete.

        There are at most two: one of the buffered and the first new bases, which have to be copied
        together, and one of all other new bases, which need no copy.
        """
        missing = -self._count % self._multiple
        self._buffer(ids[:missing])
        if self._count == self._multiple:
            yield from self.flush()
        ids = ids[missing:]
        whole = len(ids) - len(ids) % self._multiple
        if whole:
            yield self._range(ids[:whole])
        self._buffer(ids[whole:])

    def flush(self) -> Iterator[TokenRange]:
        """Yields the buffered bases as a range, if there are any."""
        if self._count:
            buffered, self._buffered, self._count = self._buffered, [], 0
            yield self._range(np.concatenate(buffered))

    def _buffer(self, ids: np.ndarray) -> None:
        if len(ids):
            self._buffered.append(ids)
            self._count += len(ids)

    def _range(self, ids: np.ndarray) -> TokenRange:
        token_range = TokenRange(self._record.name, self._record.header, self._start, ids)
        self._start += len(ids)
        return token_range


def _records(path: Path, file: HashingReader | None) -> Iterator[tuple[_Record, bytes]]:
    """Yields the lines of each record, block by block.

    The caller must update the record's number of bases before it asks for the next block.
    """
    record: _Record | None = None
    names: set[str] = set()
    with explain_read_errors(path, "a FASTA file"):
        for header, lines in _text_blocks(path, file):
            if header is not None:
                if record is not None:
                    record.check_not_empty()
                record = _Record(path, header.decode().strip(), names)
            assert record is not None  # the first text of a file has a header
            yield record, lines
    if record is None:
        raise UserError(f"{path} is empty: it has no FASTA records")
    record.check_not_empty()


def _text_blocks(path: Path, file: HashingReader | None) -> Iterator[tuple[bytes | None, bytes]]:
    """Yields the text of a file in order: a record's header and its first lines, or None and more
    of its lines.

    Lines may be cut anywhere; headers are whole.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    with decompressed(path, file) as text_file:
        begun = False
        held = b"\n"  # text whose meaning depends on the next block: '>' after it begins a record
        while block := text_file.read(BLOCK):
            text = held + block
            # Searching for a single character first is many times faster than splitting.
            lines, *records = text.split(b"\n>") if b">" in text else (text,)
            held = b"\n" if block.endswith(b"\n") else b""
            if records and b"\n" not in records[-1]:  # a header that may continue in the next block
                held = b"\n>" + records.pop()
                if len(held) > LONGEST_HEADER:
                    raise UserError(
                        f"{path} is not a FASTA file: a header has more than {LONGEST_HEADER:,} "
                        "bytes"
                    )
            if begun:
                yield None, lines
            elif lines.strip(BLANKS):
                start = lines.strip(BLANKS)[:20].decode()
                if start.startswith(BYTE_ORDER_MARK):
                    raise UserError(
                        f"{path} begins with a byte-order mark, which is not part of FASTA: remove "
                        "it, for instance with sed -i '1s/^\\xEF\\xBB\\xBF//'"
                    )
                raise UserError(f"{path} is not a FASTA file: it begins with {start!r}, not '>'")
            for record in records:
                header, _, first_lines = record.partition(b"\n")
                yield header, first_lines
                begun = True
        if held.startswith(b"\n>"):
            yield held[2:], b""
