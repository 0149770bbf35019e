"""Opens a built data set: its manifest, in which the types of all values used are checked, its
table of sequences, and its files as memory maps.

Files are read only when they are needed, so a data set of any size opens at once.
"""

import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

from data_prep.fragment import Fate
from data_prep.write import ORIGIN, RECORDS, origins_path
from gengram_megatron.data_set import MANIFEST, read_manifest
from gengram_megatron.errors import UserError


class Counts(BaseModel):
    """What a source or a group held, and the fates of its fragments."""

    train: NonNegativeInt
    validation: NonNegativeInt
    straddles: NonNegativeInt
    too_many_n: NonNegativeInt
    far_from_genes: NonNegativeInt
    left_out_of_train: NonNegativeInt
    left_out_of_validation: NonNegativeInt
    records: NonNegativeInt
    bases: NonNegativeInt
    remainder_bases: NonNegativeInt
    fragments: NonNegativeInt
    train_tokens: NonNegativeInt
    validation_tokens: NonNegativeInt

    @property
    def fates(self) -> dict[str, int]:
        """The number of fragments by fate."""
        return {fate.name.lower(): getattr(self, fate.name.lower()) for fate in Fate}


class FileFacts(BaseModel):
    """One file of the data set."""

    bytes: NonNegativeInt
    sha256: str


class SourceFacts(Counts):
    """One FASTA file that the data set was made from."""

    fasta: str
    bytes: NonNegativeInt
    sha256: str
    genes: dict[str, Any]
    composition: dict[str, NonNegativeInt]


class SplitFacts(BaseModel):
    """What one split holds."""

    fragments: NonNegativeInt
    tokens: NonNegativeInt


class Settings(BaseModel):
    """The settings that the checks and tables need."""

    seq_length: PositiveInt
    seed: NonNegativeInt
    reverse_complement: float
    gene_distance: NonNegativeInt | None


class Facts(BaseModel):
    """The contents of a manifest."""

    settings: Settings
    tokens: dict[str, int]
    splits: dict[str, SplitFacts]
    groups: dict[str, Counts]
    sources: dict[str, SourceFacts]
    files: dict[str, FileFacts]


def read_facts(folder: Path) -> Facts:
    """Returns the manifest of a data set.

    Raises UserError if the folder is not a data set, or its manifest is damaged or of another
    version.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder.absolute()}; gengram-data build makes data sets"
        )
    try:
        return Facts.model_validate(read_manifest(folder))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{folder / MANIFEST} is damaged ({key}: {first['msg'].lower()}); "
            "build the data set again"
        ) from None


COPY_OR_BUILD_AGAIN = "copy or build the data set again"


@dataclass(frozen=True)
class Sequence:
    """A record of a source: a row of records.tsv."""

    source: str  # group/name
    name: str
    bases: int


@dataclass(frozen=True)
class Split:
    """The fragments of a split."""

    tokens: np.ndarray  # [fragments, seq_length + 1] uint8: bases and EOD
    origins: np.ndarray  # [fragments] with the dtype data_prep.write.ORIGIN


class DataSet:
    """A folder that `gengram-data build` wrote; raises UserError if it is not a data set."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.facts: Facts = read_facts(folder)
        self.seq_length = self.facts.settings.seq_length

    @cached_property
    def sequences(self) -> list[Sequence]:
        """All sequences of all sources; a fragment's origin holds an index into this list."""
        path = self._whole(RECORDS)
        try:
            rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
            sequences = [Sequence(source, name, int(bases)) for source, name, bases in rows]
        except ValueError:
            raise UserError(f"{path} is damaged; {COPY_OR_BUILD_AGAIN}") from None
        unknown = {sequence.source for sequence in sequences} - self.facts.sources.keys()
        if unknown:
            raise UserError(f"{path} has sources that the manifest lacks: {', '.join(unknown)}")
        return sequences

    def split(self, name: str, scattered: bool = False) -> Split:
        """Opens one split; `scattered` is that of `open_tokens`.

        Raises UserError if there is no split of this name, or one of its files is incomplete.
        """
        if name not in self.facts.splits:
            splits = " and ".join(self.facts.splits)
            raise UserError(f"{self.folder} has no split {name}; its splits are {splits}")
        tokens = open_tokens(self._whole(f"{name}.bin"), self.seq_length, scattered)
        origins = open_origins(self._whole(origins_path(self.folder, name).name))
        count = self.facts.splits[name].fragments
        if not count == len(tokens) == len(origins):
            raise UserError(
                f"{self.folder} is damaged: split {name} should have {count:,} fragments, but has "
                f"{len(tokens):,} in its tokens and {len(origins):,} in its origins; "
                f"{COPY_OR_BUILD_AGAIN}"
            )
        return Split(tokens, origins)

    def fault(self, name: str) -> str | None:
        """Returns what is wrong with a file, judged by its size, as a sentence; None if nothing."""
        path, facts = self.folder / name, self.facts.files.get(name)
        if facts is None:
            return f"the manifest of {self.folder} lists no {name}"
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != facts.bytes:
            return f"{path} has {size:,} bytes and should have {facts.bytes:,}"
        return None

    def _whole(self, name: str) -> Path:
        """Returns the path of a file; raises UserError unless it has the size that the manifest
        says."""
        if fault := self.fault(name):
            raise UserError(f"{fault}; {COPY_OR_BUILD_AGAIN}")
        return self.folder / name


def open_tokens(path: Path, seq_length: int, scattered: bool = False) -> np.ndarray:
    """Returns the tokens of a split as a memory map, [fragments, seq_length + 1] uint8, without an
    incomplete last row.

    `scattered` means that only single fragments will be read: then the system does not read ahead,
    which for a few thousand fragments of a large data set would be gigabytes.
    """
    length = seq_length + 1
    count = path.stat().st_size // length
    if count == 0:  # an empty file cannot be mapped
        return np.empty((0, length), dtype=np.uint8)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM if scattered else mmap.MADV_SEQUENTIAL)
    return np.frombuffer(mapped, dtype=np.uint8, count=count * length).reshape(count, length)


def open_origins(path: Path) -> np.ndarray:
    """Returns the origins of a split as a memory map, [fragments] with the dtype ORIGIN.

    Raises UserError if the file holds something else.
    """
    origins: np.ndarray | None
    try:
        origins = np.lib.format.open_memmap(path, mode="r")  # np.load also opens archives
    except ValueError:
        origins = None
    if origins is None or origins.dtype != ORIGIN or origins.ndim != 1:
        raise UserError(f"{path} is damaged: it is not a table of origins; {COPY_OR_BUILD_AGAIN}")
    return origins
