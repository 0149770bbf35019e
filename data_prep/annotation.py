"""Genes of an annotation file: GTF, GFF3 or BED."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.compressed import reading, unpacked
from gengram_megatron.errors import UserError

GENES = ("gene", "ncRNA_gene", "pseudogene")
"""GTF calls every gene `gene`; the GFF3 of the same annotation has the other two beside it."""

TRANSCRIPTS = ("transcript", "mRNA")
"""Their spans stand for genes in a file that has no feature of a gene."""

Line = tuple[str, str, int, int]
"""A feature: record, type, and the bases [start, end), counted from 0."""


@dataclass(frozen=True)
class Annotation:
    """The genes of a file, [genes, 2] for each record: start and end, counted from 0, end
    excluded, in the order of the file. `kind` is what they were taken from."""

    kind: str  # gene, transcript, or region (of BED)
    genes: dict[str, np.ndarray]


def read_annotation(path: Path) -> Annotation:
    """Read a file, compressed or not; its name says whether it is GTF, GFF3 or BED."""
    spans: dict[str, dict[str, list[tuple[int, int]]]] = {}
    with reading(path, "an annotation"):
        for record, kind, start, end in _lines_of(path):
            spans.setdefault(kind, {}).setdefault(record, []).append((start, end))
    for kind in ("gene", "transcript", "region"):
        if kind in spans:
            return Annotation(kind, {name: np.array(own) for name, own in spans[kind].items()})
    raise UserError(
        f"{path} has no genes: no line of BED, and no feature of type "
        f"{', '.join([*GENES, *TRANSCRIPTS[:-1]])} or {TRANSCRIPTS[-1]}"
    )


def _lines_of(path: Path) -> Iterator[Line]:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    bed = ".bed" in suffixes
    if not bed and not {".gtf", ".gff", ".gff3"} & set(suffixes):
        raise UserError(
            f"{path} is no annotation by its name, which must end in "
            ".gtf, .gff3, .gff or .bed, with or without that of a compression"
        )
    with unpacked(path) as file:
        for number, text in enumerate(io.TextIOWrapper(file, encoding="utf-8"), 1):
            if text.startswith("##FASTA"):  # GFF3 may end in the sequence itself
                return
            if text.startswith("#") or not text.strip():
                continue
            try:
                line = _bed(text) if bed else _gff(text)
            except ValueError as error:
                raise UserError(f"{path}: line {number} {error}") from None
            if line is not None:
                yield line


def _gff(text: str) -> Line | None:
    """A line of GTF or GFF3: coordinates count from 1 and include the end."""
    fields = text.split("\t", 5)
    if len(fields) < 6:
        raise ValueError(f"has {len(fields)} fields between tabs; GTF and GFF3 have 9")
    record, _, kind, first, last, _ = fields
    if kind not in GENES and kind not in TRANSCRIPTS:
        return None
    start, end = _whole(first), _whole(last)
    _check(start, end, lowest=1, shortest=0)
    return record, "gene" if kind in GENES else "transcript", start - 1, end


def _bed(text: str) -> Line | None:
    """A line of BED: coordinates count from 0 and exclude the end."""
    fields = text.split()
    if fields[0] in ("track", "browser"):  # how a browser shows it
        return None
    if len(fields) < 3:
        raise ValueError(f"has {len(fields)} fields; BED has 3 or more: record, start, end")
    start, end = _whole(fields[1]), _whole(fields[2])
    _check(start, end, lowest=0, shortest=1)
    return fields[0], "region", start, end


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"has {text!r} where a coordinate should be") from None


def _check(start: int, end: int, lowest: int, shortest: int) -> None:
    if start < lowest:
        raise ValueError(f"starts at {start}; the first base of a record is {lowest} here")
    if end < start + shortest:
        raise ValueError(f"starts at {start} and ends before it, at {end}; swap or mend them")
