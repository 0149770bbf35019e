"""Checks the files of a data set against its manifest: whether each exists with the right size and
checksum, every token is legal, the indexes are what megatron-core's IndexedDataset expects, and the
counts agree with each other.

All documents have the same length, so each number of an index follows from the number of
documents. Documents with the same fault are reported in one sentence.
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
"""How many documents with the same fault are listed by number."""


class Tally:
    """Counts documents and remembers the first few: a fault may affect millions of them."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[int] = []

    def add(self, numbers: np.ndarray) -> None:
        """Adds documents by their numbers, [n]."""
        self.count += len(numbers)
        self._first += numbers[: NAMED - len(self._first)].tolist()

    def __str__(self) -> str:
        """Returns a text such as `12 documents 4, 8, 15, ...`."""
        more = ", ..." if self.count > len(self._first) else ""
        noun = "document" if self.count == 1 else f"{self.count:,} documents"
        return f"{noun} {', '.join(map(str, self._first))}{more}"


HEADER = np.dtype(
    [("magic", "S9"), ("version", "<u8"), ("type", "u1"), ("sequences", "<u8"), ("ends", "<u8")]
)
UINT8 = 1  # megatron-core's code of this type
AT_A_TIME = 1 << 20  # numbers of an index


def check_index(path: Path, documents: int, seq_length: int) -> Iterator[str]:
    """Yields problems of an index, which should be that of `documents` documents of seq_length + 1
    tokens."""
    # magic, format version, type, sequences (one per document), document borders
    expected = np.array((b"MMIDIDX", 1, UINT8, documents, documents + 1), dtype=HEADER)
    data = np.fromfile(path, dtype=np.uint8, count=HEADER.itemsize)
    if len(data) < HEADER.itemsize or data.view(HEADER)[0] != expected:
        yield (
            f"{path}: its first bytes are not those of an index of {documents:,} documents of "
            f"uint8, the number in {MANIFEST}"
        )
        return
    length = seq_length + 1
    sections = {
        "length": ("<i4", documents, lambda numbers: np.full(len(numbers), length)),
        "offset": ("<i8", documents, lambda numbers: numbers * length),
        "first sequence": ("<i8", documents + 1, lambda numbers: numbers),
    }
    offset = HEADER.itemsize
    for what, (kind, count, rule) in sections.items():
        end = offset + count * np.dtype(kind).itemsize
        if path.stat().st_size < end:
            yield f"{path} ends before it has the {what} of all documents"
            return
        wrong = _first_wrong(np.memmap(path, kind, "r", offset, count), rule)
        if wrong is not None:
            yield f"{path}: the {what} of document {wrong} is wrong"
        offset = end
    if path.stat().st_size > offset:
        yield f"{path} has more data after the last document"


def _first_wrong(numbers: np.ndarray, rule: Callable[[np.ndarray], np.ndarray]) -> int | None:
    """Returns the index of the first number that is not what `rule` gives for its index; None if
    all are right."""
    for start in range(0, len(numbers), AT_A_TIME):
        block = numbers[start : start + AT_A_TIME]
        wrong = np.flatnonzero(block != rule(np.arange(start, start + len(block))))
        if len(wrong):
            return start + int(wrong[0])
    return None


BLOCK = 1 << 24  # approximate number of bytes read at a time

_IS_BASE = np.isin(np.arange(256), BASE_IDS)


def check_files(data: DataSet, report: Report) -> Iterator[str]:
    """Yields problems of the files, each of which is read once."""
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
    """Reads a file in whole documents, passes them to `tokens` and returns its SHA-256."""
    digest = hashlib.sha256()
    length = 1 if tokens is None else tokens.length
    with path.open("rb") as file:
        while block := file.read(max(1, BLOCK // length) * length):
            digest.update(block)
            if tokens is not None:
                tokens.check(np.frombuffer(block, dtype=np.uint8))
            report(len(block))
    return digest.hexdigest()


class Tokens:
    """Checks the documents of a split while they are read: each must be bases and then EOD."""

    def __init__(self, seq_length: int):
        self.length = seq_length + 1
        self._checked = 0  # documents
        self._rest = 0  # bytes after the last whole document
        self._illegal, self._early, self._unterminated = Tally(), Tally(), Tally()

    def check(self, tokens: np.ndarray) -> None:
        """Checks the tokens of the next documents, uint8; only the last block may end with an
        incomplete document."""
        whole = len(tokens) // self.length * self.length
        self._rest = len(tokens) - whole
        documents = tokens[:whole].reshape(-1, self.length)
        inside = documents[:, :-1]
        wrong = np.flatnonzero(~_IS_BASE[inside].all(axis=1))
        early = (inside[wrong] == EOD).any(axis=1)
        illegal = ~(_IS_BASE[inside[wrong]] | (inside[wrong] == EOD)).all(axis=1)
        self._early.add(self._checked + wrong[early])
        self._illegal.add(self._checked + wrong[illegal])
        self._unterminated.add(self._checked + np.flatnonzero(documents[:, -1] != EOD))
        self._checked += len(documents)

    def problems(self, path: Path, fragments: int) -> Iterator[str]:
        """Yields the problems of the file, which should hold `fragments` fragments."""
        if self._checked != fragments or self._rest:
            rest = f" and {self._rest:,} bytes" if self._rest else ""
            yield (
                f"{path} holds {self._checked:,} documents of {self.length:,} tokens{rest}, but "
                f"{MANIFEST} says {fragments:,}"
            )
        if self._illegal.count:
            yield f"{path}: {self._illegal} with tokens that are neither one of {BASES} nor EOD"
        if self._early.count:
            yield f"{path}: {self._early} with EOD before the end"
        if self._unterminated.count:
            yield f"{path}: {self._unterminated} without EOD at the end"


def check_counts(data: DataSet) -> Iterator[str]:
    """Yields counts of the manifest that contradict each other."""
    facts = data.facts
    if facts.tokens != {**dict(zip(BASES, BASE_IDS)), "EOD": EOD}:
        yield f"{MANIFEST}: tokens are {facts.tokens}, not those of this version's tokenizer"
    for key, source in facts.sources.items():
        yield from _check_sums(f"source {key}", source, data.seq_length)
        if sum(source.composition.values()) != source.bases:
            yield f"{MANIFEST}: the composition of source {key} does not sum to its bases"
    for name, group in facts.groups.items():
        yield from _check_sums(f"group {name}", group, data.seq_length)
        members = [source for key, source in facts.sources.items() if key.startswith(f"{name}/")]
        for field in Counts.model_fields:
            if getattr(group, field) != sum(getattr(source, field) for source in members):
                yield f"{MANIFEST}: {field} of group {name} is not the sum of its sources'"
    for name, split in facts.splits.items():
        if split.fragments != sum(group.fates[name] for group in facts.groups.values()):
            yield f"{MANIFEST}: fragments of split {name} are not the sum of the groups'"
        if split.tokens != split.fragments * (data.seq_length + 1):
            yield f"{MANIFEST}: tokens of split {name} are not those of its fragments"


def check_sequences(data: DataSet) -> Iterator[str]:
    """Yields sources of which records.tsv has other numbers of records or bases than the
    manifest."""
    for key, source in data.facts.sources.items():
        lengths = [sequence.bases for sequence in data.sequences if sequence.source == key]
        if (len(lengths), sum(lengths)) != (source.records, source.bases):
            yield (
                f"{RECORDS} has {len(lengths):,} sequences of source {key} with {sum(lengths):,} "
                f"bases, but {MANIFEST} says {source.records:,} with {source.bases:,}"
            )
        fragments = sum(length // data.seq_length for length in lengths)
        if fragments != source.fragments:
            yield (
                f"{RECORDS} has room for {fragments:,} fragments of source {key}, but {MANIFEST} "
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
