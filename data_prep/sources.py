"""The FASTA files of a data set, those that a pattern stands for among them."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.schema import DataConfig, Source
from gengram_megatron.errors import UserError


@dataclass(frozen=True)
class Input:
    """One FASTA file of a build, and what the config says of it."""

    group: str
    name: str
    path: Path
    annotation: Path | None  # None too where the build does not ask for genes
    settings: Source

    @property
    def key(self) -> str:
        """The source's name in the whole data set."""
        return f"{self.group}/{self.name}"

    @property
    def files(self) -> dict[str, Path]:
        """All files that the source is read from, by what they are."""
        optional = {"annotation": self.annotation}
        return {"fasta": self.path, **{kind: path for kind, path in optional.items() if path}}

    def stamps(self) -> dict[str, list[int]]:
        """Size and time of change of the files: as long as these stay, so do the files."""
        facts = {kind: os.stat(path) for kind, path in self.files.items()}
        return {kind: [fact.st_size, fact.st_mtime_ns] for kind, fact in facts.items()}


def inputs(config: DataConfig, folder: Path) -> list[Input]:
    """All sources of a config file that lies in `folder`, in its order; UserError if one is not
    there."""
    found: dict[str, Input] = {}
    for group_name, group in config.groups.items():
        for name, settings in group.sources.items():
            for own_name, own in _expanded(name, settings, folder):
                used = config.gene_distance is not None and own.annotation is not None
                annotation = folder / own.annotation if used else None
                source = Input(group_name, own_name, folder / own.fasta, annotation, own)
                if source.key in found:
                    raise UserError(
                        f"two sources are called {source.key}; the pattern {settings.fasta} gives "
                        "a name that another source has"
                    )
                _check_files(source)
                found[source.key] = source
    return list(found.values())


def _expanded(name: str, settings: Source, folder: Path) -> Iterator[tuple[str, Source]]:
    """The source itself; of one with a pattern, a source for each file, named by what the star
    stands for."""
    if "*" not in settings.fasta:
        yield name, settings
        return
    pattern = Path(settings.fasta)
    before, after = pattern.name.split("*")
    matches = sorted(path.name for path in (folder / pattern.parent).glob(pattern.name))
    if not matches:
        raise UserError(
            f"no file is like {folder / pattern} (source {name}); gengram-data download fetches "
            "the files of the lists in configs/data/download"
        )
    for match in matches:
        star = match[len(before) : len(match) - len(after)]
        if not re.fullmatch(r"[\w.+-]+", star, re.ASCII):
            raise UserError(
                f"{folder / pattern.parent / match} would be a source called {star!r}; a name has "
                "letters, digits, and any of . _ + -; rename the file"
            )
        starred = {
            key: value.replace("*", star)
            for key in STARRED
            if (value := getattr(settings, key)) is not None
        }
        yield star, settings.model_copy(update=starred)


STARRED = ("fasta", "annotation")
"""The keys of a source in which the star of a pattern stands."""


def _check_files(source: Input) -> None:
    for path in source.files.values():
        if not path.is_file():
            raise UserError(f"{path}: there is no such file (source {source.key})")
