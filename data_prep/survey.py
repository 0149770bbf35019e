"""The first reading of a source: what it holds, and the fates of its fragments before the mix."""

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import fragment, genes, split
from data_prep.compressed import HashingReader, bytes_after
from data_prep.fasta import read_counts
from data_prep.fragment import Fate, Record
from data_prep.manifest import file_facts
from data_prep.schema import DataConfig
from data_prep.sources import Input
from data_prep.split import with_chromosomes
from data_prep.workers import Advance
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import BASES


@dataclass(frozen=True)
class Survey:
    """What is kept of a source after it was read: everything except its bases."""

    facts: dict[str, Any]  # what the manifest says of it: files, genes, composition
    names: list[str]  # names of the records
    lengths: np.ndarray  # [records] int64, bases of each record
    fates: np.ndarray  # [fragments] uint8, the fates of the fragments, record after record
    stamps: dict[str, list[int]]  # size and modification time of each file, see Input.stamps

    def save(self, path: Path) -> None:
        """Writes the survey to a file that `load` can read."""
        about = {"facts": self.facts, "names": self.names, "stamps": self.stamps}
        with path.open("wb") as file:
            np.savez(
                file, about=np.array(json.dumps(about)), lengths=self.lengths, fates=self.fates
            )

    @classmethod
    def load(cls, path: Path) -> "Survey":
        """Reads a file that `save` has written."""
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].item())
            return cls(lengths=arrays["lengths"], fates=arrays["fates"], **about)


def survey(source: Input, advance: Advance, config: DataConfig) -> Survey:
    """Reads a source and sets the fate of each fragment as far as it depends on this source only.

    Raises UserError if a file is damaged or changes meanwhile, or the source has no fragment.
    """
    stamps = source.stamps()
    facts, records, composition = _read(source, config.seq_length, advance)
    if "chromosomes" in source.files:
        records = with_chromosomes(records, source.files["chromosomes"])
    bases = sum(record.length for record in records)
    if composition["N"] == bases:
        raise UserError(f"{source.path} contains only N")
    fragment.check_longest(source.path, records, config.seq_length)
    fates = [np.full(len(record.n_bases), Fate.TRAIN, dtype=np.uint8) for record in records]
    gene_facts = _drop(fates, source, config, records)
    kept = [fate == Fate.TRAIN for fate in fates]
    held_out = split.held_out(source.settings, config, records, kept)
    for record, fate in zip(records, fates):
        split.assign(fate, record, held_out, config.seq_length)
    facts |= {key: file_facts(path) for key, path in source.files.items() if key != "fasta"}
    after = {key: count for key, path in source.files.items() if (count := bytes_after(path))}
    facts |= {"bytes_after_compressed_data": after} if after else {}
    held_out_bases = sum(end - start for spans in held_out.values() for start, end in spans)
    check_unchanged(source, stamps)
    return Survey(
        facts={
            **facts,
            "genes": gene_facts,
            "composition": composition,
            "held_out_bases": held_out_bases,
        },
        names=[record.name for record in records],
        lengths=np.array([record.length for record in records], dtype=np.int64),
        fates=np.concatenate(fates),
        stamps=stamps,
    )


def check_unchanged(source: Input, stamps: dict[str, list[int]]) -> None:
    """Raises UserError if a file of the source has changed since `stamps` were taken."""
    current = source.stamps()
    for kind, path in source.files.items():
        if current[kind] != stamps[kind]:
            raise changed(path)


def changed(path: Path) -> UserError:
    """Returns the error for a file that has changed since it was first read."""
    return UserError(f"{path} was changed while it was read; start again")


def _read(
    source: Input, seq_length: int, advance: Advance
) -> tuple[dict[str, Any], list[Record], dict[str, int]]:
    """Returns size and checksum of the FASTA file, its records, and how often it has each base."""
    composition = np.zeros(len(BASES), dtype=np.int64)
    records: list[Record] = []
    reported = 0  # bytes of the file
    with HashingReader(source.path) as file:
        all_blocks = read_counts(source.path, file)
        for (name, header), blocks in groupby(all_blocks, key=lambda it: (it.name, it.header)):
            length, with_n = 0, []
            for block in blocks:
                bases = int(block.composition.sum())
                if block.ids is not None and block.composition[-1]:
                    with_n.append(fragment.count_n(length, block.ids, seq_length))
                length += bases
                composition += block.composition
                advance(file.bytes - reported)
                reported = file.bytes
            n_bases = fragment.add_n(with_n, length, seq_length)
            records.append(Record(name, length, n_bases, header))
        advance(file.bytes - reported)
        return file.facts(), records, dict(zip(BASES, composition.tolist()))


def _drop(
    fates: list[np.ndarray], source: Input, config: DataConfig, records: list[Record]
) -> dict[str, Any]:
    """Marks the fragments of each record that the filters of the config drop, in place.

    Returns what the manifest says of the genes.
    """
    for record, fate in zip(records, fates):
        fragment.drop_n(fate, record, config.seq_length, config.max_n_fraction)
    if config.gene_distance is None:
        return {}
    return genes.drop_far(
        fates,
        records,
        source.settings,
        source.files.get("annotation"),
        config.seq_length,
        config.gene_distance,
    )
