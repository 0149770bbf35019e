"""What a data set holds: fragments by source, sequence and strand, their composition, and the bases
that a single sample is made of.

Fragments are counted from the table of origins, all of them. Their bases are counted in some,
evenly spread over the split, because a large set has hundreds of gigabytes.
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
"""Is told that the bases of so many more fragments were counted."""


@dataclass(frozen=True)
class SplitContents:
    """What was found in one split."""

    fragments: np.ndarray  # [sequences, 2] of each sequence, forward and reverse
    looked_at: np.ndarray  # [n] the sequence of each fragment whose bases were counted
    bases: np.ndarray  # [n, 5] its A, C, G, T and N

    def of(self, sequences: np.ndarray) -> dict[str, Any]:
        """What is said of the fragments of some sequences, a mask [sequences]."""
        forward, reverse = self.fragments[sequences].sum(axis=0).tolist()
        return {
            "fragments": forward + reverse,
            "strands": {"+": forward, "-": reverse},
            **composition(self.bases[sequences[self.looked_at]]),
        }


def composition(bases: np.ndarray) -> dict[str, Any]:
    """Shares of A, C, G, T and N in fragments [n, 5], and of G and C in what is not N; None where
    there is nothing to divide."""
    sums = dict(zip(BASES, bases.sum(axis=0).tolist()))
    known = sum(sums.values()) - sums["N"]
    return {
        "looked_at": len(bases),
        "composition": {base: _share(count, sum(sums.values())) for base, count in sums.items()},
        "gc": _share(sums["G"] + sums["C"], known),
    }


def contents(data: DataSet, most: int | None, report: Report) -> dict[str, SplitContents]:
    """Look over all splits; at the bases of `most` fragments of each at most, None: of all."""
    return {name: _split_contents(data, name, most, report) for name in data.facts.splits}


def fragments_to_count(data: DataSet, most: int | None) -> int:
    """The fragments whose bases `contents` counts."""
    return sum(
        split.fragments if most is None else min(split.fragments, most)
        for split in data.facts.splits.values()
    )


def _split_contents(data: DataSet, name: str, most: int | None, report: Report) -> SplitContents:
    count = data.facts.splits[name].fragments
    looked = count if most is None else min(count, most)
    split = data.split(name, scattered=looked < count)
    fragments, astray = count_fragments(split.origins, len(data.sequences))
    if astray:
        raise UserError(
            f"{data.folder} is damaged: {astray:,} fragments of split {name} are of sequences that "
            f"{RECORDS} does not list"
        )
    numbers = np.arange(looked) * count // max(looked, 1)
    bases = _count_bases(split, numbers, report)
    return SplitContents(fragments, split.origins["record"][numbers], bases)


def count_fragments(origins: np.ndarray, sequences: int) -> tuple[np.ndarray, int]:
    """Fragments of each sequence, forward and reverse: [sequences, 2]; and how many are of none."""
    found = np.zeros(2 * (sequences + 1), dtype=np.int64)  # the last row: those of none
    for start in range(0, len(origins), ORIGINS_AT_A_TIME):
        block = origins[start : start + ORIGINS_AT_A_TIME]
        rows = np.minimum(block["record"].astype(np.int64), sequences)
        found += np.bincount(2 * rows + (block["strand"] == b"-"), minlength=len(found))
    return found[:-2].reshape(-1, 2), int(found[-2:].sum())


def _count_bases(split: Split, numbers: np.ndarray, report: Report) -> np.ndarray:
    """A, C, G, T and N of each of the fragments: [len(numbers), 5]."""
    found = np.empty((len(numbers), len(BASES)), dtype=np.int64)
    step = max(1, FRAGMENT_BYTES_AT_A_TIME // split.tokens.shape[1])
    for start in range(0, len(numbers), step):
        block = split.tokens[numbers[start : start + step]]
        for column, base in enumerate(BASE_IDS):
            found[start : start + step, column] = (block == base).sum(axis=1, dtype=np.uint32)
        report(len(block))
    return found


def describe(data: DataSet, found: dict[str, SplitContents], by_sequence: bool) -> dict[str, Any]:
    """All that was found, as plain values: what `--json` prints and the tables show."""
    sources = np.array([sequence.source for sequence in data.sequences])
    groups = np.array([source.split("/")[0] for source in sources])
    everything = np.ones(len(sources), dtype=bool)
    tokens = data.seq_length + 1
    said = {
        "folder": str(data.folder),
        "seq_length": data.seq_length,
        "settings": data.facts.settings.model_dump(),
        "splits": {
            name: {"tokens": tokens * int(split.fragments.sum()), **split.of(everything)}
            for name, split in found.items()
        },
        "groups": {
            key: {name: split.of(groups == key) for name, split in found.items()}
            for key in data.facts.groups
        },
        "sources": {
            key: {
                "fasta": facts.fasta,
                "genes": facts.genes,
                "records": facts.records,
                "bases": facts.bases,
                "fates": facts.fates,
                **{name: split.of(sources == key) for name, split in found.items()},
            }
            for key, facts in data.facts.sources.items()
        },
    }
    if by_sequence:
        said["sequences"] = [
            {
                "source": sequence.source,
                "sequence": sequence.name,
                "bases": sequence.bases,
                **{name: int(split.fragments[number].sum()) for name, split in found.items()},
            }
            for number, sequence in enumerate(data.sequences)
        ]
    return said


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


SHOWN = 60  # bases from each end


def locate(data: DataSet, split: str, number: int) -> dict[str, Any]:
    """Where a sample of a split comes from, and how it begins and ends.

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
            f"{data.folder} is damaged: sample {number} of {split} is of sequence {record}, and "
            f"there are {len(data.sequences)}; gengram-data verify says more"
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
