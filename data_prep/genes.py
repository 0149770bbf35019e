"""How far fragments lie from genes, and which are dropped for it.

Genes are [start, end) of a record, counted from 0, like everything here. The distance of a
fragment from a gene is the number of bases between them: 0 where they touch or overlap.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.annotation import Annotation, read_annotation
from data_prep.fragment import Fate, Record
from data_prep.schema import Source
from gengram_megatron.errors import UserError

NO_GENES = np.empty((0, 2), dtype=np.int64)


def drop_far(
    fates: list[np.ndarray],
    records: list[Record],
    source: Source,
    annotation: Path | None,
    seq_length: int,
    distance: int,
) -> dict[str, Any]:
    """Give the fragments of a source that are farther than `distance` bp from every gene their
    fate, of those still in a split. `fates` has an array for each record and is changed in
    place. Returns what the manifest says of the genes."""
    if annotation is None:
        facts: dict[str, Any] = {"without_annotation": source.without_annotation}
        if source.without_annotation == "keep":
            return facts
        genes = {record.name: NO_GENES for record in records}
    else:
        found = read_annotation(annotation)
        genes = _by_record(found, source, records, seq_length)
        facts = {"kind": found.kind, "count": sum(map(len, genes.values()))}
    for fate, record in zip(fates, records):
        starts = np.arange(len(fate)) * seq_length
        far = ~near(starts, starts + seq_length, genes[record.name], distance)
        in_split = (fate == Fate.TRAIN) | (fate == Fate.VALIDATION)
        fate[in_split & far] = Fate.FAR_FROM_GENES
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


def _by_record(
    annotation: Annotation, source: Source, records: list[Record], seq_length: int
) -> dict[str, np.ndarray]:
    """The genes of each record, whatever the annotation calls it."""
    _check_mapping(annotation, source, records)
    names = {record.name: record.name for record in records} | source.annotation_names
    _check_names(annotation, source, records, names, seq_length)
    genes = {record.name: annotation.genes.get(names[record.name], NO_GENES) for record in records}
    for record in records:
        own = genes[record.name]
        beyond = own[own[:, 1] > record.length]
        if len(beyond):
            start, end = beyond[0].tolist()
            raise UserError(
                f"{source.annotation}: a {annotation.kind} on {names[record.name]} has bases "
                f"{start + 1:,} to {end:,}, but record {record.name} of {source.fasta} has only "
                f"{record.length:,}; the annotation must be of this very assembly"
            )
    return genes


def _check_mapping(annotation: Annotation, source: Source, records: list[Record]) -> None:
    known = {record.name for record in records}
    for record, name in source.annotation_names.items():
        if record not in known:
            raise UserError(f"annotation_names has {record}, which is no record of {source.fasta}")
        if name is not None and name not in annotation.genes:
            raise UserError(
                f"annotation_names reads {record} as {name}, on which {source.annotation} has no "
                f"genes; give the name that it has there, or null for a record without genes"
            )


def _check_names(
    annotation: Annotation,
    source: Source,
    records: list[Record],
    names: dict[str, str | None],
    seq_length: int,
) -> None:
    """Refuse names that may be two for one thing: genes on no record, and a record without
    genes. Records too short for a fragment do not matter, nor do those the user has named."""
    unused = [name for name in annotation.genes if name not in names.values()]
    without = [
        record.name
        for record in records
        if record.length >= seq_length
        and record.name not in source.annotation_names
        and record.name not in annotation.genes
    ]
    if not unused or not without:
        return
    alike = {_plain(name): name for name in unused}
    mapping = source.annotation_names | {name: alike.get(_plain(name)) for name in without}
    raise UserError(
        f"{source.annotation} has genes on {_few(unused)}, of which {source.fasta} has no record, "
        f"and none on its {_few(without)}; write for this source (null: no genes there) "
        f"annotation_names: {json.dumps(mapping)}"
    )


def _plain(name: str) -> str:
    """What chr20, Chr20 and 20 have in common, and chrM and MT."""
    plain = name.lower().removeprefix("chr")
    return "m" if plain == "mt" else plain


def _few(names: list[str]) -> str:
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
