"""The second reading of a source: its fragments go to their place in the data set, some of them as
their reverse complement, with the files that lead from a fragment back to its coordinates.

`records.tsv` lists the records of all sources, a row each: source, record, bases.
`<split>.origins.npy` has for each document the row number, the start in that record, and the
strand: `-` where the document is the reverse complement of those bases, else `+`.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType

import numpy as np

from data_prep import fragment
from data_prep.fasta import TokenRange, read_pieces
from data_prep.fragment import Fate
from data_prep.schema import DataConfig
from data_prep.sources import Input
from data_prep.survey import Survey, changed, check_unchanged
from data_prep.workers import Advance
from gengram_megatron.tokenizer import EOD, DnaTokenizer

ORIGIN = np.dtype([("record", "<u4"), ("start", "<u8"), ("strand", "S1")])
RECORDS = "records.tsv"


def origins_path(folder: Path, split: str) -> Path:
    """The file with the origins of a split."""
    return folder / f"{split}.origins.npy"


def write_records(folder: Path, rows: list[tuple[str, str, int]]) -> None:
    """Write records.tsv; a row is source, record and bases."""
    lines = ["source\trecord\tbases", *("\t".join(map(str, row)) for row in rows)]
    (folder / RECORDS).write_text("\n".join(lines) + "\n")


def _complements() -> np.ndarray:
    """The complement of each token id; those that are no base stay."""
    table = np.arange(EOD + 1, dtype=np.uint8)
    table[DnaTokenizer().encode("ACGTN")] = DnaTokenizer().encode("TGCAN")
    return table


_COMPLEMENTS = _complements()


def draw_reversed(seed: int, source: str, record: str, count: int, share: float) -> np.ndarray:
    """Whether each of the `count` fragments of a record's grid is turned, with probability
    `share`: [count] bool.

    Philox counts instead of keeping a state: its i-th number is a hash of i under its key, here
    the seed, source and record. So a fragment's strand hangs on its place alone, not on which
    others are there or on the order of work.
    """
    place = "\0".join((str(seed), source, record)).encode()
    key = int.from_bytes(hashlib.blake2b(place, digest_size=16).digest(), "little")
    uniform = (np.random.Philox(key=key).random_raw(count) >> np.uint64(11)) * 2.0**-53
    return uniform < share


def reverse_complement(fragments: np.ndarray, reverse: np.ndarray) -> np.ndarray:
    """Fragments [count, seq_length] of token ids, those of `reverse` [count] turned; the same array if
    there are none."""
    if not reverse.any():
        return fragments
    turned = fragments.copy()
    turned[reverse] = _COMPLEMENTS[fragments[reverse, ::-1]]
    return turned


SPLITS = {"train": Fate.TRAIN, "validation": Fate.VALIDATION}


INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION, UINT8 = 1, 1
INDEX_BYTES = 4 + 8 + 8
"""Of a document in the index: its length, where it starts, and its number."""

AT_A_TIME = 1 << 20
"""Entries of an index that are written at a time."""


def tokens_path(folder: Path, split: str) -> Path:
    """The file with the documents of a split."""
    return folder / f"{split}.bin"


def prepare_split(folder: Path, split: str, count: int, tokens: int) -> None:
    """Make the files of a split of `count` documents of `tokens` tokens: its index whole, the
    others in their full size for SplitWriters to fill.

    The index is that of megatron-core's IndexedDatasetBuilder, byte for byte. That one keeps a
    Python number for each document, which is a gigabyte for 25 million.
    """
    with (folder / f"{split}.idx").open("wb") as file:
        file.write(INDEX_MAGIC + struct.pack("<QBQQ", INDEX_VERSION, UINT8, count, count + 1))
        for scale, offset, kind, entries in (
            (0, tokens, np.int32, count),  # lengths of the sequences
            (tokens, 0, np.int64, count),  # where they start, bytes
            (1, 0, np.int64, count + 1),  # the first sequence of each document, and their number
        ):
            for start in range(0, entries, AT_A_TIME):
                numbers = np.arange(start, min(start + AT_A_TIME, entries))
                file.write((numbers * scale + offset).astype(kind))
    with tokens_path(folder, split).open("wb") as file:
        file.truncate(count * tokens)
    header = {"descr": ORIGIN.descr, "fortran_order": False, "shape": (count,)}
    with origins_path(folder, split).open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + count * ORIGIN.itemsize)


class SplitWriter:
    """Writes documents of a split, from number `first` on: a fragment's bases and EOD to
    `<split>.bin`, where it comes from to `<split>.origins.npy`. Several may fill one split."""

    def __init__(self, folder: Path, split: str, first: int = 0):
        self._first = first
        self._tokens = tokens_path(folder, split).open("r+b")
        self._origins = origins_path(folder, split).open("r+b")
        np.lib.format.read_magic(self._origins)
        np.lib.format.read_array_header_1_0(self._origins)
        self._origins.seek(first * ORIGIN.itemsize, os.SEEK_CUR)

    def __enter__(self) -> "SplitWriter":
        return self

    def add(
        self, fragments: np.ndarray, record: int, starts: np.ndarray, reverse: np.ndarray
    ) -> None:
        """Append fragments [count, seq_length] of one record, a row number of records.tsv, and
        say where they start in it and which are its reverse complement (both [count])."""
        count, seq_length = fragments.shape
        tokens = np.empty((count, seq_length + 1), dtype=np.uint8)
        tokens[:, :-1], tokens[:, -1] = fragments, EOD
        if self._first:
            self._tokens.seek(self._first * (seq_length + 1))
            self._first = 0
        self._tokens.write(tokens)
        origins = np.empty(count, dtype=ORIGIN)
        origins["record"], origins["start"] = record, starts
        origins["strand"] = np.where(reverse, b"-", b"+")
        self._origins.write(origins)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._tokens, self._origins):
            # The disk may be full: what is still in the buffer fails again, and is not wanted.
            with suppress(OSError) if kind else nullcontext():
                file.close()


@dataclass(frozen=True)
class Part:
    """What one source adds to a data set, and where."""

    number: int  # among the sources
    source: Input
    survey: Survey
    fates: np.ndarray  # of its fragments, after the mix
    first_row: int  # of its records in records.tsv
    first: dict[str, int]  # the number of its first document in each split


def write_part(part: Part, advance: Advance, folder: Path, config: DataConfig) -> None:
    """Read a source once more and write its fragments into the prepared files of `folder`."""
    check_unchanged(part.source, part.survey.stamps)
    with ExitStack() as stack:
        writers = {
            fate: stack.enter_context(SplitWriter(folder, split, part.first[split]))
            for split, fate in SPLITS.items()
        }
        for row, piece, fates, reverse in _fragments(part, config):
            fragments = fragment.grid(piece.ids, config.seq_length)
            for fate, writer in writers.items():
                chosen = np.flatnonzero(fates == fate)
                if len(chosen) == 0:
                    continue
                # Most pieces go to one split whole, and need not be copied for it.
                kept = fragments if len(chosen) == len(fragments) else fragments[chosen]
                turned = reverse_complement(kept, reverse[chosen])
                starts = piece.start + chosen * config.seq_length
                writer.add(turned, part.first_row + row, starts, reverse[chosen])
            advance(len(piece.ids))
    check_unchanged(part.source, part.survey.stamps)


def _fragments(
    part: Part, config: DataConfig
) -> Iterator[tuple[int, TokenRange, np.ndarray, np.ndarray]]:
    """The pieces of a source, each with the number of its record, and of its whole fragments the
    fates and whether they are turned, both [fragments]."""
    source, survey, length = part.source, part.survey, config.seq_length
    ends = np.cumsum(survey.lengths // length)
    pieces = read_pieces(source.path, length)
    for row, (name, own) in enumerate(groupby(pieces, key=lambda piece: piece.name)):
        if survey.names[row : row + 1] != [name]:
            raise changed(source.path)
        count = int(survey.lengths[row]) // length
        fates = part.fates[ends[row] - count : ends[row]]
        reverse = draw_reversed(config.seed, source.key, name, count, config.reverse_complement)
        for piece in own:
            if piece.start + len(piece.ids) > survey.lengths[row]:
                raise changed(source.path)
            here = slice(piece.start // length, (piece.start + len(piece.ids)) // length)
            yield row, piece, fates[here], reverse[here]
