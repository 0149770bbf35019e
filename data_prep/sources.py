"""The FASTA files of a data set, those that a pattern stands for among them."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.schema import STARRED, DataConfig, Source
from gengram_megatron.errors import UserError


@dataclass(frozen=True)
class Input:
    """One FASTA file of a build, and what the config says of it."""

    group: str
    name: str
    settings: Source  # complete: with the data set's defaults, without patterns
    files: dict[str, Path]  # all that the source is read from, by the key that names it

    @property
    def key(self) -> str:
        """The source's name in the whole data set."""
        return f"{self.group}/{self.name}"

    @property
    def path(self) -> Path:
        """The FASTA file."""
        return self.files["fasta"]

    def stamps(self) -> dict[str, list[int]]:
        """Size and time of change of the files: as long as these stay, so do the files."""
        try:
            facts = {key: os.stat(path) for key, path in self.files.items()}
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
        return {key: [fact.st_size, fact.st_mtime_ns] for key, fact in facts.items()}


def inputs(config: DataConfig, folder: Path) -> list[Input]:
    """All sources of a config file that lies in `folder`, in its order; UserError if a file is not
    there."""
    found: dict[str, Input] = {}
    for group_name, group in config.groups.items():
        for name, settings in group.sources.items():
            complete = _complete(settings, config)
            for own_name, own in _expanded(f"{group_name}/{name}", complete, folder):
                source = Input(group_name, own_name, own, _files(own, config, folder))
                if source.key in found:
                    raise UserError(
                        f"two sources are called {source.key}, one by the * of "
                        f"groups.{group_name}.sources; call the other one something else"
                    )
                _check_files(source)
                found[source.key] = source
    return list(found.values())


def _expanded(key: str, settings: Source, folder: Path) -> Iterator[tuple[str, Source]]:
    """The names and settings of the files that a source stands for."""
    name = key.rpartition("/")[2]
    if "*" not in settings.fasta:
        if name == "*":
            raise UserError(f"source {key}: its fasta has no *; call the source something else")
        yield name, settings
        return
    texts = _texts(key, settings, folder)
    if name != "*" and len(texts) > 1:
        raise UserError(
            f"source {key} is one file, and {settings.fasta} stands for {len(texts)}; make it more "
            "precise, or call the source * to have them all"
        )
    for text in texts:
        yield (text if name == "*" else name), _filled(settings, text, folder)


def _texts(key: str, settings: Source, folder: Path) -> list[str]:
    """What the * of fasta stands for, one text for each file that is wanted, in order."""
    pattern = folder / settings.fasta
    before, after = pattern.name.split("*")
    paths = pattern.parent.glob(pattern.name)
    texts = sorted(path.name[len(before) : len(path.name) - len(after)] for path in paths)
    for start in settings.only or [""]:
        if not any(text.startswith(start) for text in texts):
            what = f"{before}{start}*{after}"
            raise UserError(
                f"{pattern.parent} has no file {what} (source {key}); fetch it with gengram-data "
                "download, or correct fasta or only"
            )
    texts = [text for text in texts if text.startswith(tuple(settings.only or [""]))]
    for text in texts:
        if not re.fullmatch(r"[\w.+-]+", text, re.ASCII):
            raise UserError(
                f"{pattern.parent / f'{before}{text}{after}'} would be a source called {text!r}; "
                "rename it with letters, digits, and any of . _ + -"
            )
    return texts


def _filled(settings: Source, text: str, folder: Path) -> Source:
    """The settings of one file: `text` for every *, and nothing for an optional file that is not
    there."""
    optional = {"chromosomes"} | ({"annotation"} if settings.without_annotation else set())
    filled = {}
    for key in STARRED:
        pattern = getattr(settings, key) or ""
        path = pattern.replace("*", text)
        missing = "*" in pattern and key in optional and not (folder / path).exists()
        filled[key] = None if missing else path or None
    return settings.model_copy(update={**filled, "only": None})


def _complete(settings: Source, config: DataConfig) -> Source:
    """The settings with the data set's defaults, where they are regular ones."""
    defaults = {"without_annotation": settings.without_annotation or config.without_annotation}
    if not settings.has_validation_rule:
        defaults["validation_headers"] = config.validation_headers
    return settings.model_copy(update=defaults)


def _files(settings: Source, config: DataConfig, folder: Path) -> dict[str, Path]:
    """The files that the build reads for a source."""
    used = {
        "fasta": True,
        "annotation": config.gene_distance is not None,
        "chromosomes": settings.validation_headers is not None,
    }
    names = {key: getattr(settings, key) for key in STARRED if used[key]}
    return {key: folder / name for key, name in names.items() if name is not None}


def _check_files(source: Input) -> None:
    for path in source.files.values():
        if not path.is_file():
            raise UserError(f"{os.path.abspath(path)}: {_what_it_is(path)} (source {source.key})")
        if not os.access(path, os.R_OK):
            raise UserError(f"{path} may not be read by this user (source {source.key})")


def _what_it_is(path: Path) -> str:
    """Why a path that is no regular file cannot be read, as the end of a sentence."""
    if path.is_dir():
        return "it is a folder"
    kinds = {
        "a pipe, as <(...) makes them": path.is_fifo(),
        "a device": path.is_block_device() or path.is_char_device(),
        "a socket": path.is_socket(),
    }
    for kind, so in kinds.items():
        if so:
            return f"it is {kind}, and a build reads its sources more than once; store it in a file"
    return "there is no such file"
