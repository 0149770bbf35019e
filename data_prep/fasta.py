"""FASTA files, piece by piece, as token ids."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from data_prep.compressed import BLOCK, Hashed, reading, unpacked
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import BASE_IDS, PIECES, DnaTokenizer

N = PIECES.index("N")

LONGEST_HEADER = 1 << 20
BYTE_ORDER_MARK = "\ufeff"

BLANKS = b" \t\r\n\v\f"
"""What may stand between bases, or in an empty line."""

LOWER_CASE = np.uint8(0x20)
"""The bit of a letter that says so."""


@dataclass(frozen=True)
class TokenRange:
    """The bases of a record from `start` on, counted from 0, as token ids."""

    name: str  # of the record: the first word of its header
    header: str  # without the '>'
    start: int
    ids: np.ndarray


@dataclass(frozen=True)
class Counted:
    """How many bases of each kind some further lines of a record hold."""

    name: str  # of the record
    header: str
    composition: np.ndarray  # [5], in the order of BASES
    ids: np.ndarray | None  # their token ids, where they are not all A, C, G and T


def read_pieces(path: Path, multiple: int, file: Hashed | None = None) -> Iterator[TokenRange]:
    """All bases of a file in small pieces, so that no record need fit in memory.

    The pieces of a record follow each other, and but for its last one each has a multiple of
    `multiple` bases. Reads plain, gzip, bgzip, bzip2, xz and zstd files, through `file` if that
    reads `path`. Raises UserError, at the place where it is found, for a file that is missing,
    damaged, not FASTA or not DNA, and for records that are empty or share a name (then no
    coordinate would be certain).
    """
    for record, blocks in groupby(_records(path, file), key=itemgetter(0)):
        pieces = _Pieces(record, multiple)
        for _, lines in blocks:
            yield from pieces.add(record.encode(lines))
        yield from pieces.rest()


def read_counts(path: Path, file: Hashed | None = None) -> Iterator[Counted]:
    """What a file holds, block by block: files and errors as of read_pieces, in half the time."""
    for record, lines in _records(path, file):
        ids, composition = None, _count_acgt(lines)
        if composition is None:
            ids = record.encode(lines)
            composition = np.array([np.count_nonzero(ids == base) for base in BASE_IDS])
        else:
            record.bases += int(composition.sum())
        yield Counted(record.name, record.header, composition, ids)


def read_fasta(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Each record's name and token ids, the whole record in memory; errors as of read_pieces."""
    for name, pieces in groupby(read_pieces(path, 1), key=lambda piece: piece.name):
        yield name, np.concatenate([piece.ids for piece in pieces])


def _count_acgt(lines: bytes) -> np.ndarray | None:
    """How often lines have each of BASES; None if they have any other letter than A, C, G, T and
    the ends of lines, for what it is only their encoding says, which takes longer."""
    letters = np.frombuffer(lines, dtype=np.uint8)
    upper = letters & ~LOWER_CASE
    counts = [np.count_nonzero(upper == ord(base)) for base in "ACGT"]
    known = sum(counts) + np.count_nonzero(letters == ord("\n"))
    return np.array([*counts, 0]) if known == len(lines) else None


class _Record:
    """A record that is being read, and how many bases it had until here."""

    def __init__(self, path: Path, header: str, names: set[str]):
        self._path, self.header, self.bases = path, header, 0
        self.name = header.split()[0] if header else ""
        if not self.name:
            raise UserError(f"{path}: record {len(names) + 1} has no name after its '>'")
        if self.name in names:
            raise UserError(f"{path}: two records are named {self.name}; names must be unique")
        names.add(self.name)

    def check_not_empty(self) -> None:
        """Refuse a record that has ended without any bases."""
        if self.bases:
            return
        if "\r" in self.header:
            raise UserError(
                f"{self._path}: lines end with a carriage return alone, as on old Macs; write them "
                "anew, with tr '\\r' '\\n'"
            )
        raise UserError(
            f"{self._path}: record {self.name} has no bases; take it away, or download the file anew"
        )

    def encode(self, lines: bytes) -> np.ndarray:
        """The token ids of further lines, which count as read."""
        try:
            ids = DnaTokenizer().encode(lines, skip=BLANKS, first=self.bases + 1)
        except UserError as error:
            raise UserError(
                f"{self._path}: this is not DNA: in record {self.name}, {error}"
            ) from None
        if b"U" in lines or b"u" in lines:
            raise UserError(
                f"{self._path}: record {self.name} looks like RNA, it has the letter U; give the "
                "DNA instead, or write T for U"
            )
        self.bases += len(ids)
        return ids


class _Pieces:
    """The pieces of a record; bases that make no whole multiple yet wait for more."""

    def __init__(self, record: _Record, multiple: int):
        self._record, self._multiple = record, multiple
        self._start = 0  # of the bases that wait
        self._waiting: list[np.ndarray] = []
        self._count = 0  # how many wait

    def add(self, ids: np.ndarray) -> Iterator[TokenRange]:
        """The pieces that these further bases complete: one of those that wait and the first new
        ones, which have to be copied together, and one of all the others."""
        missing = -self._count % self._multiple
        self._wait_for(ids[:missing])
        if self._count == self._multiple:
            yield from self.rest()
        ids = ids[missing:]
        whole = len(ids) - len(ids) % self._multiple
        if whole:
            yield self._piece(ids[:whole])
        self._wait_for(ids[whole:])

    def rest(self) -> Iterator[TokenRange]:
        """The piece of all that wait, if any do."""
        if self._count:
            waiting, self._waiting, self._count = self._waiting, [], 0
            yield self._piece(np.concatenate(waiting))

    def _wait_for(self, ids: np.ndarray) -> None:
        if len(ids):
            self._waiting.append(ids)
            self._count += len(ids)

    def _piece(self, ids: np.ndarray) -> TokenRange:
        piece = TokenRange(self._record.name, self._record.header, self._start, ids)
        self._start += len(ids)
        return piece


def _records(path: Path, file: Hashed | None) -> Iterator[tuple[_Record, bytes]]:
    """The lines of each record, block by block. The caller counts the bases of a record before it
    asks for more."""
    record: _Record | None = None
    names: set[str] = set()
    with reading(path, "a FASTA file"):
        for header, lines in _parts(path, file):
            if header is not None:
                if record is not None:
                    record.check_not_empty()
                record = _Record(path, header.decode().strip(), names)
            yield record, lines
    if record is None:
        raise UserError(f"{path} is empty: it has no FASTA records")
    record.check_not_empty()


def _parts(path: Path, file: Hashed | None) -> Iterator[tuple[bytes | None, bytes]]:
    """The text of a file in order: a record's header and its first lines, or None and more of its
    lines. Lines may be cut anywhere, headers are whole."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    with unpacked(path, file) as unpacked_file:
        begun = False
        held = b"\n"  # what the next block decides on: a '>' after this begins a record
        while block := unpacked_file.read(BLOCK):
            text = held + block
            # To look for one character alone is many times as fast.
            lines, *records = text.split(b"\n>") if b">" in text else (text,)
            held = b"\n" if block.endswith(b"\n") else b""
            if records and b"\n" not in records[-1]:  # a header that may go on
                held = b"\n>" + records.pop()
                if len(held) > LONGEST_HEADER:
                    raise UserError(
                        f"{path} is not a FASTA file: a header has more than {LONGEST_HEADER:,} bytes"
                    )
            if begun:
                yield None, lines
            elif lines.strip(BLANKS):
                start = lines.strip(BLANKS)[:20].decode()
                if start.startswith(BYTE_ORDER_MARK):
                    raise UserError(
                        f"{path} begins with a byte-order mark, which is no part of FASTA: take it "
                        "away, for instance with sed -i '1s/^\\xEF\\xBB\\xBF//'"
                    )
                raise UserError(f"{path} is not a FASTA file: it begins with {start!r}, not '>'")
            for record in records:
                header, _, first_lines = record.partition(b"\n")
                yield header, first_lines
                begun = True
        if held.startswith(b"\n>"):
            yield held[2:], b""
