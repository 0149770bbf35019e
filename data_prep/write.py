"""The second reading of a source: writes its fragments to their location in the data set, some of
them as their reverse complement, and the files that lead from a fragment back to its coordinates.

`records.tsv` has a row for each record of all sources: source, record, bases.
`<split>.origins.npy` has for each document the row number, the start in that record, and the
strand: `-` if the document is the reverse complement of those bases, else `+`.
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
from data_prep.fasta import TokenRange, read_token_ranges
from data_prep.fragment import Fate
from data_prep.schema import DataConfig
from data_prep.sources import Input
from data_prep.survey import Survey, changed, check_unchanged
from data_prep.workers import Advance
from gengram_megatron.tokenizer import EOD, DnaTokenizer

ORIGIN = np.dtype([("record", "<u4"), ("start", "<u8"), ("strand", "S1")])
RECORDS = "records.tsv"


def origins_path(folder: Path, split: str) -> Path:
    """Returns the path of the file with the origins of a split."""
    return folder / f"{split}.origins.npy"


def write_records(folder: Path, rows: list[tuple[str, str, int]]) -> None:
    """Writes records.tsv; a row is source, record and number of bases."""
    lines = ["source\trecord\tbases", *("\t".join(map(str, row)) for row in rows)]
    (folder / RECORDS).write_text("\n".join(lines) + "\n")


def _complements() -> np.ndarray:
    """Returns the complement of each token id, [EOD + 1] uint8; ids that are not bases map to
    themselves."""
    table = np.arange(EOD + 1, dtype=np.uint8)
    table[DnaTokenizer().encode("ACGTN")] = DnaTokenizer().encode("TGCAN")
    return table


_COMPLEMENTS = _complements()


def draw_reversed(seed: int, source: str, record: str, count: int, share: float) -> np.ndarray:
    """Draws which of the `count` fragments of a record's grid are reversed, each with probability
    `share`: [count] bool.

    Philox is counter-based: its i-th number is a hash of i under its key, here the seed, source and
    record. So a fragment's strand depends only on its position, not on which other fragments exist
    or on the order of the work.
    """
    identity = "\0".join((str(seed), source, record)).encode()
    key = int.from_bytes(hashlib.blake2b(identity, digest_size=16).digest(), "little")
    uniform = (np.random.Philox(key=key).random_raw(count) >> np.uint64(11)) * 2.0**-53
    return uniform < share


def reverse_complement(fragments: np.ndarray, reverse: np.ndarray) -> np.ndarray:
    """Returns fragments of which those selected by `reverse` are reverse-complemented.

    Args:
        fragments: [count, seq_length] token ids.
        reverse: [count] bool.

    Returns [count, seq_length] token ids; `fragments` itself if none is selected.
    """
    if not reverse.any():
        return fragments
    oriented = fragments.copy()
    oriented[reverse] = _COMPLEMENTS[fragments[reverse, ::-1]]
    return oriented


SPLITS = {"train": Fate.TRAIN, "validation": Fate.VALIDATION}
"""The splits, with the fate of the fragments that each of them holds."""


INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION, UINT8 = 1, 1
INDEX_BYTES = 4 + 8 + 8
"""Bytes per document in the index: for its length, its offset and its number."""

AT_A_TIME = 1 << 20
"""Entries of an index that are written at a time."""


def tokens_path(folder: Path, split: str) -> Path:
    """Returns the path of the file with the documents of a split."""
    return folder / f"{split}.bin"


def prepare_split(folder: Path, split: str, count: int, tokens: int) -> None:
    """Creates the files of a split of `count` documents of `tokens` tokens each.

    The index is complete; the other files have their full size and are filled by SplitWriters.

    The index is byte for byte the one that megatron-core's IndexedDatasetBuilder writes. That
    builder keeps a Python number for each document, which is a gigabyte for 25 million documents.
    """
    with (folder / f"{split}.idx").open("wb") as file:
        file.write(INDEX_MAGIC + struct.pack("<QBQQ", INDEX_VERSION, UINT8, count, count + 1))
        for scale, offset, kind, entries in (
            (0, tokens, np.int32, count),  # length of each sequence
            (tokens, 0, np.int64, count),  # offset of each sequence in bytes
            (1, 0, np.int64, count + 1),  # first sequence of each document, then their number
        ):
            for start in range(0, entries, AT_A_TIME):
                numbers = np.arange(start, min(start + AT_A_TIME, entries))
                file.write((numbers * scale + offset).astype(kind).data)
    with tokens_path(folder, split).open("wb") as file:
        file.truncate(count * tokens)
    header = {"descr": ORIGIN.descr, "fortran_order": False, "shape": (count,)}
    with origins_path(folder, split).open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + count * ORIGIN.itemsize)


class SplitWriter:
    """Writes documents of a split, from number `first` on: the bases of a fragment and EOD to
    `<split>.bin`, its origin to `<split>.origins.npy`. Several writers may fill one split."""

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
        """Appends fragments of one record.

        Args:
            fragments: [count, seq_length] token ids.
            record: the record's row number in records.tsv.
            starts: where each fragment starts in the record, [count].
            reverse: which fragments are reverse complements, [count] bool.
        """
        count, seq_length = fragments.shape
        tokens = np.empty((count, seq_length + 1), dtype=np.uint8)
        tokens[:, :-1], tokens[:, -1] = fragments, EOD
        if self._first:
            self._tokens.seek(self._first * (seq_length + 1))
            self._first = 0
        self._tokens.write(tokens.data)
        origins = np.empty(count, dtype=ORIGIN)
        origins["record"], origins["start"] = record, starts
        origins["strand"] = np.where(reverse, b"-", b"+")
        self._origins.write(origins.data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._tokens, self._origins):
            # The disk may be full: writing what is buffered would fail again, and is not needed.
            with suppress(OSError) if kind else nullcontext():
                file.close()


@dataclass(frozen=True)
class SourcePlan:
    """What one source adds to a data set, and where."""

    index: int  # the source's position among all sources
    source: Input
    survey: Survey
    fates: np.ndarray  # [fragments] uint8, the fates of its fragments after the mix
    first_row: int  # the row of its first record in records.tsv
    first: dict[str, int]  # the number of its first document in each split


def write_source(plan: SourcePlan, advance: Advance, folder: Path, config: DataConfig) -> None:
    """Reads a source again and writes its fragments into the prepared files of `folder`."""
    check_unchanged(plan.source, plan.survey.stamps)
    with ExitStack() as stack:
        writers = {
            fate: stack.enter_context(SplitWriter(folder, split, plan.first[split]))
            for split, fate in SPLITS.items()
        }
        for row, token_range, fates, reverse in _fragments(plan, config):
            fragments = fragment.grid(token_range.ids, config.seq_length)
            for fate, writer in writers.items():
                chosen = np.flatnonzero(fates == fate)
                if len(chosen) == 0:
                    continue
                # Most ranges go to one split entirely, and then need no copy.
                kept = fragments if len(chosen) == len(fragments) else fragments[chosen]
                oriented = reverse_complement(kept, reverse[chosen])
                starts = token_range.start + chosen * config.seq_length
                writer.add(oriented, plan.first_row + row, starts, reverse[chosen])
            advance(len(token_range.ids))
    check_unchanged(plan.source, plan.survey.stamps)


def _fragments(
    plan: SourcePlan, config: DataConfig
) -> Iterator[tuple[int, TokenRange, np.ndarray, np.ndarray]]:
    """Yields the token ranges of a source: the index of the record, the range, and for its whole
    fragments their fates [fragments] and whether they are reversed [fragments]."""
    source, survey, length = plan.source, plan.survey, config.seq_length
    ends = np.cumsum(survey.lengths // length)
    all_ranges = read_token_ranges(source.path, length)
    for row, (name, token_ranges) in enumerate(groupby(all_ranges, key=lambda it: it.name)):
        if survey.names[row : row + 1] != [name]:
            raise changed(source.path)
        count = int(survey.lengths[row]) // length
        fates = plan.fates[ends[row] - count : ends[row]]
        reverse = draw_reversed(config.seed, source.key, name, count, config.reverse_complement)
        for token_range in token_ranges:
            end = token_range.start + len(token_range.ids)
            if end > survey.lengths[row]:
                raise changed(source.path)
            covered = slice(token_range.start // length, end // length)
            yield row, token_range, fates[covered], reverse[covered]
