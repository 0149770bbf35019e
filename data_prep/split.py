"""Divides fragments into train and validation so that no base is in both.

Regions of records, [start, end) counted from 0, are held out. A fragment inside such a region is
for validation, one outside of all is for training, and one that crosses a border is dropped.

By default a share of each source is held out in blocks of fragments, evenly spread over its
records: the ends of chromosomes are telomeres, whose composition differs from that of the rest.

A config may hold out chromosomes by name. HPRC names its contigs by accession; the chromosome of
each record is then read from a table such as its chromAlias.txt, with a line for each record:
`HG00097#1#CM094060.1  chr1  CM094060.1`.
"""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.compressed import decompressed, explain_read_errors
from data_prep.fragment import Fate, Record
from data_prep.schema import DataConfig, Source
from gengram_megatron.errors import UserError


def with_chromosomes(records: list[Record], path: Path) -> list[Record]:
    """Returns the records, each with the rest of its line in the table appended to its header.

    Records that the table lacks stay as they are. Raises UserError if it has none of the records.
    """
    with explain_read_errors(path, "a table of chromosomes"), decompressed(path) as file:
        lines = [line.split(maxsplit=1) for line in file.read().decode().splitlines()]
    table = {line[0]: line[1].strip() for line in lines if len(line) == 2}
    if not any(record.name in table for record in records):
        raise UserError(
            f"{path} has none of the records of this source, such as {records[0].name}; the first "
            "column must contain their names"
        )
    return [
        replace(record, header=f"{record.header} {table[record.name]}")
        if record.name in table
        else record
        for record in records
    ]


Regions = dict[str, list[tuple[int, int]]]
"""The held-out regions [start, end) of each record that has any, in order and disjoint."""

GOLDEN_RATIO = (5**0.5 - 1) / 2


def held_out(
    source: Source, config: DataConfig, records: list[Record], kept: list[np.ndarray]
) -> Regions:
    """Returns the held-out regions of a source, by the one rule that its settings choose.

    Args:
        source: the settings of the source.
        config: the settings of the data set; its defaults apply where the source has none.
        records: the records of the source.
        kept: for each record, which fragments of its grid no other rule drops, [fragments] bool.
    """
    lengths = {record.name: record.length for record in records}
    if source.validation_records is not None:
        for name in source.validation_records:
            _check_record(source, name, lengths)
        return {name: [(0, lengths[name])] for name in source.validation_records}
    if source.validation_regions is not None:
        return _named_regions(source, source.validation_regions, lengths)
    if source.validation_headers is not None:
        matches = [
            record for record in records if re.search(source.validation_headers, record.header)
        ]
        return {record.name: [(0, record.length)] for record in matches}
    share = config.validation if source.validation is None else source.validation
    blocks = source.validation_blocks or config.validation_blocks
    if blocks == 1:
        return _at_the_end(lengths, share)
    return _in_blocks(records, kept, share, blocks, config.seq_length)


def assign(fates: np.ndarray, record: Record, regions: Regions, seq_length: int) -> None:
    """Sets the fates of a record's fragments that the split decides, in place.

    Fragments in TRAIN that are held out become VALIDATION. All that cross a border become
    STRADDLES, even those that another rule has dropped.

    Args:
        fates: the fates of the fragments of the record's grid, [fragments] uint8.
        record: the record.
        regions: the held-out regions of all records.
        seq_length: the number of bases of a fragment.
    """
    starts = np.arange(len(fates)) * seq_length
    inside = np.zeros(len(fates), dtype=np.int64)  # held-out bases of each fragment
    for start, end in regions.get(record.name, []):
        overlap = np.minimum(end, starts + seq_length) - np.maximum(start, starts)
        inside += np.maximum(overlap, 0)
    fates[(inside == seq_length) & (fates == Fate.TRAIN)] = Fate.VALIDATION
    fates[(inside > 0) & (inside < seq_length)] = Fate.STRADDLES


def _in_blocks(
    records: list[Record], kept: list[np.ndarray], share: float, blocks: int, seq_length: int
) -> Regions:
    """Returns regions that hold out a share of all kept fragments, exact to half a fragment.

    Long records are held out in blocks, short ones whole. Borders lie between fragments, so no
    fragment crosses one.
    """
    sizes = [int(np.count_nonzero(mask)) for mask in kept]
    counts = _held_out_of_each(sizes, share, blocks)
    regions: Regions = {}
    for record, mask, size, count in zip(records, kept, sizes, counts):
        if count and count == size:
            regions[record.name] = [(0, record.length)]
        elif count:
            kept_indices = np.flatnonzero(mask)
            regions[record.name] = [
                (
                    int(kept_indices[first]) * seq_length,
                    (int(kept_indices[end - 1]) + 1) * seq_length,
                )
                for first, end in _evenly_spread(size, count, min(blocks, count))
            ]
    return regions


def _held_out_of_each(sizes: list[int], share: float, blocks: int) -> list[int]:
    """Returns how many fragments of each record are held out; `sizes` is how many each record has.

    Each long record contributes its own share. The short ones contribute theirs together: some are
    held out whole, and one more contributes the fragments that are still missing.
    """
    long = _long_records(sizes, share, blocks)
    counts, seen, held_out_so_far = [0] * len(sizes), 0, 0
    for index in long:
        seen += sizes[index]
        counts[index] = round(share * seen) - held_out_so_far
        held_out_so_far += counts[index]
    missing = round(share * sum(sizes)) - held_out_so_far
    # The fractional parts of the multiples of the golden ratio fill the unit interval evenly. So
    # the records with the smallest fractional parts are spread evenly over the file, however many
    # of them are needed, and whatever their lengths are.
    short = sorted(set(range(len(sizes))) - set(long), key=lambda n: (n + 1) * GOLDEN_RATIO % 1)
    for index in short:
        counts[index] = min(missing, sizes[index])
        missing -= counts[index]
    return counts


def _long_records(sizes: list[int], share: float, blocks: int) -> list[int]:
    """Returns the indices of the records that are cut into blocks, in the order of the file.

    These are the records whose share has a fragment for each block, and those that are longer than
    what they and all shorter records contribute together, so that they cannot be held out whole.
    """
    remaining, long = sum(sizes), []
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        if share * sizes[index] < blocks and sizes[index] <= share * remaining:
            break
        long.append(index)
        remaining -= sizes[index]
    return sorted(long)


def _evenly_spread(size: int, count: int, blocks: int) -> list[tuple[int, int]]:
    """Returns `count` of `size` fragments in evenly spread blocks, as [first, end) of each block.

    The gap between two blocks is as large as those before the first and after the last block
    together.
    """
    outside = size - count
    return [
        (
            outside * (2 * block + 1) // (2 * blocks) + count * block // blocks,
            outside * (2 * block + 1) // (2 * blocks) + count * (block + 1) // blocks,
        )
        for block in range(blocks)
    ]


def _at_the_end(lengths: dict[str, int], share: float) -> Regions:
    """Returns regions that hold out the last `share` of all bases, which is validation_blocks: 1.

    Whole records are held out from the end of the file as long as they fit. The end of the first
    record that does not fit is held out too, but only if that record is longer than the whole
    share. So chromosomes are cut and short segments stay whole.
    """
    budget = round(share * sum(lengths.values()))
    regions: Regions = {}
    remaining = budget
    for name, length in reversed(lengths.items()):
        if length > remaining:
            if length > budget and remaining > 0:
                regions[name] = [(length - remaining, length)]
            break
        regions[name] = [(0, length)]
        remaining -= length
    return regions


def _named_regions(source: Source, texts: list[str], lengths: dict[str, int]) -> Regions:
    """Parses `record:first-last` (counted from 1, both ends included) and returns the regions."""
    regions: Regions = {}
    for text in texts:
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
