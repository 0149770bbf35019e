"""The chromosome of each record, where a table says it and the FASTA does not.

HPRC names its contigs by accession; its chromAlias.txt has a line for each:
`HG00097#1#CM094060.1  chr1  CM094060.1`.
"""

from dataclasses import replace
from pathlib import Path

from data_prep.compressed import reading, unpacked
from data_prep.fragment import Record
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
