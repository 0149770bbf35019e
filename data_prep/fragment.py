"""The grid of fragments of a record, and the fate of each fragment."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from data_prep.fasta import N
from gengram_megatron.errors import UserError


class Fate(IntEnum):
    """What becomes of a fragment.

    Every step that drops fragments has its own fate, so the counts of the fates account for every
    fragment.
    """

    TRAIN = 0
    VALIDATION = 1
    STRADDLES = 2  # crosses a border between the splits
    TOO_MANY_N = 3
    FAR_FROM_GENES = 4
    LEFT_OUT_OF_TRAIN = 5  # by the mix
    LEFT_OUT_OF_VALIDATION = 6  # by the mix


@dataclass(frozen=True)
class Record:
    """What is kept of a FASTA record after it was read: everything except its bases.

    Fragment i of the grid covers the bases [i * seq_length, (i + 1) * seq_length), counted from 0;
    the bases after the last whole fragment are in none.
    """

    name: str
    length: int  # bases
    n_bases: np.ndarray  # [fragments] uint32, the number of N in each fragment of the grid
    header: str = ""  # without the '>'


def grid(ids: np.ndarray, seq_length: int) -> np.ndarray:
    """Returns a record's whole fragments as rows, without a copy: [fragments, seq_length]."""
    count = len(ids) // seq_length
    return ids[: count * seq_length].reshape(count, seq_length)


def count_n(start: int, ids: np.ndarray, seq_length: int) -> tuple[int, np.ndarray]:
    """Counts the N in a range of a record's bases, by the fragment that they lie in.

    Args:
        start: the position of the first base in the record, counted from 0.
        ids: the token ids of the bases, at least one.
        seq_length: the number of bases of a fragment.

    Returns the index of the first fragment that has bases of the range, and the number of N in it
    and the following fragments, [fragments] uint32.
    """
    borders = np.arange(-(start % seq_length), len(ids), seq_length)
    borders[0] = 0
    is_n = (ids == N).view(np.uint8)
    return start // seq_length, np.add.reduceat(is_n, borders, dtype=np.uint32)


def add_n(counts: list[tuple[int, np.ndarray]], length: int, seq_length: int) -> np.ndarray:
    """Returns the number of N in each whole fragment of a record, [fragments] uint32.

    Args:
        counts: what `count_n` returned for the ranges of the record that have any N.
        length: the number of bases of the record.
        seq_length: the number of bases of a fragment.
    """
    n_bases = np.zeros(-(-length // seq_length), dtype=np.uint32)
    for first, range_counts in counts:
        n_bases[first : first + len(range_counts)] += range_counts
    return n_bases[: length // seq_length]


def check_longest(path: object, records: list[Record], seq_length: int) -> None:
    """Raises UserError for a source in which no record is long enough for a fragment."""
    longest = max(record.length for record in records)
    if longest < seq_length:
        raise UserError(
            f"{path}: its longest record has {longest:,} bases, "
            f"fewer than seq_length, which is {seq_length:,}"
        )


def drop_n(fates: np.ndarray, record: Record, seq_length: int, max_fraction: float) -> None:
    """Marks the fragments with too large a share of N as TOO_MANY_N, in place, unless they are
    dropped already."""
    fates[(fates == Fate.TRAIN) & (record.n_bases > max_fraction * seq_length)] = Fate.TOO_MANY_N
