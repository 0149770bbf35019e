"""Train and validation, divided so that no base is in both.

What is held out are regions of records, [start, end) counted from 0. A fragment inside them is
for validation, one outside is for training, and one that crosses a border is dropped.
"""

import re
from itertools import pairwise

import numpy as np

from data_prep.fragment import Fate, Record
from data_prep.schema import Source
from gengram_megatron.errors import UserError

Regions = dict[str, list[tuple[int, int]]]
"""The held-out regions of each record that has any, in order and disjoint."""


def held_out(source: Source, default_share: float, records: list[Record]) -> Regions:
    """The regions of a source that are held out, by the one rule that its settings choose."""
    lengths = {record.name: record.length for record in records}
    if source.validation_records is not None:
        for name in source.validation_records:
            _check_record(source, name, lengths)
        return {name: [(0, lengths[name])] for name in source.validation_records}
    if source.validation_regions is not None:
        return _named_regions(source, lengths)
    if source.validation_headers is not None:
        found = [
            record for record in records if re.search(source.validation_headers, record.header)
        ]
        return {record.name: [(0, record.length)] for record in found}
    share = default_share if source.validation is None else source.validation
    return _at_the_end(lengths, share)


def assign(record: Record, regions: Regions, seq_length: int) -> np.ndarray:
    """The fate of each fragment of a record as far as the split decides it."""
    starts = np.arange(len(record.n_bases)) * seq_length
    inside = np.zeros(len(starts), dtype=np.int64)  # bases of the fragment that are held out
    for start, end in regions.get(record.name, []):
        overlap = np.minimum(end, starts + seq_length) - np.maximum(start, starts)
        inside += np.maximum(overlap, 0)
    fates = np.full(len(starts), Fate.STRADDLES, dtype=np.uint8)
    fates[inside == 0] = Fate.TRAIN
    fates[inside == seq_length] = Fate.VALIDATION
    return fates


def _at_the_end(lengths: dict[str, int], share: float) -> Regions:
    """The last `share` of all bases: whole records from the end of the file as long as they
    fit, and of the record that does not fit its own end, but only if the record is longer than
    the share itself. So chromosomes are cut and short segments stay whole."""
    budget = round(share * sum(lengths.values()))
    regions: Regions = {}
    left = budget
    for name, length in reversed(lengths.items()):
        if length > left:
            if length > budget and left > 0:
                regions[name] = [(length - left, length)]
            break
        regions[name] = [(0, length)]
        left -= length
    return regions


def _named_regions(source: Source, lengths: dict[str, int]) -> Regions:
    """Parse `record:first-last` (counted from 1, both ends included)."""
    regions: Regions = {}
    for text in source.validation_regions:
        match = re.fullmatch(r"(.+):([\d,]+)-([\d,]+)", text)
        if not match:
            raise UserError(f"validation region {text!r} is not of the form record:first-last")
        name = match[1]
        first, last = (int(number.replace(",", "") or 0) for number in match.group(2, 3))
        _check_record(source, name, lengths)
        if not 1 <= first <= last <= lengths[name]:
            raise UserError(
                f"validation region {text} does not lie inside {name}, "
                f"which has bases 1 to {lengths[name]} in {source.fasta}"
            )
        regions.setdefault(name, []).append((first - 1, last))
    for name, spans in regions.items():
        spans.sort()
        for before, after in pairwise(spans):
            if after[0] < before[1]:
                raise UserError(f"validation regions of {name} in {source.fasta} overlap")
    return regions


def _check_record(source: Source, name: str, lengths: dict[str, int]) -> None:
    if name not in lengths:
        raise UserError(f"{source.fasta} has no record {name} to hold out for validation")
