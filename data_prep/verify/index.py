"""A split's index, as megatron-core's IndexedDataset reads it, against what it must say.

All documents have the same length, so each number of the index follows from how many there are.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.manifest import MANIFEST

HEADER = np.dtype(
    [("magic", "S9"), ("version", "<u8"), ("type", "u1"), ("sequences", "<u8"), ("ends", "<u8")]
)
UINT8 = 1  # megatron-core's number of this type
AT_A_TIME = 1 << 20


def check_index(path: Path, documents: int, seq_length: int) -> Iterator[str]:
    """Problems of the index of so many documents of seq_length + 1 tokens."""
    # magic, format version, type, sequences (one a document), document borders
    expected = np.array((b"MMIDIDX", 1, UINT8, documents, documents + 1), dtype=HEADER)
    data = np.fromfile(path, dtype=np.uint8, count=HEADER.itemsize)
    if len(data) < HEADER.itemsize or data.view(HEADER)[0] != expected:
        yield (
            f"{path}: its first bytes are not those of an index of {documents:,} documents of "
            f"uint8, the number in {MANIFEST}"
        )
        return
    length = seq_length + 1
    parts = {
        "length": ("<i4", documents, lambda numbers: np.full(len(numbers), length)),
        "place": ("<i8", documents, lambda numbers: numbers * length),
        "first sequence": ("<i8", documents + 1, lambda numbers: numbers),
    }
    offset = HEADER.itemsize
    for what, (kind, count, rule) in parts.items():
        end = offset + count * np.dtype(kind).itemsize
        if path.stat().st_size < end:
            yield f"{path} ends before the {what} of all documents"
            return
        wrong = _first_wrong(np.memmap(path, kind, "r", offset, count), rule)
        if wrong is not None:
            yield f"{path}: the {what} of document {wrong} is wrong"
        offset = end
    if path.stat().st_size > offset:
        yield f"{path} goes on after the last document"


def _first_wrong(numbers: np.ndarray, rule) -> int | None:
    """The place of the first number that does not follow the rule."""
    for start in range(0, len(numbers), AT_A_TIME):
        block = numbers[start : start + AT_A_TIME]
        wrong = np.flatnonzero(block != rule(np.arange(start, start + len(block))))
        if len(wrong):
            return start + int(wrong[0])
    return None
