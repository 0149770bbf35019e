"""A built data set, as a run finds it: its manifest, and what can be wrong with it.

That is, as far as its folder shows it: it is not there (where it was looked for, and what would
build it), or its sequences have another length. And whether its files are what was built, compared
with the manifest's checksums.

Reading all of a large data set takes minutes, so it is done once: a file that was found whole is
remembered with its size and the times of its last changes, and is read again only when one of these
differs. They are remembered beside the data, or, where that folder cannot be written to, in the
user's cache folder; where neither can be written, each run reads the files again.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from gengram_megatron.config.keys import dotted
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tree import read_tree
from gengram_megatron.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 2
"""Of the manifest, and of all that it lists."""
PLACES = (".", "configs", "configs/data")
"""Folders, from the current one, whose data configs are looked through."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a built data set; UserError if the folder is none, or of another format."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{path.parent.absolute()} is not a data set: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text())
        found = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; build the data set again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if found != FORMAT:
        raise UserError(
            f"{path} has format {found}; this version reads format {FORMAT}: build the data set "
            "again, with gengram-data build CONFIG --overwrite"
        )
    return manifest


def check_data_sets_exist(config: Config, config_file: Path) -> None:
    """Raise UserError with a line for each data set of a run whose folder is not there.

    It opens nothing, and so takes no time before the work of a run begins. config_file: whose
    folder is looked through for the data config too.
    """
    missing = [
        no_data_set(key, Path(folder), beside=config_file.parent)
        for key, folder in data_sets(config).items()
        if not Path(folder).is_dir()
    ]
    if missing:
        raise UserError("\n".join(missing))


def data_sets(config: Config) -> dict[str, str]:
    """The folders of a run's data sets, by the keys that name them."""
    if config.data.path is not None:
        return {"data.path": config.data.path}
    return {
        dotted(("data", "blend", number, "path")): part.path
        for number, part in enumerate(config.data.blend)
    }


def no_data_set(key: str, folder: Path, beside: Path | None = None) -> str:
    """A sentence: a data set is not there, which absolute path that is, and what would build it.

    Args:
        key: of the config that names the folder.
        beside: one more folder to look for data configs in.
    """
    where = os.path.abspath(folder)
    if not folder.is_absolute():
        where += f" ({folder} is relative to the current folder)"
    builds = _config_that_builds(folder, beside)
    command = f"gengram-data build {builds}" if builds else "gengram-data build"
    return f"{key}: there is no folder {where}; `{command}` makes it"


def other_seq_length(key: str, folder: Path, found: int, wanted: int) -> str:
    """A sentence: the fragments of a data set are not as long as the model's sequences."""
    return (
        f"{key}: the fragments in {folder} have {found} bases and model.seq_length is {wanted}; "
        f"set it to {found}, or build the data set with another seq_length"
    )


def _config_that_builds(folder: Path, beside: Path | None) -> Path | None:
    """The data config whose output a folder is, if there is one nearby."""
    for path in _nearby(beside):
        try:
            tree = read_tree(path).plain()
        except (UserError, OSError):
            continue
        output = tree.get("output") if "groups" in tree else None
        if isinstance(output, str) and os.path.abspath(output) == os.path.abspath(folder):
            return path
    return None


def _nearby(beside: Path | None) -> Iterator[Path]:
    folders = dict.fromkeys([*map(Path, PLACES), *([beside] if beside else [])])
    for folder in folders:
        yield from sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])


CHECKED = ".checked.json"
"""Lies beside a data set's files: which of them were compared with their checksums."""
BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class DataFile:
    """A file of a data set, and the checksum that the data set's manifest has of it."""

    path: Path
    sha256: str


def not_checked_yet(files: Iterable[DataFile]) -> list[DataFile]:
    """The files that were never compared with their checksums, or have changed since, or cannot be
    looked at."""
    return [file for file in files if not _is_known(file)]


def identity(file: DataFile) -> tuple[int, ...] | None:
    """What only the same file has, also where other nodes see it: a copy was changed at another
    nanosecond. None if the file cannot be looked at."""
    try:
        found = file.path.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_ctime_ns, found.st_mtime_ns, found.st_size)


def check(file: DataFile) -> Iterator[int]:
    """Read a file and compare it with its checksum; yields the bytes of each block that was read.

    Raises UserError if its content is not what was built.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    try:
        before = _fingerprint(file)
        with file.path.open("rb", buffering=0) as opened:
            while size := opened.readinto(buffer):
                digest.update(buffer[:size])
                yield size
    except OSError as error:
        raise UserError(
            f"{file.path} cannot be read: {error.strerror}; copy or build the data set again"
        ) from None
    if digest.hexdigest() != file.sha256:
        raise UserError(
            f"{file.path} is damaged: its checksum is not the one in the data set's manifest; "
            f"`gengram-data verify {file.path.parent}` lists what is wrong; copy or build the data "
            "set again"
        )
    if _fingerprint(file) == before:
        _remember(file, before)


def _is_known(file: DataFile) -> bool:
    with suppress(OSError):
        return _fingerprint(file) in _remembered(file)
    return False


def _fingerprint(file: DataFile) -> dict[str, int | str]:
    """What is remembered of a file. The time at which its content or attributes last changed is
    part of it, because a copy of a whole folder keeps the time of its content."""
    found = file.path.stat()
    return {
        "sha256": file.sha256,
        "bytes": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
    }


def _places(file: DataFile) -> Iterator[Path]:
    """Where it may be remembered that a file was checked, the best first."""
    folder = file.path.parent
    yield folder / CHECKED
    with suppress(RuntimeError):  # a user without a home
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
        yield cache / "gengram" / "checked_data" / f"{name}.json"


def _remembered(file: DataFile) -> list[dict]:
    """What each place has of a file."""
    return [known[file.path.name] for known in map(_read, _places(file)) if file.path.name in known]


def _read(place: Path) -> dict[str, dict]:
    try:
        known = json.loads(place.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(file: DataFile, fingerprint: dict[str, int | str]) -> None:
    """Note in the first place that can be written to that a file was found whole."""
    for place in _places(file):
        # Processes of several nodes may write at the same time: each beside, under its own name.
        beside = place.with_name(f"{place.name}.{uuid4().hex[:8]}")
        try:
            if place.parent != file.path.parent:
                place.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps({**_read(place), file.path.name: fingerprint}, indent=1))
            beside.replace(place)
            return
        except OSError:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
