"""Genes of an annotation file: GTF, GFF3 or BED.

Programs disagree on what they call a gene, and many files mix several conventions. So a feature
has one of four levels: gene, transcript, exon, CDS. A feature that lies inside one of a higher
level adds nothing; one that lies in none of them counts as a gene itself. In a file that follows
the rules, the genes are exactly its gene features; in one that does not, no gene is lost.
"""

import io
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import numpy as np

from data_prep.compressed import reading, unpacked
from gengram_megatron.errors import UserError

LEVELS = ("gene", "transcript", "exon", "CDS")

ACCESSIONS = {
    "SO:0000704": "gene",
    "SO:0000336": "pseudogene",
    "SO:0001217": "protein_coding_gene",
    "SO:0001263": "ncRNA_gene",
    "SO:0000673": "transcript",
    "SO:0000234": "mRNA",
    "SO:0000147": "exon",
    "SO:0000316": "CDS",
}
"""GFF3 allows a type's accession in the Sequence Ontology in place of its name."""

LONGEST_LINE = 1 << 24
"""Characters. A genome behind the features may have a whole chromosome on one line."""

TRANSCRIPT_ID = re.compile(r'transcript_id[ =]"?([^";\s]+)|\bParent=([^;\s]+)')


@dataclass(frozen=True)
class Annotation:
    """The genes of a file, [genes, 2] for each record: start and end, counted from 0, end
    excluded. Names of records are decoded: `gi%7C1` is `gi|1`."""

    kind: str
    """The highest level that the file has: gene, transcript, exon or CDS; region for BED."""
    genes: dict[str, np.ndarray]
    outside: dict[str, int] = field(default_factory=dict)
    """How many of them are features of a lower level than `kind`, by level: those that lie in no
    feature of a higher one."""
    ignored: dict[str, int] = field(default_factory=dict)
    """How many features of none of the levels it has, by type."""
    circular: frozenset[str] = frozenset()
    """The records that the file says are circular: their genes may end after their last base."""


def read_annotation(path: Path) -> Annotation:
    """Read a file, compressed or not; its name says whether it is GTF, GFF3 or BED."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    bed = ".bed" in suffixes
    if not bed and not {".gtf", ".gff", ".gff3"} & set(suffixes):
        raise UserError(
            f"{path} is no annotation by its name, which must end in "
            ".gtf, .gff3, .gff or .bed, with or without that of a compression"
        )
    with reading(path, "an annotation"), unpacked(path) as file:
        found = _read_bed(path, file) if bed else _read_gff(path, file)
    if found.genes:
        return found
    most = [*found.ignored.items()][:8]
    types = ", ".join(f"{kind} ({count:,})" for kind, count in most)
    raise UserError(
        f"{path} has no genes: no line of BED, and no feature whose type is CDS or ends in gene, "
        f"transcript, RNA or exon; {f'its types are {types}' if types else 'it has no features'}"
    )


def _lines(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """All lines, numbered from 1."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")  # editors on Windows write a mark first
    return enumerate(iter(partial(text.readline, LONGEST_LINE), ""), 1)


def _read_bed(path: Path, file: BinaryIO) -> Annotation:
    """Lines of BED: coordinates count from 0 and exclude the end."""
    spans = _Spans()
    for number, text in _lines(file):
        fields = text.split()
        # track and browser say how a browser shows it
        if not fields or text.startswith("#") or fields[0] in ("track", "browser"):
            continue
        try:
            if len(fields) < 3:
                raise ValueError(f"has {len(fields)} fields; BED has 3 or more: record, start, end")
            start, end = _whole(fields[1]), _whole(fields[2])
            _check(start, end, lowest=0, shortest=1)
        except ValueError as error:
            raise UserError(f"{path}: line {number} {error}") from None
        spans.add(unquote(fields[0]), start, end)
    return Annotation("region", spans.arrays())


def _read_gff(path: Path, file: BinaryIO) -> Annotation:
    """Lines of GTF or GFF3: coordinates count from 1 and include the end."""
    features = _Features()
    for number, text in _features_of(file):
        try:
            features.add(text)
        except ValueError as error:
            raise UserError(f"{path}: line {number} {error}") from None
    return features.annotation()


def _features_of(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """The features of a file that may hold the sequences as well, after its features.

    The sequences begin after the line ##FASTA, or without it at the first header. Where several
    files were put together, features go on after that.
    """
    in_sequences = False
    for number, line in _lines(file):
        if line.startswith("#"):
            # MetaGeneMark writes a gene's protein as comments, which may begin with FASTA.
            if line.startswith("##FASTA"):
                in_sequences |= line.rstrip() == "##FASTA"
            elif line.startswith("##gff-version"):
                in_sequences = False
        elif in_sequences or line.isspace():
            continue
        elif line.startswith(">") and line.count("\t") < 8:
            in_sequences = True
        else:
            yield number, line


class _Features:
    """The features of a GTF or GFF3 file, as far as they may be genes.

    Most files have a gene's transcripts and exons right after it. Those are dropped as soon as
    they are read, so that of millions of exons only the few that lie in no gene are kept.
    """

    def __init__(self) -> None:
        self._levels: dict[str, str | None] = {}  # by type, of the types so far
        self._names: dict[str, str] = {}  # decoded, of the records so far
        self._spans = {level: _Spans() for level in LEVELS}
        self._ignored: Counter[str] = Counter()
        self._circular: set[str] = set()
        self._last = self._farthest = ("", 0, 0)  # the last gene or transcript, and of those of
        # its record so far the one that ends last

    def add(self, text: str) -> None:
        """Take in a line; ValueError, as the rest of a sentence, if it is not one of a feature."""
        fields = text.split("\t", 5)
        if len(fields) < 6:
            raise ValueError(f"has {len(fields)} fields between tabs; GTF and GFF3 have 9")
        record, _, kind, first, last, rest = fields
        try:
            level = self._levels[kind]
        except KeyError:
            level = self._levels[kind] = _level_of(kind)
        if level is None:
            self._ignored[kind] += 1
            if "Is_circular=true" in rest:
                self._circular.add(self._name(record))
            return
        start, end = _whole(first) - 1, _whole(last)
        if level in ("exon", "CDS"):
            for around in (self._last, self._farthest):
                if around[0] == record and around[1] <= start and end <= around[2]:
                    return
            _check(start + 1, end, lowest=1, shortest=0)
            transcript = TRANSCRIPT_ID.search(rest)
            self._spans[level].add(
                self._name(record), start, end, transcript and (transcript[1] or transcript[2])
            )
            return
        _check(start + 1, end, lowest=1, shortest=0)
        self._spans[level].add(self._name(record), start, end)
        self._last = (record, start, end)
        if record != self._farthest[0] or end > self._farthest[2]:
            self._farthest = self._last

    def annotation(self) -> Annotation:
        """What all lines together say."""
        genes: dict[str, np.ndarray] = {}
        counts = dict.fromkeys(LEVELS, 0)
        for level, spans in self._spans.items():
            for record, own in spans.arrays().items():
                known = genes.get(record, np.empty((0, 2), dtype=np.int64))
                new = own if level == LEVELS[0] else own[~_inside(own, known)]
                counts[level] += len(new)
                if len(new):
                    genes[record] = np.concatenate([known, new])
        found = {level: count for level, count in counts.items() if count}
        kind = next(iter(found), LEVELS[0])
        outside = {level: count for level, count in found.items() if level != kind}
        ignored = dict(sorted(self._ignored.items(), key=lambda it: (-it[1], it[0])))
        return Annotation(kind, genes, outside, ignored, frozenset(self._circular))

    def _name(self, record: str) -> str:
        try:
            return self._names[record]
        except KeyError:
            return self._names.setdefault(record, unquote(record))


class _Spans:
    """Start and end of features, by record. Sixteen bytes each, where a tuple would take 150."""

    def __init__(self) -> None:
        self._flat: dict[str, array] = {}  # start, end, start, end, ...
        self._places: dict[tuple[str, str], int] = {}

    def add(self, record: str, start: int, end: int, transcript: str | None = None) -> None:
        """Add a feature. Those of the same transcript become one, from its first base to its last,
        as introns belong to a gene."""
        flat = self._flat.setdefault(record, array("q"))
        if transcript is not None:
            place = self._places.setdefault((record, transcript), len(flat))
            if place < len(flat):
                flat[place] = min(flat[place], start)
                flat[place + 1] = max(flat[place + 1], end)
                return
        flat.extend((start, end))

    def arrays(self) -> dict[str, np.ndarray]:
        """The spans of each record, [features, 2] int64."""
        return {
            record: np.array(flat, dtype=np.int64).reshape(-1, 2)
            for record, flat in self._flat.items()
        }


def _level_of(kind: str) -> str | None:
    """The level of a feature by its type, such as lnc_RNA or protein_coding_gene."""
    name = ACCESSIONS.get(kind.upper(), kind).lower()
    if name.endswith("gene"):
        return "gene"
    if name.endswith(("transcript", "rna", "gene_segment")):
        return "transcript"
    if name.endswith("exon"):
        return "exon"
    return "CDS" if name == "cds" else None


def _inside(spans: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of the spans lie wholly inside one of the others.

    The others that start at or before a span are the first few by start; the largest end among
    them tells whether one of them reaches to the span's end.
    """
    others = others[np.argsort(others[:, 0])]
    candidates = np.searchsorted(others[:, 0], spans[:, 0], side="right")
    reach = np.concatenate([[-1], np.maximum.accumulate(others[:, 1])])[candidates]
    return reach >= spans[:, 1]


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
