"""A built data set, opened: its manifest, with the types of all that is relied on checked, its
table of sequences, and its files as memory maps.

Nothing is read before it is asked for, so a data set of any size opens at once.
"""

import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError, create_model

from data_prep.fragment import Fate
from data_prep.write import ORIGIN, RECORDS, origins_path
from gengram_megatron.data_set import MANIFEST, read_manifest
from gengram_megatron.errors import UserError

FragmentsByFate = create_model(
    "FragmentsByFate", **{fate.name.lower(): (NonNegativeInt, ...) for fate in Fate}
)


class Counts(FragmentsByFate):
    """What a source or a group held, and what became of it."""

    records: NonNegativeInt
    bases: NonNegativeInt
    remainder_bases: NonNegativeInt
    fragments: NonNegativeInt
    train_tokens: NonNegativeInt
    validation_tokens: NonNegativeInt

    @property
    def fates(self) -> dict[str, int]:
        """Fragments by what became of them."""
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
    """The settings that later checks need."""

    seq_length: PositiveInt
    seed: NonNegativeInt
    reverse_complement: float
    gene_distance: NonNegativeInt | None


class Facts(BaseModel):
    """A manifest."""

    settings: Settings
    tokens: dict[str, int]
    splits: dict[str, SplitFacts]
    groups: dict[str, Counts]
    sources: dict[str, SourceFacts]
    files: dict[str, FileFacts]


def read_facts(folder: Path) -> Facts:
    """The manifest of a data set. UserError if the folder is none, or its manifest is of another
    version or lacks something."""
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder.absolute()}; gengram-data build makes data sets"
        )
    try:
        return Facts.model_validate(read_manifest(folder))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{folder / MANIFEST} is damaged ({where}: {first['msg'].lower()}); "
            "build the data set again"
        ) from None


AGAIN = "copy or build the data set again"


@dataclass(frozen=True)
class Sequence:
    """A record of a source, as records.tsv has it."""

    source: str  # group/name
    name: str
    bases: int


@dataclass(frozen=True)
class Split:
    """The fragments of a split."""

    tokens: np.ndarray  # [fragments, seq_length + 1] uint8: bases and EOD
    origins: np.ndarray  # [fragments] of data_prep.write.ORIGIN


class DataSet:
    """A folder that `gengram-data build` wrote. Raises UserError if it is none."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.facts: Facts = read_facts(folder)
        self.seq_length = self.facts.settings.seq_length

    @cached_property
    def sequences(self) -> list[Sequence]:
        """All sequences of all sources; a fragment's origin names one by its place here."""
        path = self._whole(RECORDS)
        try:
            rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
            found = [Sequence(source, name, int(bases)) for source, name, bases in rows]
        except ValueError:
            raise UserError(f"{path} is damaged; {AGAIN}") from None
        unknown = {sequence.source for sequence in found} - self.facts.sources.keys()
        if unknown:
            raise UserError(f"{path} has sources that the manifest lacks: {', '.join(unknown)}")
        return found

    def split(self, name: str, scattered: bool = False) -> Split:
        """Open one split; `scattered` as of open_tokens. UserError if there is none of this name
        or a file of it is not whole."""
        if name not in self.facts.splits:
            there = " and ".join(self.facts.splits)
            raise UserError(f"{self.folder} has no split {name}; its splits are {there}")
        tokens = open_tokens(self._whole(f"{name}.bin"), self.seq_length, scattered)
        origins = open_origins(self._whole(origins_path(self.folder, name).name))
        count = self.facts.splits[name].fragments
        if not count == len(tokens) == len(origins):
            raise UserError(
                f"{self.folder} is damaged: split {name} should have {count:,} fragments, and has "
                f"{len(tokens):,} in its tokens and {len(origins):,} in its origins; {AGAIN}"
            )
        return Split(tokens, origins)

    def fault(self, name: str) -> str | None:
        """What is wrong with a file as far as its size tells, as a sentence."""
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
        """The path of a file that is there, with as many bytes as the manifest says."""
        if fault := self.fault(name):
            raise UserError(f"{fault}; {AGAIN}")
        return self.folder / name


def open_tokens(path: Path, seq_length: int, scattered: bool = False) -> np.ndarray:
    """A split's tokens as a map [fragments, seq_length + 1], as far as there are whole rows.

    `scattered` says that fragments here and there will be read: then the system reads nothing
    ahead, which for a few thousand fragments of a large set would be gigabytes.
    """
    length = seq_length + 1
    count = path.stat().st_size // length
    if count == 0:  # there is no map of nothing
        return np.empty((0, length), dtype=np.uint8)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM if scattered else mmap.MADV_SEQUENTIAL)
    return np.frombuffer(mapped, dtype=np.uint8, count=count * length).reshape(count, length)


def open_origins(path: Path) -> np.ndarray:
    """A split's origins as a map [fragments]. UserError if the file holds something else."""
    try:
        origins = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        origins = None
    if origins is None or origins.dtype != ORIGIN or origins.ndim != 1:
        raise UserError(f"{path} is damaged: it is no table of origins; {AGAIN}")
    return origins
