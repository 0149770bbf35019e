"""Computes what a data set holds: fragments by source, sequence and strand, their composition, and
the origin of a single sample.

All fragments are counted, from the table of origins. Their bases are counted in a sample of
fragments only, evenly spread over the split, because a large data set has hundreds of gigabytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.inspect.opened import DataSet, Split
from data_prep.write import RECORDS
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import BASE_IDS, BASES, DnaTokenizer

ORIGINS_AT_A_TIME = 1 << 20
FRAGMENT_BYTES_AT_A_TIME = 1 << 22

Report = Callable[[int], None]
"""A callback that is told in how many more fragments the bases were counted."""


@dataclass(frozen=True)
class SplitContents:
    """The counts of one split."""

    fragments: np.ndarray  # [sequences, 2] fragments of each sequence, forward and reverse
    sampled: np.ndarray  # [n] the sequence index of each fragment in which bases were counted
    bases: np.ndarray  # [n, 5] how often each of these fragments has A, C, G, T and N

    def summary(self, sequences: np.ndarray) -> dict[str, Any]:
        """Returns counts and composition of the fragments of some sequences.

        Args:
            sequences: selects the sequences, [sequences] bool.
        """
        forward, reverse = self.fragments[sequences].sum(axis=0).tolist()
        return {
            "fragments": forward + reverse,
            "strands": {"+": forward, "-": reverse},
            **composition(self.bases[sequences[self.sampled]]),
        }


def composition(bases: np.ndarray) -> dict[str, Any]:
    """Returns the shares of A, C, G, T and N in fragments, and that of G and C without N.

    A share is None if there are no bases.

    Args:
        bases: the number of A, C, G, T and N in each fragment, [n, 5].
    """
    sums = dict(zip(BASES, bases.sum(axis=0).tolist()))
    known = sum(sums.values()) - sums["N"]
    return {
        "looked_at": len(bases),
        "composition": {base: _share(count, sum(sums.values())) for base, count in sums.items()},
        "gc": _share(sums["G"] + sums["C"], known),
    }


def contents(data: DataSet, limit: int | None, report: Report) -> dict[str, SplitContents]:
    """Returns the counts of all splits, by name.

    Args:
        data: the data set.
        limit: in how many fragments of each split bases are counted, at most; None for all.
        report: is told about progress.
    """
    return {name: _split_contents(data, name, limit, report) for name in data.facts.splits}


def fragments_to_count(data: DataSet, limit: int | None) -> int:
    """Returns the number of fragments in which `contents` counts bases."""
    return sum(
        split.fragments if limit is None else min(split.fragments, limit)
        for split in data.facts.splits.values()
    )


def _split_contents(data: DataSet, name: str, limit: int | None, report: Report) -> SplitContents:
    count = data.facts.splits[name].fragments
    sample_size = count if limit is None else min(count, limit)
    split = data.split(name, scattered=sample_size < count)
    fragments, unknown = count_fragments(split.origins, len(data.sequences))
    if unknown:
        raise UserError(
            f"{data.folder} is damaged: {unknown:,} fragments of split {name} are of sequences "
            f"that {RECORDS} does not list"
        )
    indices = np.arange(sample_size) * count // max(sample_size, 1)
    bases = _count_bases(split, indices, report)
    return SplitContents(fragments, split.origins["record"][indices], bases)


def count_fragments(origins: np.ndarray, sequences: int) -> tuple[np.ndarray, int]:
    """Counts the fragments of each sequence.

    Args:
        origins: the origins of a split, [fragments] of data_prep.write.ORIGIN.
        sequences: the number of sequences.

    Returns the number of fragments, forward and reverse, [sequences, 2], and how many fragments are
    of no known sequence.
    """
    counts = np.zeros(2 * (sequences + 1), dtype=np.int64)  # the last row: of no known sequence
    for start in range(0, len(origins), ORIGINS_AT_A_TIME):
        block = origins[start : start + ORIGINS_AT_A_TIME]
        rows = np.minimum(block["record"].astype(np.int64), sequences)
        counts += np.bincount(2 * rows + (block["strand"] == b"-"), minlength=len(counts))
    return counts[:-2].reshape(-1, 2), int(counts[-2:].sum())


def _count_bases(split: Split, indices: np.ndarray, report: Report) -> np.ndarray:
    """Returns the number of A, C, G, T and N in each of the fragments, [len(indices), 5]."""
    counts = np.empty((len(indices), len(BASES)), dtype=np.int64)
    step = max(1, FRAGMENT_BYTES_AT_A_TIME // split.tokens.shape[1])
    for start in range(0, len(indices), step):
        block = split.tokens[indices[start : start + step]]
        for column, base in enumerate(BASE_IDS):
            counts[start : start + step, column] = (block == base).sum(axis=1, dtype=np.uint32)
        report(len(block))
    return counts


def describe(
    data: DataSet, split_contents: dict[str, SplitContents], by_sequence: bool
) -> dict[str, Any]:
    """Returns all counts as plain values: what `--json` prints and the tables show.

    Args:
        data: the data set.
        split_contents: what `contents` returned.
        by_sequence: also list the fragments of each sequence.
    """
    sources = np.array([sequence.source for sequence in data.sequences])
    groups = np.array([source.split("/")[0] for source in sources])
    everything = np.ones(len(sources), dtype=bool)
    tokens = data.seq_length + 1
    description = {
        "folder": str(data.folder),
        "seq_length": data.seq_length,
        "settings": data.facts.settings.model_dump(),
        "splits": {
            name: {"tokens": tokens * int(split.fragments.sum()), **split.summary(everything)}
            for name, split in split_contents.items()
        },
        "groups": {
            key: {name: split.summary(groups == key) for name, split in split_contents.items()}
            for key in data.facts.groups
        },
        "sources": {
            key: {
                "fasta": facts.fasta,
                "genes": facts.genes,
                "records": facts.records,
                "bases": facts.bases,
                "fates": facts.fates,
                **{name: split.summary(sources == key) for name, split in split_contents.items()},
            }
            for key, facts in data.facts.sources.items()
        },
    }
    if by_sequence:
        description["sequences"] = [
            {
                "source": sequence.source,
                "sequence": sequence.name,
                "bases": sequence.bases,
                **{
                    name: int(split.fragments[index].sum())
                    for name, split in split_contents.items()
                },
            }
            for index, sequence in enumerate(data.sequences)
        ]
    return description


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


SHOWN = 60  # bases from each end


def locate(data: DataSet, split: str, number: int) -> dict[str, Any]:
    """Returns where a sample of a split comes from, and how it begins and ends.

    `start` and `end` count from 0, half-open, on the forward strand; `region` says the same for
    samtools, which counts from 1 with both ends included. The bases are as stored: those of the
    reverse complement where `strand` is "-".
    """
    opened = data.split(split, scattered=True)
    count = len(opened.origins)
    if not 0 <= number < count:
        raise UserError(
            f"there is no sample {number} in split {split} of {data.folder}; "
            + (f"it has samples 0 to {count - 1}" if count else "it has none")
        )
    record, start, strand = opened.origins[number].item()
    if record >= len(data.sequences):
        raise UserError(
            f"{data.folder} is damaged: sample {number} of {split} is of sequence {record}, but "
            f"there are {len(data.sequences)}; gengram-data verify tells more"
        )
    sequence, end = data.sequences[record], start + data.seq_length
    bases = DnaTokenizer().decode(opened.tokens[number, :-1])
    return {
        "sample": number,
        "split": split,
        "source": sequence.source,
        "fasta": data.facts.sources[sequence.source].fasta,
        "sequence": sequence.name,
        "sequence_bases": sequence.bases,
        "start": start,
        "end": end,
        "region": f"{sequence.name}:{start + 1}-{end}",
        "strand": strand.decode(),
        "first_bases": bases[:SHOWN],
        "last_bases": bases[-SHOWN:],
    }
