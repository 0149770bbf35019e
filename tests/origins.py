"""Reads where each fragment of a built data set comes from, one by one."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.write import RECORDS, origins_path


@dataclass(frozen=True)
class Origin:
    """The bases [start, end) of a record, counted from 0 on the forward strand whatever `strand`
    says; source is `group/name`."""

    source: str
    record: str
    start: int
    end: int
    strand: str  # + or -


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
