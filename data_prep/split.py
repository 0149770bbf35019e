"""Train and validation, divided so that no base is in both.

What is held out are regions of records, [start, end) counted from 0. A fragment inside them is
for validation, one outside is for training, and one that crosses a border is dropped.

A share of a source is held out in blocks of whole fragments, so that it crosses no fragment. The
blocks lie evenly among the fragments that the rules about N and genes keep: the end of a chromosome
is a telomere, whose composition is not that of the rest.
"""

import re
from itertools import pairwise

import numpy as np

from data_prep.fragment import Fate, Record
from data_prep.schema import Source
from gengram_megatron.errors import UserError

Regions = dict[str, list[tuple[int, int]]]
"""The held-out regions of each record that has any, in order and disjoint."""


def held_out(
    source: Source,
    default_share: float,
    default_blocks: int,
    records: list[Record],
    kept: list[np.ndarray],
    seq_length: int,
) -> Regions:
    """The regions of a source that are held out, by the one rule that its settings choose.

    kept: of each record the numbers of the fragments that no other rule drops, in order.
    """
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
    blocks = source.validation_blocks or default_blocks
    if blocks == 1:
        return _at_the_end(lengths, share)
    return {
        record.name: [
            (int(numbers[first]) * seq_length, (int(numbers[end - 1]) + 1) * seq_length)
            for first, end in spans
        ]
        for record, numbers, spans in zip(
            records, kept, spread_evenly([len(numbers) for numbers in kept], share, blocks)
        )
        if spans
    }


def spread_evenly(sizes: list[int], share: float, blocks: int) -> list[list[tuple[int, int]]]:
    """Choose `share` of the fragments of a source, to the fragment, spread evenly over its records.

    A record whose share is a fragment or more is cut: its share lies in `blocks` blocks, or in as
    many as it has fragments if those are fewer. Shorter records are held out whole, one every so
    often, and one of them in part, so that the sum is right.

    Args:
        sizes: fragments of each record.

    Returns for each record the chosen fragments as spans [first, end), in order and disjoint.
    """
    chosen: list[list[tuple[int, int]]] = [[] for _ in sizes]
    seen = given = 0
    for record, size in enumerate(sizes):
        if share * size >= 1:
            seen += size
            count = round(share * seen) - given
            given += count
            chosen[record] = _blocks(size, count, min(blocks, count))
    short = [record for record, size in enumerate(sizes) if 0 < share * size < 1]
    count = round(share * sum(sizes)) - given
    for place, taken in _every_so_often([sizes[record] for record in short], count).items():
        first = (sizes[short[place]] - taken) // 2
        chosen[short[place]] = [(first, first + taken)]
    return chosen


def _blocks(size: int, count: int, blocks: int) -> list[tuple[int, int]]:
    """Spans [first, end) of `count` of `size` fragments in so many blocks, of the same size and with
    the same number of other fragments between them, each to one fragment, and half that number
    before the first and after the last."""
    others = size - count
    spans = []
    for block in range(blocks):
        before, after = block * count // blocks, (block + 1) * count // blocks
        first = (2 * block + 1) * others // (2 * blocks) + before
        spans.append((first, first + after - before))
    return spans


def _every_so_often(sizes: list[int], count: int) -> dict[int, int]:
    """How many of `count` fragments each of some records gives, so that they lie evenly over the row
    of records: all that it has, but for one record at most."""
    given: dict[int, int] = {}
    total, passed, left_out = sum(sizes), 0, None
    held = 0
    for record, size in enumerate(sizes):
        passed += size
        if (2 * held + size) * total <= 2 * count * passed:  # its middle is due to be held out
            given[record] = min(size, count - held)
            held += given[record]
        else:
            left_out = record
    if held < count:  # by less than half of the last record that was left out
        given[left_out] = count - held
    return given


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
