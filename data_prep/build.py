"""A whole build, in the order in which it happens.

Every source is read twice: once to lay its grid and count, then, when the fate of each fragment
is known, to write. So only one record's bases are in memory at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import fragment, genes, manifest, mix, split, strand
from data_prep.fasta import read_fasta
from data_prep.fragment import Fate, Record
from data_prep.origins import write_records
from data_prep.publish import published
from data_prep.schema import DataConfig, Source
from data_prep.write import SplitWriter
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import BASE_IDS, BASES

SPLITS = {"train": Fate.TRAIN, "validation": Fate.VALIDATION}

Report = Callable[[str, int], None]
"""Is told what is being done, and how many more bases it was done to."""


@dataclass
class Reading:
    """A source and what is found out about it on the way."""

    group: str
    name: str
    path: Path
    annotation: Path | None
    settings: Source
    facts: dict[str, Any] = field(default_factory=dict)  # sizes and checksums
    genes: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    composition: np.ndarray = field(default_factory=lambda: np.zeros(len(BASES), dtype=np.int64))
    fates: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint8))

    @property
    def key(self) -> str:
        """The source's name in the whole data set."""
        return f"{self.group}/{self.name}"


def build(
    config: DataConfig, config_folder: Path, overwrite: bool, report: Report
) -> dict[str, Any] | None:
    """Build the data set and return its manifest; None if it is there and up to date."""
    output = Path(config.output).absolute()
    sources = list(_sources(config, config_folder))
    _checksum(sources, report)
    if output.exists() and _keep(output, config, sources, overwrite):
        return None
    for source in sources:
        _survey(source, config, report)
    _mix(sources, config)
    with published(output, replace=overwrite) as folder:
        _write(folder, sources, config, report)
        return manifest.write_manifest(folder, config, *_counts(sources, config))


def _sources(config: DataConfig, folder: Path) -> Iterator[Reading]:
    for group_name, group in config.groups.items():
        for name, settings in group.sources.items():
            used = config.gene_distance is not None and settings.annotation is not None
            annotation = folder / settings.annotation if used else None
            yield Reading(group_name, name, folder / settings.fasta, annotation, settings)


def _checksum(sources: list[Reading], report: Report) -> None:
    """Checksums of all sources, before any work: they tell whether there is any to do."""
    known: dict[str, str] = {}
    for source in sources:
        report(f"checksum of {source.key}", 0)
        source.facts = _facts(source.path, source.key)
        if source.annotation is not None:
            source.facts["annotation"] = _facts(source.annotation, source.key)
        twin = known.setdefault(source.facts["sha256"], source.key)
        if twin != source.key:
            raise UserError(f"sources {twin} and {source.key} are the same file, byte for byte")


def _facts(path: Path, source: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file (source {source})")
    try:
        return manifest.file_facts(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _keep(output: Path, config: DataConfig, sources: list[Reading], overwrite: bool) -> bool:
    """Whether the output that exists is to stay. Refuses where that is not for us to decide."""
    if not (output / manifest.MANIFEST).is_file():
        raise UserError(f"{output} exists and is not a data set; give another output")
    if overwrite:
        return False
    how = manifest.difference(output, config, {source.key: source.facts for source in sources})
    if how is None:
        return True
    raise UserError(f"{output} {how}; give another output, or --overwrite to replace it")


def _survey(source: Reading, config: DataConfig, report: Report) -> None:
    """First reading: records, composition, and the fate of fragments before the mix."""
    for name, ids in read_fasta(source.path):
        source.records.append(fragment.survey(name, ids, config.seq_length))
        source.composition += [np.count_nonzero(ids == base) for base in BASE_IDS]
        report(f"looking over {source.key}", len(ids))
    fragment.check_longest(source.path, source.records, config.seq_length)
    regions = split.held_out(source.settings, config.validation, source.records)
    fates = [split.assign(record, regions, config.seq_length) for record in source.records]
    for record, fate in zip(source.records, fates):
        fragment.drop_n(fate, record, config.seq_length, config.max_n_fraction)
    if config.gene_distance is not None:
        source.genes = genes.drop_far(
            fates,
            source.records,
            source.settings,
            source.annotation,
            config.seq_length,
            config.gene_distance,
        )
    source.fates = np.concatenate(fates)


def _mix(sources: list[Reading], config: DataConfig) -> None:
    """Balance the groups; each source's fates become its part of its group's."""
    fates = {
        group: np.concatenate([source.fates for source in sources if source.group == group])
        for group in config.groups
    }
    weights = {name: group.weight for name, group in config.groups.items()}
    mix.balance(fates, weights, config.seed, config.seq_length + 1, config.total_tokens)
    for group, fate in fates.items():
        for source in (source for source in sources if source.group == group):
            source.fates, fate = np.split(fate, [len(source.fates)])


def _write(folder: Path, sources: list[Reading], config: DataConfig, report: Report) -> None:
    """Second reading: write the fragments in the order of the sources."""
    rows: list[tuple[str, str, int]] = []
    with ExitStack() as stack:
        writers = {
            fate: stack.enter_context(SplitWriter(folder, name)) for name, fate in SPLITS.items()
        }
        for source in sources:
            fates = source.fates
            for record, (name, ids) in zip(source.records, read_fasta(source.path), strict=True):
                if (name, len(ids)) != (record.name, record.length):
                    raise UserError(f"{source.path} was changed while it was read")
                here, fates = np.split(fates, [len(record.n_bases)])
                share = config.reverse_complement
                reverse = strand.draw(config.seed, source.key, name, len(here), share)
                for fate, writer in writers.items():
                    chosen = np.flatnonzero(here == fate)
                    fragments = fragment.grid(ids, config.seq_length)[chosen]
                    turned = strand.turn(fragments, reverse[chosen])
                    writer.add(turned, len(rows), chosen * config.seq_length, reverse[chosen])
                rows.append((source.key, name, len(ids)))
                report(f"writing {source.key}", len(ids))
    write_records(folder, rows)


def _counts(
    sources: list[Reading], config: DataConfig
) -> tuple[dict[str, dict], dict[str, dict], dict[str, dict]]:
    """What the manifest says of sources, groups and splits."""
    tokens = config.seq_length + 1
    of_source, of_group = {}, {group: {} for group in config.groups}
    for source in sources:
        bases = sum(record.length for record in source.records)
        fates = np.bincount(source.fates, minlength=len(Fate)).tolist()
        counts = {
            "records": len(source.records),
            "bases": bases,
            "remainder_bases": bases - len(source.fates) * config.seq_length,
            "fragments": len(source.fates),
            **{fate.name.lower(): fates[fate] for fate in Fate},
            "train_tokens": fates[Fate.TRAIN] * tokens,
            "validation_tokens": fates[Fate.VALIDATION] * tokens,
        }
        composition = dict(zip(BASES, source.composition.tolist()))
        of_source[source.key] = {
            "fasta": source.settings.fasta,
            **source.facts,
            "genes": source.genes,
            "composition": composition,
            **counts,
        }
        sums = of_group[source.group]
        sums.update({name: sums.get(name, 0) + count for name, count in counts.items()})
    of_split = {
        name: {
            "fragments": sum(group[name] for group in of_group.values()),
            "tokens": sum(group[f"{name}_tokens"] for group in of_group.values()),
        }
        for name in SPLITS
    }
    return of_source, of_group, of_split
