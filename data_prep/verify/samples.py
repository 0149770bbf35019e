"""Checks every fragment of a data set: that it is on the grid, in order, unique, on the strand that
was drawn, and has the bases of the FASTA file; and that each source has as many fragments as the
manifest says.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from data_prep import fragment
from data_prep.fasta import read_fasta
from data_prep.inspect.contents import ORIGINS_AT_A_TIME, count_fragments
from data_prep.inspect.opened import DataSet, Sequence, Split
from data_prep.manifest import file_facts
from data_prep.progress import Phase, Report
from data_prep.schema import DataConfig
from data_prep.sources import inputs
from data_prep.verify.files import Tally
from data_prep.write import RECORDS, draw_reversed, reverse_complement
from gengram_megatron.data_set import MANIFEST
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import BASE_IDS, BASES


@dataclass(frozen=True)
class Grid:
    """All positions that a fragment can have, numbered through all sequences in order."""

    seq_length: int
    first: np.ndarray  # [sequences + 1] the number of each sequence's first position; their total
    reverse: np.ndarray  # [positions] bool, whether the fragment there is reversed

    @classmethod
    def from_data_set(cls, data: DataSet) -> "Grid":
        """Returns the grid of a data set; the strands are drawn again."""
        settings, sequences = data.facts.settings, data.sequences
        counts = [sequence.bases // data.seq_length for sequence in sequences]
        draws = [
            draw_reversed(settings.seed, it.source, it.name, count, settings.reverse_complement)
            for it, count in zip(sequences, counts)
        ]
        return cls(data.seq_length, np.cumsum([0, *counts]), np.concatenate(draws))

    def positions(self, origins: np.ndarray) -> np.ndarray:
        """Returns the number of the position of each origin, [n] int64; -1 if it is beyond its
        sequence or off the grid."""
        valid = origins["record"] < len(self.first) - 1
        record = np.where(valid, origins["record"], 0).astype(np.int64)
        column, remainder = np.divmod(origins["start"], np.uint64(self.seq_length))
        valid &= (remainder == 0) & (column < (self.first[record + 1] - self.first[record]))
        return np.where(valid, self.first[record] + column.astype(np.int64), -1)


def check_positions(data: DataSet, splits: dict[str, Split]) -> Iterator[str]:
    """Yields problems of the origins of each split."""
    grid = Grid.from_data_set(data)
    occupied = np.zeros(len(grid.reverse), dtype=bool)
    for name, split in splits.items():
        yield from _check_split(name, split.origins, grid, occupied)
        yield from _check_counts(data, name, split.origins)


def _check_split(
    split: str, origins: np.ndarray, grid: Grid, occupied: np.ndarray
) -> Iterator[str]:
    """Yields problems of the origins of one split, and marks their positions in `occupied`."""
    off_grid, duplicates, unordered, wrong_strand = Tally(), Tally(), Tally(), Tally()
    previous = -1
    for start in range(0, len(origins), ORIGINS_AT_A_TIME):
        block = origins[start : start + ORIGINS_AT_A_TIME]
        positions = grid.positions(block)
        off_grid.add(start + np.flatnonzero(positions < 0))
        valid = np.flatnonzero(positions >= 0)
        positions = positions[valid]
        steps = np.diff(positions, prepend=previous)
        unordered.add(start + valid[steps < 0])
        is_duplicate = occupied[positions]
        if (steps <= 0).any():  # only then can a position occur twice in this block
            first = np.unique(positions, return_index=True)[1]
            is_duplicate[np.setdiff1d(np.arange(len(positions)), first)] = True
        duplicates.add(start + valid[is_duplicate])
        occupied[positions] = True
        expected = np.where(grid.reverse[positions], b"-", b"+")
        wrong_strand.add(start + valid[block["strand"][valid] != expected])
        previous = positions[-1] if len(positions) else previous
    for tally, what in (
        (off_grid, f"at a position that is not on the grid of a sequence in {RECORDS}"),
        (duplicates, "at a position that another document has, in this split or another"),
        (unordered, "not in the order of the sources"),
        (wrong_strand, "not on the strand that the seed draws for its position"),
    ):
        if tally.count:
            yield f"split {split}: {tally} {what}"


def _check_counts(data: DataSet, split: str, origins: np.ndarray) -> Iterator[str]:
    """Yields sources that have another number of fragments in the split than the manifest says."""
    fragments, _ = count_fragments(origins, len(data.sequences))
    counts = _sum_by_source(data.sequences, fragments.sum(axis=1).tolist())
    for source, facts in data.facts.sources.items():
        count, recorded = counts.get(source, 0), facts.fates[split]
        if count != recorded:
            yield (
                f"split {split} has {count:,} fragments of source {source}, but {MANIFEST} says "
                f"{recorded:,}"
            )


def _sum_by_source(sequences: list[Sequence], counts: list[int]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for sequence, count in zip(sequences, counts):
        sums[sequence.source] = sums.get(sequence.source, 0) + count
    return sums


BLOCK = 1 << 24  # approximate number of bases compared at a time


@dataclass(frozen=True)
class OrderedSplit:
    """A split whose documents are in the order of the sources."""

    split: Split
    first: np.ndarray  # [sequences + 1] the first document of each sequence; the total

    @classmethod
    def from_split(cls, data: DataSet, split: Split) -> "OrderedSplit":
        """Counts the documents of each sequence to find where they begin."""
        counts, _ = count_fragments(split.origins, len(data.sequences))
        return cls(split, np.cumsum(np.append(0, counts.sum(axis=1))))


def source_paths(data: DataSet, config: DataConfig, folder: Path) -> dict[str, Path]:
    """Returns the FASTA file of each source.

    Raises UserError if the config does not have the same sources as the data set.
    """
    paths = {source.key: source.path for source in inputs(config, folder)}
    differing = paths.keys() ^ data.facts.sources.keys()
    if differing:
        raise UserError(
            f"the config is not that of {data.folder}: only one of them has the sources "
            f"{', '.join(sorted(differing))}"
        )
    return paths


def check_source(
    data: DataSet, key: str, path: Path, splits: dict[str, OrderedSplit], report: Report
) -> Iterator[str]:
    """Yields problems of one source, which is read record by record."""
    try:
        facts = file_facts(path)
        if facts["sha256"] != data.facts.sources[key].sha256:
            yield f"{path} is not the file that {key} was built from: its checksum differs"
        yield from _compare(data, key, path, splits, report)
    except OSError as error:
        yield f"{path} cannot be read: {error.strerror} (source {key})"
    except UserError as error:
        yield str(error)


def _compare(
    data: DataSet, key: str, path: Path, splits: dict[str, OrderedSplit], report: Report
) -> Iterator[str]:
    indices = [i for i, sequence in enumerate(data.sequences) if sequence.source == key]
    wrong = {name: Tally() for name in splits}
    composition = np.zeros(len(BASES), dtype=np.int64)
    bases = sum(facts.bases for facts in data.facts.sources.values())
    phase = Phase("comparing with the sources", bases, "bases")
    for index, record in zip_longest(indices, read_fasta(path)):
        expected = None if index is None else data.sequences[index]
        actual = None if record is None else Sequence(key, record[0], len(record[1]))
        if actual != expected:
            yield (
                f"{path} has {_in_words(actual)} where the data set has {_in_words(expected)}; the "
                "rest of the file was not compared"
            )
            return
        ids = record[1]
        composition += [np.count_nonzero(ids == base) for base in BASE_IDS]
        for split, ordered in splits.items():
            wrong[split].add(_differing(ordered, index, ids, data.seq_length))
        report(phase, len(ids))
    for split, tally in wrong.items():
        if tally.count:
            yield f"split {split}: {tally} with other bases than {path} has at their coordinates"
    if dict(zip(BASES, composition.tolist())) != data.facts.sources[key].composition:
        yield f"{path}: its composition is not the one that {MANIFEST} has for source {key}"


def _in_words(sequence: Sequence | None) -> str:
    if sequence is None:
        return "no further sequence"
    return f"sequence {sequence.name} of {sequence.bases:,} bases"


def _differing(ordered: OrderedSplit, record: int, ids: np.ndarray, seq_length: int) -> np.ndarray:
    """Returns the numbers of the record's documents whose bases differ from those of the record at
    their coordinates, [n]."""
    first, end = ordered.first[record : record + 2].tolist()
    step = max(1, BLOCK // seq_length)
    differing = [np.empty(0, dtype=np.int64)]
    for start in range(first, end, step):
        block = slice(start, min(start + step, end))
        origins = ordered.split.origins[block]
        bases = fragment.grid(ids, seq_length)[origins["start"] // np.uint64(seq_length)]
        expected = reverse_complement(bases, origins["strand"] == b"-")
        differs = (expected != ordered.split.tokens[block, :-1]).any(axis=1)
        differing.append(start + np.flatnonzero(differs))
    return np.concatenate(differing)
