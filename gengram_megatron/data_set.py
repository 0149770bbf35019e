"""Reads the manifest of a built data set, and checks the data set before a run uses it.

Messages say if its folder is missing (where it was expected, and which command builds it), or if
its sequences have a different length. Files are compared with the manifest's checksums.

Reading all of a large data set takes minutes, so it is done once: an intact file is recorded with
its size and the times of its last changes, and is read again only if one of these differs. The
records are stored beside the data or, if that folder is not writable, in the user's cache folder;
if neither is writable, each run reads the files again.
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
"""Format version of the manifest and of all files that it lists."""
CONFIG_FOLDERS = (".", "configs", "configs/data")
"""Folders, relative to the current one, that are searched for data configs."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a built data set. Raises UserError if the folder is not a data set,
    or is one of another format."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{path.parent.absolute()} is not a data set: it has no {MANIFEST}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        format = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; build the data set again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if format != FORMAT:
        raise UserError(
            f"{path} has format {format}; this version reads format {FORMAT}: build the data set "
            "again, with gengram-data build CONFIG --overwrite"
        )
    return manifest


def check_data_sets_exist(config: Config, config_file: Path) -> None:
    """Raises UserError with a line for each data set of a run whose folder does not exist.

    It opens no data file, and so takes no time before a run starts.

    Args:
        config_file: its folder is also searched for data configs.
    """
    missing = [
        no_data_set(key, Path(folder), beside=config_file.parent)
        for key, folder in data_sets(config).items()
        if not Path(folder).is_dir()
    ]
    if missing:
        raise UserError("\n".join(missing))


def data_sets(config: Config) -> dict[str, str]:
    """Returns the folders of a run's data sets, by the keys that name them."""
    if config.data.path is not None:
        return {"data.path": config.data.path}
    return {
        dotted(("data", "blend", number, "path")): part.path
        for number, part in enumerate(config.data.blend or [])
    }


def no_data_set(key: str, folder: Path, beside: Path | None = None) -> str:
    """Returns a message that a data set does not exist, with its absolute path and the command that
    builds it.

    Args:
        key: the config key that names the folder.
        beside: one more folder to search for data configs.
    """
    where = os.path.abspath(folder)
    if not folder.is_absolute():
        where += f" ({folder} is relative to the current folder)"
    data_config = _config_that_builds(folder, beside)
    command = f"gengram-data build {data_config}" if data_config else "gengram-data build"
    return f"{key}: there is no folder {where}; `{command}` makes it"


def other_seq_length(key: str, folder: Path, found: int, wanted: int) -> str:
    """Returns a message that the fragments of a data set (`found` bases) are not as long as the
    model's sequences (`wanted` bases)."""
    return (
        f"{key}: the fragments in {folder} have {found} bases and model.seq_length is {wanted}; "
        f"set model.seq_length to {found}, or build the data set with another seq_length"
    )


def _config_that_builds(folder: Path, beside: Path | None) -> Path | None:
    """Returns the data config whose output is this folder; None if none is found."""
    for path in _data_configs(beside):
        try:
            tree = read_tree(path).plain()
        except (UserError, OSError):
            continue
        output = tree.get("output") if "groups" in tree else None
        if isinstance(output, str) and os.path.abspath(output) == os.path.abspath(folder):
            return path
    return None


def _data_configs(beside: Path | None) -> Iterator[Path]:
    """Yields the YAML files that may be data configs."""
    folders = dict.fromkeys([*map(Path, CONFIG_FOLDERS), *([beside] if beside else [])])
    for folder in folders:
        yield from sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])


CHECKED = ".checked.json"
"""The file beside a data set's files that records which of them match their checksums."""
BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class DataFile:
    """A file of a data set, and its checksum in the data set's manifest."""

    path: Path
    sha256: str


def not_checked_yet(files: Iterable[DataFile]) -> list[DataFile]:
    """Returns the files that were never compared with their checksums, have changed since, or
    cannot be accessed."""
    return [file for file in files if not _is_recorded(file)]


def identity(file: DataFile) -> tuple[int, ...] | None:
    """Returns numbers by which nodes can tell whether they see the same file: a copy has other
    change times, in nanoseconds. Returns None if the file cannot be accessed."""
    try:
        status = file.path.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size)


def check(file: DataFile) -> Iterator[int]:
    """Reads a file and compares it with its checksum. Yields the number of bytes of each block.

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
        _record(file, before)


def _is_recorded(file: DataFile) -> bool:
    with suppress(OSError):
        return _fingerprint(file) in _recorded_fingerprints(file)
    return False


def _fingerprint(file: DataFile) -> dict[str, int | str]:
    """Returns what is recorded about a file. This includes ctime, because copying a whole folder
    can preserve mtime."""
    status = file.path.stat()
    return {
        "sha256": file.sha256,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _record_files(file: DataFile) -> Iterator[Path]:
    """Yields the files that may record that a data file was checked, the preferred one first."""
    folder = file.path.parent
    yield folder / CHECKED
    with suppress(RuntimeError):  # the user has no home folder
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
        yield cache / "gengram" / "checked_data" / f"{name}.json"


def _recorded_fingerprints(file: DataFile) -> list[dict[str, int | str]]:
    """Returns the fingerprints of a file in all record files."""
    records = map(_read, _record_files(file))
    return [record[file.path.name] for record in records if file.path.name in record]


def _read(record_file: Path) -> dict[str, dict[str, int | str]]:
    try:
        record = json.loads(record_file.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _record(file: DataFile, fingerprint: dict[str, int | str]) -> None:
    """Records in the first writable record file that a data file is intact."""
    for path in _record_files(file):
        # Processes of several nodes may write at the same time, so each writes its own temporary
        # file.
        beside = path.with_name(f"{path.name}.{uuid4().hex[:8]}")
        try:
            if path.parent != file.path.parent:
                path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps({**_read(path), file.path.name: fingerprint}, indent=1))
            beside.replace(path)
            return
        except OSError:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
