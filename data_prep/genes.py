"""Finds the fragments that are too far from every gene, and drops them.

Genes are [start, end) of a record, counted from 0, like all coordinates here. The distance of a
fragment from a gene is the number of bases between them: 0 where they touch or overlap. On a
circular record it is counted the shorter way round.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from data_prep.annotation import LEVELS, Annotation, read_annotation
from data_prep.fragment import Fate, Record
from data_prep.schema import Source
from gengram_megatron.errors import UserError

NO_GENES = np.empty((0, 2), dtype=np.int64)

TYPES_SHOWN = 8
"""The number of ignored feature types that the summary lists; the manifest lists all."""


def drop_far(
    fates: list[np.ndarray],
    records: list[Record],
    source: Source,
    annotation: Path | None,
    seq_length: int,
    distance: int,
) -> dict[str, Any]:
    """Marks the fragments of a source that are too far from every gene as FAR_FROM_GENES, unless
    they are dropped already.

    Args:
        fates: for each record the fates of its fragments, [fragments] uint8; changed in place.
        records: the records of the source.
        source: the settings of the source.
        annotation: the file with its genes; None if it has none.
        seq_length: the number of bases of a fragment.
        distance: the largest distance from a gene, in bp, at which a fragment is kept.

    Returns what the manifest says of the genes. Raises UserError if the annotation does not fit the
    records.
    """
    if annotation is None:
        facts: dict[str, Any] = {"without_annotation": source.without_annotation}
        if source.without_annotation == "keep":
            return facts
        genes = {record.name: NO_GENES for record in records}
    else:
        annotated = read_annotation(annotation)
        genes, count = _by_record(annotated, source, records, seq_length)
        facts = {"kind": annotated.kind, "count": count}
        elsewhere = sum(map(len, annotated.genes.values())) - count
        optional = {
            "outside": annotated.outside,
            "elsewhere": elsewhere,
            "ignored": annotated.ignored,
        }
        facts |= {key: value for key, value in optional.items() if value}
    for fate, record in zip(fates, records):
        starts = np.arange(len(fate)) * seq_length
        far = ~near(starts, starts + seq_length, genes[record.name], distance)
        fate[(fate == Fate.TRAIN) & far] = Fate.FAR_FROM_GENES
    return facts


def near(starts: np.ndarray, ends: np.ndarray, genes: np.ndarray, distance: int) -> np.ndarray:
    """Returns which fragments [starts, ends) have a gene at most `distance` bp away: [n] bool.

    A gene is near if it starts at most `distance` after the fragment's end and ends at most
    `distance` before its start. Sorted by start, the genes that meet the first condition come
    first; the largest end among them decides whether one of them also meets the second.

    Args:
        starts: the start of each fragment, [n].
        ends: the end of each fragment, [n].
        genes: the start and end of each gene, [genes, 2].
        distance: the largest distance of a near gene, in bp.
    """
    genes = genes[np.argsort(genes[:, 0])]
    candidates = np.searchsorted(genes[:, 0], ends + distance, side="right")
    nowhere = np.iinfo(np.int64).min
    reach = np.concatenate([[nowhere], np.maximum.accumulate(genes[:, 1])])[candidates]
    return (candidates > 0) & (reach >= starts - distance)


def notes(genes: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yields sentences about features that count as genes without being called so, and about genes
    on sequences that the FASTA does not have.

    `genes` is what `drop_far` returned for each source.
    """
    for kind in LEVELS[1:]:
        sources = [source for source, facts in genes.items() if facts.get("kind") == kind]
        if sources:
            yield f"no gene features, so {kind} features count as genes: {_few(sources)}"
    outside = {source: facts["outside"] for source, facts in genes.items() if "outside" in facts}
    if outside:
        by_source = [f"{source} ({_counts(counts)})" for source, counts in outside.items()]
        yield f"features that lie in no gene count as genes too: {_few(by_source)}"
    by_source = [
        f"{source} ({facts['elsewhere']:,})"
        for source, facts in genes.items()
        if "elsewhere" in facts
    ]
    if by_source:
        yield f"genes on sequences that the FASTA does not have were ignored: {_few(by_source)}"


def ignored(genes: dict[str, dict[str, Any]]) -> str | None:
    """Returns a sentence about the features of all sources that do not count as genes; None if
    there are none.

    `genes` is what `drop_far` returned for each source.
    """
    total: Counter[str] = Counter()
    for facts in genes.values():
        total.update(facts.get("ignored", {}))
    if not total:
        return None
    omitted = len(total) - TYPES_SHOWN
    more = f" and {omitted} more types, which the manifest lists by source" if omitted > 0 else ""
    shown = _counts(dict(total.most_common(TYPES_SHOWN)))
    return f"features of these types were ignored because they are not genes: {shown}{more}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.items())


def _by_record(
    annotation: Annotation, source: Source, records: list[Record], seq_length: int
) -> tuple[dict[str, np.ndarray], int]:
    """Returns the genes of each record, whatever the annotation calls it, and how many there are.

    Genes of a circular record are repeated one turn before and one turn after it, so that genes
    near or across its origin are seen from both sides. The repetitions are not counted.
    """
    names: dict[str, str | None] = {it.name: _name_in(annotation, it.name) for it in records}
    names |= _check_mapping(annotation, source, records)
    _check_names(annotation, source, records, names, seq_length)
    genes, count = {}, 0
    for record in records:
        name = names[record.name]
        record_genes = NO_GENES if name is None else annotation.genes.get(name, NO_GENES)
        circular = name in annotation.circular
        _check_inside(record_genes, record, name, circular, annotation, source)
        count += len(record_genes)
        shifts = (0, -record.length, record.length) if circular else (0,)
        genes[record.name] = np.concatenate([record_genes + shift for shift in shifts])
    return genes, count


def _check_inside(
    genes: np.ndarray,
    record: Record,
    name: str | None,
    circular: bool,
    annotation: Annotation,
    source: Source,
) -> None:
    """Raises UserError for genes beyond the end of a record; on a circular one they may cross the
    origin."""
    last_start, last_end = record.length, record.length
    if circular:
        last_end += record.length
    beyond = genes[(genes[:, 0] >= last_start) | (genes[:, 1] > last_end)]
    if len(beyond):
        start, end = beyond[0].tolist()
        raise UserError(
            f"{source.annotation}: a {annotation.kind} on {name} has bases {start + 1:,} to "
            f"{end:,}, but record {record.name} of {source.fasta} has only {record.length:,}; the "
            "annotation must be of this very assembly, and a circular record needs "
            "Is_circular=true in its line of the GFF3"
        )


def _name_in(annotation: Annotation, name: str) -> str:
    """Returns the name of a record in an annotation if the two differ at most by %-escapes."""
    return name if name in annotation.genes else unquote(name)


def _check_mapping(
    annotation: Annotation, source: Source, records: list[Record]
) -> dict[str, str | None]:
    """Returns the annotation_names of a source, decoded.

    Raises UserError if they have a record that the FASTA lacks, or a name without genes.
    """
    known = {record.name for record in records}
    mapping = {}
    for record, name in source.annotation_names.items():
        if record not in known:
            raise UserError(
                f"annotation_names has {record}, which is not a record of {source.fasta}"
            )
        mapping[record] = None if name is None else _name_in(annotation, name)
        if name is not None and mapping[record] not in annotation.genes:
            raise UserError(
                f"annotation_names maps {record} to {name}, on which {source.annotation} has no "
                f"genes; give the record's name in that file, or null for a record without genes"
            )
    return mapping


def _check_names(
    annotation: Annotation,
    source: Source,
    records: list[Record],
    names: dict[str, str | None],
    seq_length: int,
) -> None:
    """Raises UserError if names may differ between the files: there are genes on a sequence that is
    not a record, and a record without genes.

    Records that are too short for a fragment do not count, nor do those in annotation_names.
    """
    used = set(names.values())
    unused = [name for name in annotation.genes if name not in used]
    long_enough = {record.name: record.length for record in records if record.length >= seq_length}
    without = [
        name
        for name in long_enough
        if name not in source.annotation_names and names[name] not in annotation.genes
    ]
    if not unused or not without:
        return
    pairs = _pairs(without, unused)
    unmatched = [name for name in without if name not in pairs]
    mismatch = (
        f"{source.annotation} has genes on {_few(unused)}, which {source.fasta} does not have as "
        f"records, and none on its {_few(without)}; "
    )
    # Genes that remain without a record may belong to a record that a proposed mapping would
    # declare to be without genes. If such records make up most of the file, a missed match is more
    # likely than a file with so few genes, so no mapping is proposed.
    without_genes = sum(long_enough[name] for name in unmatched)
    if len(pairs) < len(unused) and 2 * without_genes > sum(long_enough.values()):
        raise UserError(
            f"{mismatch}their names are not alike: give for this source, under annotation_names, "
            "for each of these records, what the annotation calls it, as in "
            f'{{"{unmatched[0]}": "..."}}, or use the annotation that belongs to this very file'
        )
    mapping = source.annotation_names | {name: pairs.get(name) for name in without}
    raise UserError(
        f"{mismatch}write for this source (null: no genes on that record) "
        f"annotation_names: {json.dumps(mapping)}"
    )


def _pairs(records: list[str], names: list[str]) -> dict[str, str]:
    """Returns the names by which an annotation seems to call records, by record.

    Ambiguous matches are left out.
    """
    whole = _unique(names, _normalized)
    last = _unique(names, lambda name: _normalized(_last_part(name)))
    matches = {}
    for record in records:
        key = _normalized(record)
        name = whole.get(key) or last.get(key) or whole.get(_normalized(_last_part(record)))
        if name is not None:
            matches[record] = name
    times = Counter(matches.values())
    return {record: name for record, name in matches.items() if times[name] == 1}


def _unique(names: Iterable[str], form: Callable[[str], str]) -> dict[str, str]:
    """Returns the names by what `form` makes of them, without those for which it is the same."""
    forms = Counter(map(form, names))
    return {form(name): name for name in names if forms[form(name)] == 1}


def _normalized(name: str) -> str:
    """Returns the same for chr20, Chr20 and 20, and the same for chrM and MT."""
    normalized = name.lower().removeprefix("chr")
    return "m" if normalized == "mt" else normalized


def _last_part(name: str) -> str:
    """Returns chr20 for GRCh38#0#chr20, and NC_000020.11 for gi|568815578|ref|NC_000020.11|."""
    return re.split(r"[#|]", name.rstrip("#|"))[-1]


def _few(names: list[str]) -> str:
    omitted = len(names) - 3
    return ", ".join(names[:3]) + (f" and {omitted} more" if omitted > 0 else "")
