"""Every file against the manifest: there, as long, the same bytes; and every token legal."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.inspect.opened import DataSet
from data_prep.manifest import MANIFEST
from data_prep.origins import RECORDS, origins_path
from data_prep.progress import Phase, Report
from data_prep.verify.tally import Tally
from gengram_megatron.tokenizer import BASE_IDS, BASES, EOD

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
