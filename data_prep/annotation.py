"""Reads the genes of an annotation file: GTF, GFF3 or BED.

Programs disagree on what they call a gene, and many files mix several conventions. So a feature
has one of four levels: gene, transcript, exon, CDS. A feature that lies inside one of a higher
level adds nothing; one that lies in none counts as a gene itself. In a file that follows the
rules, the genes are exactly its gene features; in one that does not, no gene is lost.
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

from data_prep.compressed import decompressed, explain_read_errors
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
"""Type names by accession: GFF3 allows a type's accession in the Sequence Ontology in place of its
name."""

LONGEST_LINE = 1 << 24
"""The most characters read at a time: if a genome follows the features, a line may be a whole
chromosome."""

TRANSCRIPT_ID = re.compile(r'transcript_id[ =]"?([^";\s]+)|\bParent=([^;\s]+)')


@dataclass(frozen=True)
class Annotation:
    """The genes of a file. Names of records are decoded: `gi%7C1` is `gi|1`."""

    kind: str
    """The highest level that the file has: gene, transcript, exon or CDS; region for BED."""
    genes: dict[str, np.ndarray]
    """The start and end of the genes of each record, [genes, 2] int64, counted from 0, end
    excluded."""
    outside: dict[str, int] = field(default_factory=dict)
    """How many of the genes are features of a lower level than `kind`, by level; they lie in no
    feature of a higher level."""
    ignored: dict[str, int] = field(default_factory=dict)
    """How many features of the file have none of the levels, by type."""
    circular: frozenset[str] = frozenset()
    """The records that the file marks as circular: their genes may end after their last base."""


def read_annotation(path: Path) -> Annotation:
    """Reads an annotation, compressed or not; its name says whether it is GTF, GFF3 or BED.

    Raises UserError if the name has none of these endings, a line is wrong, or there are no genes.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    bed = ".bed" in suffixes
    if not bed and not {".gtf", ".gff", ".gff3"} & set(suffixes):
        raise UserError(
            f"{path} is not an annotation by its name, which must end in "
            ".gtf, .gff3, .gff or .bed, perhaps followed by that of a compression"
        )
    with explain_read_errors(path, "an annotation"), decompressed(path) as file:
        annotation = _read_bed(path, file) if bed else _read_gff(path, file)
    if annotation.genes:
        return annotation
    most_frequent = [*annotation.ignored.items()][:8]
    types = ", ".join(f"{kind} ({count:,})" for kind, count in most_frequent)
    raise UserError(
        f"{path} has no genes: no line of BED, and no feature whose type is CDS or ends in gene, "
        f"transcript, RNA or exon; {f'its types are {types}' if types else 'it has no features'}"
    )


def _lines(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yields all lines, numbered from 1."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")  # Windows editors add a byte-order mark
    return enumerate(iter(partial(text.readline, LONGEST_LINE), ""), 1)


def _read_bed(path: Path, file: BinaryIO) -> Annotation:
    """Reads lines of BED, whose coordinates count from 0 and exclude the end."""
    spans = _Spans()
    for number, text in _lines(file):
        fields = text.split()
        # lines that begin with track or browser are display settings for genome browsers
        if not fields or text.startswith("#") or fields[0] in ("track", "browser"):
            continue
        try:
            if len(fields) < 3:
                raise ValueError(f"has {len(fields)} fields; BED has 3 or more: record, start, end")
            start, end = _coordinate(fields[1]), _coordinate(fields[2])
            _check(start, end, lowest=0, shortest=1)
        except ValueError as error:
            raise UserError(f"{path}: line {number} {error}") from None
        spans.add(unquote(fields[0]), start, end)
    return Annotation("region", spans.arrays())


def _read_gff(path: Path, file: BinaryIO) -> Annotation:
    """Reads lines of GTF or GFF3, whose coordinates count from 1 and include the end."""
    features = _Features()
    for number, text in _features_of(file):
        try:
            features.add(text)
        except ValueError as error:
            raise UserError(f"{path}: line {number} {error}") from None
    return features.annotation()


def _features_of(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yields the number and text of each feature line of a file, which may also hold sequences.

    The sequences begin after the line ##FASTA, or at the first header if there is no such line. In
    a file that was concatenated from several, more features may follow.
    """
    in_sequences = False
    for number, line in _lines(file):
        if line.startswith("#"):
            # MetaGeneMark writes a gene's protein as comments, and a protein may begin with FASTA.
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
    """Collects the features of a GTF or GFF3 file that may be genes.

    In most files, the transcripts and exons of a gene come right after it. Exons and CDS like that
    are dropped as soon as they are read, so only the few of millions that lie in no gene are kept.
    """

    def __init__(self) -> None:
        self._levels: dict[str, str | None] = {}  # the level of each type seen so far
        self._names: dict[str, str] = {}  # the decoded name of each record seen so far
        self._spans = {level: _Spans() for level in LEVELS}
        self._ignored: Counter[str] = Counter()
        self._circular: set[str] = set()
        # Record, start and end of the last gene or transcript, and of the one among those read so
        # far of the same record whose end is the largest.
        self._last = self._farthest = ("", 0, 0)

    def add(self, text: str) -> None:
        """Adds the feature of a line.

        Raises ValueError, whose text completes "line N ...", if the line is not a feature.
        """
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
        start, end = _coordinate(first) - 1, _coordinate(last)
        if level in ("exon", "CDS"):
            for outer in (self._last, self._farthest):
                if outer[0] == record and outer[1] <= start and end <= outer[2]:
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
        """Returns the genes that follow from all lines together."""
        genes: dict[str, np.ndarray] = {}
        counts = dict.fromkeys(LEVELS, 0)
        for level, spans in self._spans.items():
            for record, features in spans.arrays().items():
                known = genes.get(record, np.empty((0, 2), dtype=np.int64))
                new = features if level == LEVELS[0] else features[~_inside(features, known)]
                counts[level] += len(new)
                if len(new):
                    genes[record] = np.concatenate([known, new])
        present = {level: count for level, count in counts.items() if count}
        kind = next(iter(present), LEVELS[0])
        outside = {level: count for level, count in present.items() if level != kind}
        ignored = dict(sorted(self._ignored.items(), key=lambda it: (-it[1], it[0])))
        return Annotation(kind, genes, outside, ignored, frozenset(self._circular))

    def _name(self, record: str) -> str:
        try:
            return self._names[record]
        except KeyError:
            return self._names.setdefault(record, unquote(record))


class _Spans:
    """The start and end of features, by record; 16 bytes each, where a tuple would take 150."""

    def __init__(self) -> None:
        self._flat: dict[str, array[int]] = {}  # start, end, start, end, ...
        self._offsets: dict[tuple[str, str], int] = {}  # of each record's transcripts in _flat

    def add(self, record: str, start: int, end: int, transcript: str | None = None) -> None:
        """Adds a feature.

        Features of the same transcript are merged into one, from the transcript's first base to its
        last, because introns belong to the gene.
        """
        flat = self._flat.setdefault(record, array("q"))
        if transcript is not None:
            offset = self._offsets.setdefault((record, transcript), len(flat))
            if offset < len(flat):
                flat[offset] = min(flat[offset], start)
                flat[offset + 1] = max(flat[offset + 1], end)
                return
        flat.extend((start, end))

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the start and end of each record's features, [features, 2] int64."""
        return {
            record: np.array(flat, dtype=np.int64).reshape(-1, 2)
            for record, flat in self._flat.items()
        }


def _level_of(kind: str) -> str | None:
    """Returns the level of a feature from its type, such as lnc_RNA or protein_coding_gene.

    Returns None if the type has no level.
    """
    name = ACCESSIONS.get(kind.upper(), kind).lower()
    if name.endswith("gene"):
        return "gene"
    if name.endswith(("transcript", "rna", "gene_segment")):
        return "transcript"
    if name.endswith("exon"):
        return "exon"
    return "CDS" if name == "cds" else None


def _inside(spans: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """Returns which of the spans [n, 2] lie entirely inside an outer span [m, 2]: [n] bool.

    Sorted by start, the outer spans that start at or before a span come first; the largest end
    among them decides whether one of them reaches the end of the span.
    """
    outer = outer[np.argsort(outer[:, 0])]
    candidates = np.searchsorted(outer[:, 0], spans[:, 0], side="right")
    reach = np.concatenate([[-1], np.maximum.accumulate(outer[:, 1])])[candidates]
    return reach >= spans[:, 1]


def _coordinate(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"has {text!r} where a coordinate should be") from None


def _check(start: int, end: int, lowest: int, shortest: int) -> None:
    if start < lowest:
        raise ValueError(f"starts at {start}; the first base of a record is {lowest} here")
    if end < start + shortest:
        raise ValueError(f"starts at {start} and ends before it, at {end}; swap or correct them")
