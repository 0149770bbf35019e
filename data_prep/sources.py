"""The FASTA files of a data set, including those that a pattern stands for."""

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
    files: dict[
        str, Path
    ]  # every file that is read for the source, by the config key that names it

    @property
    def key(self) -> str:
        """The source's name in the whole data set: group/name."""
        return f"{self.group}/{self.name}"

    @property
    def path(self) -> Path:
        """The path of the FASTA file."""
        return self.files["fasta"]

    def stamps(self) -> dict[str, list[int]]:
        """Returns size and modification time of each file: while these stay the same, the files are
        taken to be unchanged."""
        try:
            facts = {key: os.stat(path) for key, path in self.files.items()}
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
        return {key: [fact.st_size, fact.st_mtime_ns] for key, fact in facts.items()}


def inputs(config: DataConfig, folder: Path) -> list[Input]:
    """Returns all sources of a config file that lies in `folder`, in the order of the config.

    Raises UserError if a file is missing.
    """
    sources: dict[str, Input] = {}
    for group_name, group in config.groups.items():
        for name, settings in group.sources.items():
            complete = _complete(settings, config)
            for file_name, filled in _expanded(f"{group_name}/{name}", complete, folder):
                source = Input(group_name, file_name, filled, _files(filled, config, folder))
                if source.key in sources:
                    raise UserError(
                        f"two sources are called {source.key}, one by the * of "
                        f"groups.{group_name}.sources; give the other one another name"
                    )
                _check_files(source)
                sources[source.key] = source
    return list(sources.values())


def _expanded(key: str, settings: Source, folder: Path) -> Iterator[tuple[str, Source]]:
    """Yields the name and settings of each file that a source stands for."""
    name = key.rpartition("/")[2]
    if "*" not in settings.fasta:
        if name == "*":
            raise UserError(f"source {key}: its fasta has no *; give the source another name")
        yield name, settings
        return
    texts = _texts(key, settings, folder)
    if name != "*" and len(texts) > 1:
        raise UserError(
            f"source {key} is one file, but {settings.fasta} matches {len(texts)}; make it more "
            "precise, or call the source * to use them all"
        )
    for text in texts:
        yield (text if name == "*" else name), _filled(settings, text, folder)


def _texts(key: str, settings: Source, folder: Path) -> list[str]:
    """Returns the text that the * of fasta stands for in each selected file, sorted.

    Raises UserError if no file matches, or a text cannot be the name of a source.
    """
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
                "rename the file: the part for the * may have letters, digits, and . _ + -"
            )
    return texts


def _filled(settings: Source, text: str, folder: Path) -> Source:
    """Returns the settings of one file, with `text` in place of every *, and None for an optional
    file that does not exist."""
    optional = {"chromosomes"} | ({"annotation"} if settings.without_annotation else set())
    filled = {}
    for key in STARRED:
        pattern = getattr(settings, key) or ""
        path = pattern.replace("*", text)
        missing = "*" in pattern and key in optional and not (folder / path).exists()
        filled[key] = None if missing else path or None
    return settings.model_copy(update={**filled, "only": None})


def _complete(settings: Source, config: DataConfig) -> Source:
    """Returns the settings of a source, completed with the data set's defaults."""
    without: str | None = settings.without_annotation or config.without_annotation
    defaults = {"without_annotation": without}
    if not settings.has_validation_rule:
        defaults["validation_headers"] = config.validation_headers
    return settings.model_copy(update=defaults)


def _files(settings: Source, config: DataConfig, folder: Path) -> dict[str, Path]:
    """Returns the files that the build reads for a source, by the config key that names them."""
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
            raise UserError(
                f"{os.path.abspath(path)}: {_why_unreadable(path)} (source {source.key})"
            )
        if not os.access(path, os.R_OK):
            raise UserError(f"{path} may not be read by this user (source {source.key})")


def _why_unreadable(path: Path) -> str:
    """Returns why a path that is not a regular file cannot be read, as the end of a sentence."""
    if path.is_dir():
        return "it is a folder"
    kinds = {
        "a pipe, like those of <(...)": path.is_fifo(),
        "a device": path.is_block_device() or path.is_char_device(),
        "a socket": path.is_socket(),
    }
    for kind, is_kind in kinds.items():
        if is_kind:
            return f"it is {kind}, but a build reads its sources more than once; store it in a file"
    return "there is no such file"
