"""Every fragment's bases against the FASTA files that they were cut from."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from data_prep import fragment
from data_prep.fasta import read_fasta
from data_prep.inspect.contents import count_fragments
from data_prep.inspect.opened import DataSet, Sequence, Split
from data_prep.manifest import MANIFEST, file_facts
from data_prep.progress import Phase, Report
from data_prep.schema import DataConfig
from data_prep.sources import inputs
from data_prep.strand import reverse_complement
from data_prep.verify.tally import Tally
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import BASE_IDS, BASES

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
