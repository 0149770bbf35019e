"""FASTA files, piece by piece, as token ids."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from data_prep.compressed import BLOCK, Hashed, reading, unpacked
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import PIECES, DnaTokenizer

N = PIECES.index("N")

LONGEST_HEADER = 1 << 20
BYTE_ORDER_MARK = "\ufeff"

BLANKS = b" \t\r\n\v\f"
"""What may stand between bases, or in an empty line."""


@dataclass(frozen=True)
class Piece:
    """The bases of a record from `start` on, counted from 0, as token ids."""

    name: str  # of the record: the first word of its header
    header: str  # without the '>'
    start: int
    ids: np.ndarray


def read_pieces(path: Path, multiple: int, file: Hashed | None = None) -> Iterator[Piece]:
    """All bases of a file in small pieces, so that no record need fit in memory.

    The pieces of a record follow each other, and but for its last one each has a multiple of
    `multiple` bases. Reads plain, gzip, bgzip, bzip2, xz and zstd files, through `file` if that
    reads `path`. Raises UserError, at the place where it is found, for a file that is missing,
    damaged, not FASTA or not DNA, and for records that are empty or share a name (then no
    coordinate would be certain).
    """
    record: _Record | None = None
    names: set[str] = set()
    with reading(path, "a FASTA file"):
        for header, lines in _parts(path, file):
            if header is not None:
                yield from record.rest() if record else ()
                record = _Record(path, header.decode().strip(), multiple, names)
            yield from record.add(lines)
        yield from record.rest() if record else ()
    if record is None:
        raise UserError(f"{path} is empty: it has no FASTA records")


def read_fasta(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Each record's name and token ids, the whole record in memory; errors as of read_pieces."""
    for name, pieces in groupby(read_pieces(path, 1), key=lambda piece: piece.name):
        yield name, np.concatenate([piece.ids for piece in pieces])


class _Record:
    """A record that is being read; bases that make no whole multiple yet wait for more."""

    def __init__(self, path: Path, header: str, multiple: int, names: set[str]):
        self._path, self._header, self._multiple = path, header, multiple
        self._name = header.split()[0] if header else ""
        if not self._name:
            raise UserError(f"{path}: record {len(names) + 1} has no name after its '>'")
        if self._name in names:
            raise UserError(f"{path}: two records are named {self._name}; names must be unique")
        names.add(self._name)
        self._start = 0  # of the bases that wait
        self._waiting: list[np.ndarray] = []
        self._count = 0  # how many wait

    def add(self, lines: bytes) -> Iterator[Piece]:
        """The pieces that these further lines of the record complete: one of those that wait and
        the first new ones, which have to be copied together, and one of all the others."""
        ids = self._encoded(lines)
        missing = -self._count % self._multiple
        self._wait_for(ids[:missing])
        if self._count == self._multiple:
            yield from self.rest()
        ids = ids[missing:]
        whole = len(ids) - len(ids) % self._multiple
        if whole:
            yield self._piece(ids[:whole])
        self._wait_for(ids[whole:])

    def rest(self) -> Iterator[Piece]:
        """The piece of all that wait, if any do."""
        if self._start + self._count == 0:
            raise UserError(self._empty())
        if self._count:
            waiting, self._waiting, self._count = self._waiting, [], 0
            yield self._piece(np.concatenate(waiting))

    def _empty(self) -> str:
        if "\r" in self._header:
            return (
                f"{self._path}: lines end with a carriage return alone, as on old Macs; write them "
                "anew, with tr '\\r' '\\n'"
            )
        return f"{self._path}: record {self._name} has no bases; take it away, or download the file anew"

    def _wait_for(self, ids: np.ndarray) -> None:
        if len(ids):
            self._waiting.append(ids)
            self._count += len(ids)

    def _piece(self, ids: np.ndarray) -> Piece:
        piece = Piece(self._name, self._header, self._start, ids)
        self._start += len(ids)
        return piece

    def _encoded(self, lines: bytes) -> np.ndarray:
        first = self._start + self._count + 1
        try:
            ids = DnaTokenizer().encode(lines, skip=BLANKS, first=first)
        except UserError as error:
            raise UserError(
                f"{self._path}: this is not DNA: in record {self._name}, {error}"
            ) from None
        if b"U" in lines or b"u" in lines:
            raise UserError(
                f"{self._path}: record {self._name} looks like RNA, it has the letter U; give the "
                "DNA instead, or write T for U"
            )
        return ids


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
