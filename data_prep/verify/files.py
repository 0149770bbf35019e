"""A data set's files against its manifest: there, as long, the same bytes, every token legal, the
indexes as megatron-core's IndexedDataset reads them, and numbers that agree with each other.

All documents have the same length, so each number of an index follows from how many there are.
Documents that share a fault are told in one sentence.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.inspect.opened import Counts, DataSet
from data_prep.progress import Phase, Report
from data_prep.write import RECORDS, origins_path
from gengram_megatron.data_set import MANIFEST
from gengram_megatron.tokenizer import BASE_IDS, BASES, EOD

NAMED = 3


class Tally:
    """Counts documents and remembers the first few: one fault may concern millions."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[int] = []

    def add(self, numbers: np.ndarray) -> None:
        """Add documents [n] by number."""
        self.count += len(numbers)
        self._first += numbers[: NAMED - len(self._first)].tolist()

    def __str__(self) -> str:
        """Such as `12 documents (4, 8, 15, ...)`."""
        more = ", ..." if self.count > len(self._first) else ""
        noun = "document" if self.count == 1 else f"{self.count:,} documents"
        return f"{noun} {', '.join(map(str, self._first))}{more}"


HEADER = np.dtype(
    [("magic", "S9"), ("version", "<u8"), ("type", "u1"), ("sequences", "<u8"), ("ends", "<u8")]
)
UINT8 = 1  # megatron-core's number of this type
AT_A_TIME = 1 << 20


def check_index(path: Path, documents: int, seq_length: int) -> Iterator[str]:
    """Problems of the index of so many documents of seq_length + 1 tokens."""
    # magic, format version, type, sequences (one a document), document borders
    expected = np.array((b"MMIDIDX", 1, UINT8, documents, documents + 1), dtype=HEADER)
    data = np.fromfile(path, dtype=np.uint8, count=HEADER.itemsize)
    if len(data) < HEADER.itemsize or data.view(HEADER)[0] != expected:
        yield (
            f"{path}: its first bytes are not those of an index of {documents:,} documents of "
            f"uint8, the number in {MANIFEST}"
        )
        return
    length = seq_length + 1
    parts = {
        "length": ("<i4", documents, lambda numbers: np.full(len(numbers), length)),
        "place": ("<i8", documents, lambda numbers: numbers * length),
        "first sequence": ("<i8", documents + 1, lambda numbers: numbers),
    }
    offset = HEADER.itemsize
    for what, (kind, count, rule) in parts.items():
        end = offset + count * np.dtype(kind).itemsize
        if path.stat().st_size < end:
            yield f"{path} ends before the {what} of all documents"
            return
        wrong = _first_wrong(np.memmap(path, kind, "r", offset, count), rule)
        if wrong is not None:
            yield f"{path}: the {what} of document {wrong} is wrong"
        offset = end
    if path.stat().st_size > offset:
        yield f"{path} goes on after the last document"


def _first_wrong(numbers: np.ndarray, rule) -> int | None:
    """The place of the first number that does not follow the rule."""
    for start in range(0, len(numbers), AT_A_TIME):
        block = numbers[start : start + AT_A_TIME]
        wrong = np.flatnonzero(block != rule(np.arange(start, start + len(block))))
        if len(wrong):
            return start + int(wrong[0])
    return None


BLOCK = 1 << 24  # bytes read at a time, about

_IS_BASE = np.isin(np.arange(256), BASE_IDS)


def check_files(data: DataSet, report: Report) -> Iterator[str]:
    """Problems of files, each read once."""
    splits = data.facts.splits
    needed = {RECORDS}
    size = sum(facts.bytes for facts in data.facts.files.values())
    reading = partial(report, Phase("reading", size, "bytes"))
    for split in splits:
        needed |= {f"{split}.bin", f"{split}.idx", origins_path(data.folder, split).name}
    for name in sorted(needed | data.facts.files.keys()):
        fault = data.fault(name)
        if fault:
            yield fault
        path = data.folder / name
        if not path.is_file():
            continue
        split = name.removesuffix(".bin")
        tokens = Tokens(data.seq_length) if name.endswith(".bin") and split in splits else None
        digest = _read(path, tokens, reading)
        if not fault and digest != data.facts.files[name].sha256:
            yield f"{path}: the checksum of its content is not the one in {MANIFEST}"
        if tokens is not None:
            yield from tokens.problems(path, splits[split].fragments)


def _read(path: Path, tokens: "Tokens | None", report: Callable[[int], None]) -> str:
    """Read a file in whole documents, show them to `tokens` and return the SHA-256."""
    digest = hashlib.sha256()
    length = 1 if tokens is None else tokens.length
    with path.open("rb") as file:
        while block := file.read(max(1, BLOCK // length) * length):
            digest.update(block)
            if tokens is not None:
                tokens.see(np.frombuffer(block, dtype=np.uint8))
            report(len(block))
    return digest.hexdigest()


class Tokens:
    """Looks at the documents of a split as they are read: bases, then EOD."""

    def __init__(self, seq_length: int):
        self.length = seq_length + 1
        self._seen = 0
        self._rest = 0
        self._illegal, self._early, self._unended = Tally(), Tally(), Tally()

    def see(self, tokens: np.ndarray) -> None:
        """Look at the next documents, uint8; all but the last block hold whole ones."""
        whole = len(tokens) // self.length * self.length
        self._rest = len(tokens) - whole
        documents = tokens[:whole].reshape(-1, self.length)
        inside = documents[:, :-1]
        wrong = np.flatnonzero(~_IS_BASE[inside].all(axis=1))
        early = (inside[wrong] == EOD).any(axis=1)
        illegal = ~(_IS_BASE[inside[wrong]] | (inside[wrong] == EOD)).all(axis=1)
        self._early.add(self._seen + wrong[early])
        self._illegal.add(self._seen + wrong[illegal])
        self._unended.add(self._seen + np.flatnonzero(documents[:, -1] != EOD))
        self._seen += len(documents)

    def problems(self, path: Path, fragments: int) -> Iterator[str]:
        """What was found in the file, which should hold so many fragments."""
        if self._seen != fragments or self._rest:
            rest = f" and {self._rest:,} bytes" if self._rest else ""
            yield (
                f"{path} holds {self._seen:,} documents of {self.length:,} tokens{rest}, and "
                f"{MANIFEST} says {fragments:,}"
            )
        if self._illegal.count:
            yield f"{path}: {self._illegal} with tokens that are neither one of {BASES} nor EOD"
        if self._early.count:
            yield f"{path}: {self._early} with EOD before the end"
        if self._unended.count:
            yield f"{path}: {self._unended} without EOD at the end"


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
