"""FASTA files, record by record, as token ids."""

from collections.abc import Iterator
from pathlib import Path

import dnaio
import numpy as np

from data_prep.compressed import reading
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import PIECES, DnaTokenizer

N = PIECES.index("N")


def read_fasta(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Each record's name (the first word of its header) and token ids, one record in memory.

    Reads plain, gzip, bgzip, bzip2, xz and zstd files. Raises UserError, at the place where it is
    found, for a file that is missing, damaged, not FASTA or not DNA, and for records that are
    empty or share a name (then no coordinate would be certain).
    """
    seen: set[str] = set()
    only_n = True
    for header, sequence in _parse(path):
        name = header.split()[0] if header.split() else ""
        if not name:
            raise UserError(f"{path}: record {len(seen) + 1} has no name after its '>'")
        if name in seen:
            raise UserError(f"{path}: two records are named {name}; names must be unique")
        if not sequence:
            raise UserError(f"{path}: record {name} has no bases")
        seen.add(name)
        try:
            ids = DnaTokenizer().encode(sequence)
        except UserError as error:
            raise UserError(f"{path}: this is not DNA: in record {name}, {error}") from None
        only_n = only_n and bool((ids == N).all())
        yield name, ids
    if not seen:
        raise UserError(f"{path} is empty: it has no FASTA records")
    if only_n:
        raise UserError(f"{path} has no base but N")


def _parse(path: Path) -> Iterator[tuple[str, str]]:
    """Headers and sequences as dnaio reads them, with its errors in the user's words."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    with reading(path, "a FASTA file"):
        try:
            with dnaio.open(path, fileformat="fasta") as reader:
                for record in reader:
                    yield record.name, record.sequence
        except dnaio.FileFormatError as error:
            line = "" if error.line is None else f"line {error.line + 1}: "
            raise UserError(f"{path} is not a FASTA file: {line}{error.message[:100]}") from None
