"""Whether the manifest's numbers agree with each other and with the table of sequences."""

from collections.abc import Iterator

from data_prep.inspect.facts import Counts
from data_prep.inspect.opened import DataSet
from data_prep.manifest import MANIFEST
from data_prep.origins import RECORDS
from gengram_megatron.tokenizer import BASE_IDS, BASES, EOD


def check_counts(data: DataSet) -> Iterator[str]:
    """Problems of the manifest's own arithmetic."""
    facts = data.facts
    if facts.tokens != {**dict(zip(BASES, BASE_IDS)), "EOD": EOD}:
        yield f"{MANIFEST}: tokens are {facts.tokens}, not those of this version's tokenizer"
    for key, source in facts.sources.items():
        yield from _check_sums(f"source {key}", source, data.seq_length)
        if sum(source.composition.values()) != source.bases:
            yield f"{MANIFEST}: the composition of source {key} does not sum to its bases"
    for name, group in facts.groups.items():
        yield from _check_sums(f"group {name}", group, data.seq_length)
        own = [source for key, source in facts.sources.items() if key.startswith(f"{name}/")]
        for field in Counts.model_fields:
            if getattr(group, field) != sum(getattr(source, field) for source in own):
                yield f"{MANIFEST}: {field} of group {name} is not the sum of its sources'"
    for name, split in facts.splits.items():
        if split.fragments != sum(group.fates[name] for group in facts.groups.values()):
            yield f"{MANIFEST}: fragments of split {name} are not the sum of the groups'"
        if split.tokens != split.fragments * (data.seq_length + 1):
            yield f"{MANIFEST}: tokens of split {name} are not those of its fragments"


def check_sequences(data: DataSet) -> Iterator[str]:
    """Whether records.tsv has the records and bases of each source that the manifest has."""
    for key, source in data.facts.sources.items():
        own = [sequence.bases for sequence in data.sequences if sequence.source == key]
        if (len(own), sum(own)) != (source.records, source.bases):
            yield (
                f"{RECORDS} has {len(own):,} sequences of source {key} with {sum(own):,} bases, "
                f"and {MANIFEST} says {source.records:,} with {source.bases:,}"
            )
        fragments = sum(bases // data.seq_length for bases in own)
        if fragments != source.fragments:
            yield (
                f"{RECORDS} has room for {fragments:,} fragments of source {key}, and {MANIFEST} "
                f"says {source.fragments:,}"
            )


def _check_sums(name: str, counts: Counts, seq_length: int) -> Iterator[str]:
    if sum(counts.fates.values()) != counts.fragments:
        yield f"{MANIFEST}: what became of the fragments of {name} does not sum to their number"
    if counts.fragments * seq_length + counts.remainder_bases != counts.bases:
        yield f"{MANIFEST}: fragments and remainder of {name} do not sum to its bases"
    for split in ("train", "validation"):
        if getattr(counts, f"{split}_tokens") != counts.fates[split] * (seq_length + 1):
            yield f"{MANIFEST}: {split}_tokens of {name} are not those of its fragments"
