"""The files that lead from a fragment of a data set back to its coordinates.

`records.tsv` lists the records of all sources, a row each: source, record, bases.
`<split>.origins.npy` has for each document the row number, the start in that record, and the
strand: `-` where the document is the reverse complement of those bases, else `+`.
"""

from pathlib import Path

import numpy as np

ORIGIN = np.dtype([("record", "<u4"), ("start", "<u8"), ("strand", "S1")])
RECORDS = "records.tsv"


def origins_path(folder: Path, split: str) -> Path:
    """The file with the origins of a split."""
    return folder / f"{split}.origins.npy"


def write_records(folder: Path, rows: list[tuple[str, str, int]]) -> None:
    """Write records.tsv; a row is source, record and bases."""
    lines = ["source\trecord\tbases", *("\t".join(map(str, row)) for row in rows)]
    (folder / RECORDS).write_text("\n".join(lines) + "\n")
