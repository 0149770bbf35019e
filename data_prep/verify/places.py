"""Where the fragments come from: on the grid, in order, none twice, on the strand that was drawn,
and as many of each source as the manifest says."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.strand import draw_reversed
from data_prep.inspect.contents import ORIGINS_AT_A_TIME, count_fragments
from data_prep.inspect.opened import DataSet, Sequence, Split
from data_prep.manifest import MANIFEST
from data_prep.origins import RECORDS
from data_prep.verify.tally import Tally


@dataclass(frozen=True)
class Grid:
    """All places that a fragment can have, numbered through the sequences in their order."""

    seq_length: int
    first: np.ndarray  # [sequences + 1] the number of each sequence's first place; of none
    reverse: np.ndarray  # [places] whether a fragment there is turned

    @classmethod
    def of(cls, data: DataSet) -> "Grid":
        """The grid of a data set, with its strands drawn again."""
        settings, sequences = data.facts.settings, data.sequences
        places = [sequence.bases // data.seq_length for sequence in sequences]
        draws = [
            draw_reversed(settings.seed, own.source, own.name, count, settings.reverse_complement)
            for own, count in zip(sequences, places)
        ]
        return cls(data.seq_length, np.cumsum([0, *places]), np.concatenate(draws))

    def numbers(self, origins: np.ndarray) -> np.ndarray:
        """The place of each origin [n]; -1 where it lies beyond its sequence or off the grid."""
        there = origins["record"] < len(self.first) - 1
        record = np.where(there, origins["record"], 0).astype(np.int64)
        column, off = np.divmod(origins["start"], np.uint64(self.seq_length))
        there &= (off == 0) & (column < (self.first[record + 1] - self.first[record]))
        return np.where(there, self.first[record] + column.astype(np.int64), -1)


def check_places(data: DataSet, splits: dict[str, Split]) -> Iterator[str]:
    """Problems of the origins of each split."""
    grid = Grid.of(data)
    taken = np.zeros(len(grid.reverse), dtype=bool)
    for name, split in splits.items():
        yield from _check_split(name, split.origins, grid, taken)
        yield from _check_counts(data, name, split.origins)


def _check_split(split: str, origins: np.ndarray, grid: Grid, taken: np.ndarray) -> Iterator[str]:
    """Problems of one split's origins; marks their places as taken."""
    nowhere, twice, unordered, turned = Tally(), Tally(), Tally(), Tally()
    before = -1
    for start in range(0, len(origins), ORIGINS_AT_A_TIME):
        block = origins[start : start + ORIGINS_AT_A_TIME]
        places = grid.numbers(block)
        nowhere.add(start + np.flatnonzero(places < 0))
        known = np.flatnonzero(places >= 0)
        places = places[known]
        steps = np.diff(places, prepend=before)
        unordered.add(start + known[steps < 0])
        again = taken[places]
        if (steps <= 0).any():  # only then can this block have a place twice
            first = np.unique(places, return_index=True)[1]
            again[np.setdiff1d(np.arange(len(places)), first)] = True
        twice.add(start + known[again])
        taken[places] = True
        expected = np.where(grid.reverse[places], b"-", b"+")
        turned.add(start + known[block["strand"][known] != expected])
        before = places[-1] if len(places) else before
    for tally, what in (
        (nowhere, f"at a place that is not on the grid of a sequence in {RECORDS}"),
        (twice, "at a place that another document has already, in this split or another"),
        (unordered, "before its place in the order of the sources"),
        (turned, "not on the strand that the seed draws for its place"),
    ):
        if tally.count:
            yield f"split {split}: {tally} {what}"


def _check_counts(data: DataSet, split: str, origins: np.ndarray) -> Iterator[str]:
    """Whether each source has as many fragments in the split as the manifest says."""
    fragments, _ = count_fragments(origins, len(data.sequences))
    found = _sum_by_source(data.sequences, fragments.sum(axis=1).tolist())
    for source, facts in data.facts.sources.items():
        count, said = found.get(source, 0), facts.fates[split]
        if count != said:
            yield (
                f"split {split} has {count:,} fragments of source {source}, and {MANIFEST} says "
                f"{said:,}"
            )


def _sum_by_source(sequences: list[Sequence], counts: list[int]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for sequence, count in zip(sequences, counts):
        sums[sequence.source] = sums.get(sequence.source, 0) + count
    return sums
