"""The grid of fragments of a record, and what becomes of each fragment."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from data_prep.fasta import N
from gengram_megatron.errors import UserError


class Fate(IntEnum):
    """What becomes of a fragment. Every step that drops fragments has a fate of its own, so
    counting fates says where each one went."""

    TRAIN = 0
    VALIDATION = 1
    STRADDLES = 2  # lies on both sides of the border of the validation split
    TOO_MANY_N = 3
    FAR_FROM_GENES = 4
    LEFT_OUT_OF_TRAIN = 5  # by the mix
    LEFT_OUT_OF_VALIDATION = 6


@dataclass(frozen=True)
class Record:
    """What is kept of a FASTA record once it was read: all but its bases.

    Fragment i of the grid covers bases i * seq_length to (i + 1) * seq_length; the bases after
    the last whole fragment are in none.
    """

    name: str
    length: int
    n_bases: np.ndarray  # the number of N in each fragment of the grid
    header: str = ""  # without the '>'


def grid(ids: np.ndarray, seq_length: int) -> np.ndarray:
    """A record's whole fragments as rows, without a copy: [fragments, seq_length]."""
    count = len(ids) // seq_length
    return ids[: count * seq_length].reshape(count, seq_length)


def count_n(start: int, ids: np.ndarray, seq_length: int) -> tuple[int, np.ndarray]:
    """The number of N that the bases of a record from `start` on, one or more, bring to each
    fragment in which they lie: the first such fragment, and from it on [fragments] uint32."""
    borders = np.arange(-(start % seq_length), len(ids), seq_length)
    borders[0] = 0
    is_n = (ids == N).view(np.uint8)
    return start // seq_length, np.add.reduceat(is_n, borders, dtype=np.uint32)


def add_n(counts: list[tuple[int, np.ndarray]], length: int, seq_length: int) -> np.ndarray:
    """The number of N in each whole fragment of a record of so many bases, [fragments] uint32, from
    what count_n says of those of its bases that hold any."""
    n_bases = np.zeros(-(-length // seq_length), dtype=np.uint32)
    for first, own in counts:
        n_bases[first : first + len(own)] += own
    return n_bases[: length // seq_length]


def check_longest(path: object, records: list[Record], seq_length: int) -> None:
    """Refuse a source of which no record holds a whole fragment."""
    longest = max(record.length for record in records)
    if longest < seq_length:
        raise UserError(
            f"{path}: its longest record has {longest:,} bases, "
            f"fewer than seq_length, which is {seq_length:,}"
        )


def drop_n(fates: np.ndarray, record: Record, seq_length: int, max_fraction: float) -> None:
    """Give the fragments with too large a share of N, of those not dropped yet, their fate."""
    fates[(fates == Fate.TRAIN) & (record.n_bases > max_fraction * seq_length)] = Fate.TOO_MANY_N
