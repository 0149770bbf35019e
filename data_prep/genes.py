"""How far fragments lie from genes, and which are dropped for it.

Genes are [start, end) of a record, counted from 0, like everything here. The distance of a
fragment from a gene is the number of bases between them: 0 where they touch or overlap. On a
circular record it is counted the shorter way round.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
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
"""Types of ignored features that the summary names; the manifest names all."""


def drop_far(
    fates: list[np.ndarray],
    records: list[Record],
    source: Source,
    annotation: Path | None,
    seq_length: int,
    distance: int,
) -> dict[str, Any]:
    """Give the fragments of a source that are farther than `distance` bp from every gene their
    fate, of those not dropped yet. `fates` has an array for each record and is changed in
    place. Returns what the manifest says of the genes."""
    if annotation is None:
        facts: dict[str, Any] = {"without_annotation": source.without_annotation}
        if source.without_annotation == "keep":
            return facts
        genes = {record.name: NO_GENES for record in records}
    else:
        found = read_annotation(annotation)
        genes, count = _by_record(found, source, records, seq_length)
        facts = {"kind": found.kind, "count": count}
        elsewhere = sum(map(len, found.genes.values())) - count
        more = {"outside": found.outside, "elsewhere": elsewhere, "ignored": found.ignored}
        facts |= {key: value for key, value in more.items() if value}
    for fate, record in zip(fates, records):
        starts = np.arange(len(fate)) * seq_length
        far = ~near(starts, starts + seq_length, genes[record.name], distance)
        fate[(fate == Fate.TRAIN) & far] = Fate.FAR_FROM_GENES
    return facts


def near(starts: np.ndarray, ends: np.ndarray, genes: np.ndarray, distance: int) -> np.ndarray:
    """Which of the fragments [starts, ends) have a gene at most `distance` bp away.

    A gene is near if it starts at most `distance` after the fragment's end and ends at most
    `distance` before its start. The genes that pass the first are the first few by start; the
    largest end among them tells whether one passes the second.
    """
    genes = genes[np.argsort(genes[:, 0])]
    candidates = np.searchsorted(genes[:, 0], ends + distance, side="right")
    nowhere = np.iinfo(np.int64).min
    reach = np.concatenate([[nowhere], np.maximum.accumulate(genes[:, 1])])[candidates]
    return (candidates > 0) & (reach >= starts - distance)


def notes(genes: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Sentences on what counts as a gene without being called one, and on genes that are on none of
    the records. `genes` has for each source what drop_far returned."""
    for kind in LEVELS[1:]:
        sources = [source for source, facts in genes.items() if facts.get("kind") == kind]
        if sources:
            yield f"no gene features, so {kind} features count as genes: {_few(sources)}"
    outside = {source: facts["outside"] for source, facts in genes.items() if "outside" in facts}
    if outside:
        told = [f"{source} ({_counts(counts)})" for source, counts in outside.items()]
        yield f"features that lie in no gene count as genes too: {_few(told)}"
    told = [
        f"{source} ({facts['elsewhere']:,})"
        for source, facts in genes.items()
        if "elsewhere" in facts
    ]
    if told:
        yield f"genes on sequences that the FASTA does not have were ignored: {_few(told)}"


def ignored(genes: dict[str, dict[str, Any]]) -> str | None:
    """A sentence on the features of all sources that no distance was measured from, if there are
    any; `genes` as of notes."""
    total: Counter[str] = Counter()
    for facts in genes.values():
        total.update(facts.get("ignored", {}))
    if not total:
        return None
    rest = len(total) - TYPES_SHOWN
    more = f" and {rest} more types, which the manifest lists by source" if rest > 0 else ""
    shown = _counts(dict(total.most_common(TYPES_SHOWN)))
    return f"features of these types were ignored, they are not genes: {shown}{more}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.items())


def _by_record(
    annotation: Annotation, source: Source, records: list[Record], seq_length: int
) -> tuple[dict[str, np.ndarray], int]:
    """The genes of each record, whatever the annotation calls it, and how many there are. Genes of
    a circular record are repeated one turn before and one turn after it, so that those over its
    origin, and near it, are met from both sides."""
    names = {record.name: _name_in(annotation, record.name) for record in records}
    names |= _check_mapping(annotation, source, records)
    _check_names(annotation, source, records, names, seq_length)
    genes, count = {}, 0
    for record in records:
        name = names[record.name]
        own = annotation.genes.get(name, NO_GENES)
        circular = name in annotation.circular
        _check_inside(own, record, name, circular, annotation, source)
        count += len(own)
        turns = (0, -record.length, record.length) if circular else (0,)
        genes[record.name] = np.concatenate([own + turn for turn in turns])
    return genes, count


def _check_inside(
    genes: np.ndarray,
    record: Record,
    name: str | None,
    circular: bool,
    annotation: Annotation,
    source: Source,
) -> None:
    """Refuse genes beyond the end of a record; on a circular one they may go on over its origin."""
    last_start, last_end = record.length, record.length
    if circular:
        last_end += record.length
    beyond = genes[(genes[:, 0] >= last_start) | (genes[:, 1] > last_end)]
    if len(beyond):
        start, end = beyond[0].tolist()
        raise UserError(
            f"{source.annotation}: a {annotation.kind} on {name} has bases {start + 1:,} to "
            f"{end:,}, but record {record.name} of {source.fasta} has only {record.length:,}; the "
            "annotation must be of this very assembly, and a circular record have "
            "Is_circular=true in its line of the GFF3"
        )


def _name_in(annotation: Annotation, name: str) -> str:
    """What an annotation calls a record, where the two differ at most by %-escapes."""
    return name if name in annotation.genes else unquote(name)


def _check_mapping(
    annotation: Annotation, source: Source, records: list[Record]
) -> dict[str, str | None]:
    """The annotation_names of a source, decoded."""
    known = {record.name for record in records}
    mapping = {}
    for record, name in source.annotation_names.items():
        if record not in known:
            raise UserError(f"annotation_names has {record}, which is no record of {source.fasta}")
        mapping[record] = None if name is None else _name_in(annotation, name)
        if name is not None and mapping[record] not in annotation.genes:
            raise UserError(
                f"annotation_names reads {record} as {name}, on which {source.annotation} has no "
                f"genes; give the name that it has there, or null for a record without genes"
            )
    return mapping


def _check_names(
    annotation: Annotation,
    source: Source,
    records: list[Record],
    names: dict[str, str | None],
    seq_length: int,
) -> None:
    """Refuse names that may be two for one thing: genes on no record, and a record without
    genes. Records too short for a fragment do not matter, nor do those the user has named."""
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
    bare = [name for name in without if name not in pairs]
    found = (
        f"{source.annotation} has genes on {_few(unused)}, of which {source.fasta} has no record, "
        f"and none on its {_few(without)}; "
    )
    # Genes that remain without a record may belong to one that would be called one without genes.
    # Where that is most of the file, it is more likely than that the file has so few genes.
    without_genes = sum(long_enough[name] for name in bare)
    if len(pairs) < len(unused) and 2 * without_genes > sum(long_enough.values()):
        raise UserError(
            f"{found}their names are not alike: say for this source under annotation_names, for "
            f'each of these records, what the annotation calls it, as in {{"{bare[0]}": "..."}}, '
            "or take the annotation that belongs to this very file"
        )
    mapping = source.annotation_names | {name: pairs.get(name) for name in without}
    raise UserError(
        f"{found}write for this source (null: no genes there) "
        f"annotation_names: {json.dumps(mapping)}"
    )


def _pairs(records: list[str], names: list[str]) -> dict[str, str]:
    """The records that an annotation seems to call by another name, and that name; without those
    of which it is not certain which is which."""
    whole, last = _unique(names, _plain), _unique(names, lambda name: _plain(_last_part(name)))
    found = {}
    for record in records:
        plain = _plain(record)
        name = whole.get(plain) or last.get(plain) or whole.get(_plain(_last_part(record)))
        if name is not None:
            found[record] = name
    times = Counter(found.values())
    return {record: name for record, name in found.items() if times[name] == 1}


def _unique(names: Iterable[str], form: Any) -> dict[str, str]:
    """The names by a form of theirs, without those that have it in common."""
    forms = Counter(map(form, names))
    return {form(name): name for name in names if forms[form(name)] == 1}


def _plain(name: str) -> str:
    """What chr20, Chr20 and 20 have in common, and chrM and MT."""
    plain = name.lower().removeprefix("chr")
    return "m" if plain == "mt" else plain


def _last_part(name: str) -> str:
    """The chr20 of GRCh38#0#chr20, and the NC_000020.11 of gi|568815578|ref|NC_000020.11|."""
    return re.split(r"[#|]", name.rstrip("#|"))[-1]


def _few(names: list[str]) -> str:
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
