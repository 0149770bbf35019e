"""From a fragment of a data set back to its coordinates.

`records.tsv` lists the records of all sources, a row each: source, record, bases.
`<split>.origins.npy` has for each document the row number, the start in that record, and the
strand: `-` where the document is the reverse complement of those bases, else `+`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

ORIGIN = np.dtype([("record", "<u4"), ("start", "<u8"), ("strand", "S1")])
RECORDS = "records.tsv"


@dataclass(frozen=True)
class Origin:
    """The bases [start, end) of a record, counted from 0 on the forward strand whatever `strand`
    says; source is `group/name`."""

    source: str
    record: str
    start: int
    end: int
    strand: str  # + or -


def origins_path(folder: Path, split: str) -> Path:
    """The file with the origins of a split."""
    return folder / f"{split}.origins.npy"


def write_records(folder: Path, rows: list[tuple[str, str, int]]) -> None:
    """Write records.tsv; a row is source, record and bases."""
    lines = ["source\trecord\tbases", *("\t".join(map(str, row)) for row in rows)]
    (folder / RECORDS).write_text("\n".join(lines) + "\n")


class Origins:
    """The origins of all fragments of a split, in the order of its documents."""

    def __init__(self, folder: Path, split: str, seq_length: int):
        lines = (folder / RECORDS).read_text().splitlines()[1:]
        self._records = [line.split("\t")[:2] for line in lines]
        self._origins = np.load(origins_path(folder, split), mmap_mode="r")
        self._seq_length = seq_length

    def __len__(self) -> int:
        return len(self._origins)

    def __getitem__(self, document: int) -> Origin:
        record, start, strand = self._origins[document].item()
        source, name = self._records[record]
        return Origin(source, name, start, start + self._seq_length, strand.decode())
