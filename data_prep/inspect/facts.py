"""The parts of a manifest that its readers rely on, with their types checked."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError, create_model

from data_prep.fragment import Fate
from data_prep.manifest import MANIFEST, read_manifest
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
