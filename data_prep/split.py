"""Train and validation, divided so that no base is in both.

What is held out are regions of records, [start, end) counted from 0. A fragment inside them is
for validation, one outside is for training, and one that crosses a border is dropped.

By default a share of each source is held out in blocks of fragments, evenly spread over its
records: the ends of chromosomes are telomeres, whose composition is not that of the rest.

Regions name chromosomes. HPRC names its contigs by accession; the chromosome of each record is then
read from a table such as its chromAlias.txt, which has a line for each:
`HG00097#1#CM094060.1  chr1  CM094060.1`.
"""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.compressed import reading, unpacked
from data_prep.fragment import Fate, Record
from data_prep.schema import DataConfig, Source
from gengram_megatron.errors import UserError


def with_chromosomes(records: list[Record], path: Path) -> list[Record]:
    """The records, each with what the table says of it at the end of its header. UserError if the
    table has none of them; those that it lacks stay as they are."""
    with reading(path, "a table of chromosomes"), unpacked(path) as file:
        lines = [line.split(maxsplit=1) for line in file.read().decode().splitlines()]
    table = {line[0]: line[1].strip() for line in lines if len(line) == 2}
    if not any(record.name in table for record in records):
        raise UserError(
            f"{path} has none of the records of this source, such as {records[0].name}; its first "
            "column must have their names"
        )
    return [
        replace(record, header=f"{record.header} {table[record.name]}")
        if record.name in table
        else record
        for record in records
    ]


Regions = dict[str, list[tuple[int, int]]]
"""The held-out regions of each record that has any, in order and disjoint."""

GOLDEN_RATIO = (5**0.5 - 1) / 2


def held_out(
    source: Source, config: DataConfig, records: list[Record], kept: list[np.ndarray]
) -> Regions:
    """The regions of a source that are held out, by the one rule that its settings choose.

    Args:
        source: its settings.
        config: those of the data set, whose defaults hold where the source has none.
        records: of the source.
        kept: for each record, which fragments of its grid no other rule drops, [fragments] bool.
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
    share = config.validation if source.validation is None else source.validation
    blocks = source.validation_blocks or config.validation_blocks
    if blocks == 1:
        return _at_the_end(lengths, share)
    return _in_blocks(records, kept, share, blocks, config.seq_length)


def assign(fates: np.ndarray, record: Record, regions: Regions, seq_length: int) -> None:
    """Give the fragments of a record the fate that the split decides, in place: those in TRAIN that
    are held out, and all that cross a border, dropped ones among them."""
    starts = np.arange(len(fates)) * seq_length
    inside = np.zeros(len(fates), dtype=np.int64)  # bases of the fragment that are held out
    for start, end in regions.get(record.name, []):
        overlap = np.minimum(end, starts + seq_length) - np.maximum(start, starts)
        inside += np.maximum(overlap, 0)
    fates[(inside == seq_length) & (fates == Fate.TRAIN)] = Fate.VALIDATION
    fates[(inside > 0) & (inside < seq_length)] = Fate.STRADDLES


def _in_blocks(
    records: list[Record], kept: list[np.ndarray], share: float, blocks: int, seq_length: int
) -> Regions:
    """The share of the kept fragments of all records, exact to half a fragment: of long records in
    blocks, of short ones as whole records. Borders lie between fragments, so none crosses one."""
    sizes = [int(np.count_nonzero(mask)) for mask in kept]
    counts = _held_out_of_each(sizes, share, blocks)
    regions: Regions = {}
    for record, mask, size, count in zip(records, kept, sizes, counts):
        if count and count == size:
            regions[record.name] = [(0, record.length)]
        elif count:
            numbers = np.flatnonzero(mask)
            regions[record.name] = [
                (int(numbers[first]) * seq_length, (int(numbers[last - 1]) + 1) * seq_length)
                for first, last in _evenly(size, count, min(blocks, count))
            ]
    return regions


def _held_out_of_each(sizes: list[int], share: float, blocks: int) -> list[int]:
    """How many fragments of each record are held out, of as many as `sizes` says.

    Each long record gives its share. The short ones give theirs together: some are held out whole,
    and of one more the fragments that are still missing.
    """
    long = _long_records(sizes, share, blocks)
    counts, seen, given = [0] * len(sizes), 0, 0
    for number in long:
        seen += sizes[number]
        counts[number] = round(share * seen) - given
        given += counts[number]
    missing = round(share * sum(sizes)) - given
    # Multiples of the golden ratio fill the unit interval evenly. So the records that come first
    # by its fractional part are spread evenly over the file, however many of them are needed, and
    # whatever their lengths are.
    short = sorted(set(range(len(sizes))) - set(long), key=lambda n: (n + 1) * GOLDEN_RATIO % 1)
    for number in short:
        counts[number] = min(missing, sizes[number])
        missing -= counts[number]
    return counts


def _long_records(sizes: list[int], share: float, blocks: int) -> list[int]:
    """The numbers of the records that are cut, in the order of the file: those whose share has a
    fragment for each block, and those that are longer than all that the shorter ones are to give
    together, so that they could not be held out whole."""
    rest, found = sum(sizes), []
    for number in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        if share * sizes[number] < blocks and sizes[number] <= share * rest:
            break
        found.append(number)
        rest -= sizes[number]
    return sorted(found)


def _evenly(size: int, count: int, blocks: int) -> list[tuple[int, int]]:
    """`count` of `size` fragments in so many blocks, as [first, last) of each. Between two blocks
    is as much of the others as before the first one and after the last one together."""
    others = size - count
    return [
        (
            others * (2 * block + 1) // (2 * blocks) + count * block // blocks,
            others * (2 * block + 1) // (2 * blocks) + count * (block + 1) // blocks,
        )
        for block in range(blocks)
    ]


def _at_the_end(lengths: dict[str, int], share: float) -> Regions:
    """The last `share` of all bases, which is what validation_blocks: 1 means: whole records from
    the end of the file as long as they fit, and of the record that does not fit its own end, but
    only if the record is longer than the share itself. So chromosomes are cut and short segments
    stay whole."""
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
