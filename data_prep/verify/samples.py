"""Every fragment of a data set against the FASTA files: on the grid, in order, none twice, on the
strand that was drawn, as many of each source as the manifest says, and with the bases that it was
cut from.
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


BLOCK = 1 << 24  # bases compared at a time, about


@dataclass(frozen=True)
class Ordered:
    """A split whose documents are in the order of the sources."""

    split: Split
    first: np.ndarray  # [sequences + 1] the first document of each sequence; the end

    @classmethod
    def of(cls, data: DataSet, split: Split) -> "Ordered":
        """Count where each sequence's documents begin."""
        counts, _ = count_fragments(split.origins, len(data.sequences))
        return cls(split, np.cumsum(np.append(0, counts.sum(axis=1))))


def source_paths(data: DataSet, config: DataConfig, folder: Path) -> dict[str, Path]:
    """The FASTA file of each source. UserError if the config has other sources than the data."""
    paths = {source.key: source.path for source in inputs(config, folder)}
    other = paths.keys() ^ data.facts.sources.keys()
    if other:
        raise UserError(
            f"the config is not that of {data.folder}: only one of them has the sources "
            f"{', '.join(sorted(other))}"
        )
    return paths


def check_source(
    data: DataSet, key: str, path: Path, splits: dict[str, Ordered], report: Report
) -> Iterator[str]:
    """Problems of one source, which is read record by record."""
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
    data: DataSet, key: str, path: Path, splits: dict[str, Ordered], report: Report
) -> Iterator[str]:
    numbers = [n for n, sequence in enumerate(data.sequences) if sequence.source == key]
    wrong = {name: Tally() for name in splits}
    composition = np.zeros(len(BASES), dtype=np.int64)
    bases = sum(facts.bases for facts in data.facts.sources.values())
    phase = Phase("comparing with the sources", bases, "bases")
    for number, record in zip_longest(numbers, read_fasta(path)):
        expected = None if number is None else data.sequences[number]
        there = None if record is None else Sequence(key, record[0], len(record[1]))
        if there != expected:
            yield (
                f"{path} has {_words(there)} where the data set has {_words(expected)}; from there "
                "on it was not compared"
            )
            return
        ids = record[1]
        composition += [np.count_nonzero(ids == base) for base in BASE_IDS]
        for split, opened in splits.items():
            wrong[split].add(_differing(opened, number, ids, data.seq_length))
        report(phase, len(ids))
    for split, tally in wrong.items():
        if tally.count:
            yield f"split {split}: {tally} with other bases than {path} has at their coordinates"
    if dict(zip(BASES, composition.tolist())) != data.facts.sources[key].composition:
        yield f"{path}: its composition is not the one that {MANIFEST} has of source {key}"


def _words(sequence: Sequence | None) -> str:
    if sequence is None:
        return "no more sequence"
    return f"sequence {sequence.name} of {sequence.bases:,} bases"


def _differing(ordered: Ordered, record: int, ids: np.ndarray, seq_length: int) -> np.ndarray:
    """The documents of a record that do not hold its bases at their coordinates."""
    first, end = ordered.first[record : record + 2].tolist()
    step = max(1, BLOCK // seq_length)
    found = [np.empty(0, dtype=np.int64)]
    for start in range(first, end, step):
        block = slice(start, min(start + step, end))
        origins = ordered.split.origins[block]
        bases = fragment.grid(ids, seq_length)[origins["start"] // np.uint64(seq_length)]
        expected = reverse_complement(bases, origins["strand"] == b"-")
        differs = (expected != ordered.split.tokens[block, :-1]).any(axis=1)
        found.append(start + np.flatnonzero(differs))
    return np.concatenate(found)
