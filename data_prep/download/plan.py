"""From a download list to the files that are to be fetched, before anything is fetched."""

import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from rich.filesize import decimal

from data_prep.download.fetch import checksums
from data_prep.download.index import index_rows
from data_prep.download.ncbi import assembly_files
from data_prep.download.partial import Partial
from data_prep.download.record import RECORD, Record
from data_prep.download.schema import DownloadConfig, File
from data_prep.download.wanted import Wanted, name_in, web_address
from data_prep.download.web import Web
from data_prep.interrupts import as_finished, interrupts_held_back
from gengram_megatron.errors import UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Item:
    """A wanted file and how it stands."""

    wanted: Wanted
    here: bool
    """Whole and verified, so not to be fetched."""
    size: int | None
    """Bytes of the whole file, if known."""
    partial: int = 0
    """Bytes of it that an interrupted download has left."""
    adopted: dict[str, str] = field(default_factory=dict)
    """Checksums, now that they are known, of a file that is here and was put there by hand."""


def wanted_files(config: DownloadConfig, config_folder: Path, web: Web) -> list[Wanted]:
    """All files of a download list, each once; UserError if two would have the same name."""
    calls: list[Callable[[], list[Wanted]]] = []
    for accession in config.ncbi.assemblies if config.ncbi else []:
        calls.append(partial(assembly_files, accession, config.ncbi, web))
    for name, index in config.indexes.items():
        rows = index_rows(name, index, config_folder, web)
        calls += [lambda row=row: [row()] for row in rows]
    found = [file for files in at_once(calls, config.parallel) for file in files]
    return _without_clashes([*found, *map(_plain, config.files)])


def standing(
    files: list[Wanted], folder: Path, record: Record, web: Web, parallel: int
) -> list[Item]:
    """How each file stands: here or not, and how large it is."""
    return at_once([partial(_item, wanted, folder, record, web) for wanted in files], parallel)


def check_space(items: list[Item], folder: Path) -> None:
    """UserError if the disk has no room for what is known to come."""
    needed = sum(item.size - item.partial for item in items if item.size and not item.here)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{folder} has {decimal(free)} of free space and {decimal(needed)} are to come; "
            "make room, or give another folder with --out"
        )


def at_once(calls: list[Callable[[], Result]], parallel: int) -> list[Result]:
    """The results of several calls, in order; all their UserErrors as one."""
    results, problems = [], {}
    pool = ThreadPoolExecutor(parallel)
    try:
        with interrupts_held_back():
            futures = [pool.submit(call) for call in calls]
        list(as_finished(futures))
    finally:  # after Ctrl-C, what has not begun need not begin
        with interrupts_held_back():
            pool.shutdown(cancel_futures=True)
    for future in futures:
        try:
            results.append(future.result())
        except UserError as error:
            problems[str(error)] = True
    if problems:
        raise UserError("\n".join(problems))
    return results


def _plain(file: File) -> Wanted:
    given = {"md5": file.md5, "sha256": file.sha256}
    known = {kind: value.lower() for kind, value in given.items() if value}
    return Wanted(file.name or name_in(file.url), web_address(file.url), known)


def _without_clashes(files: Iterable[Wanted]) -> list[Wanted]:
    by_name: dict[str, Wanted] = {}
    for file in files:
        if not file.name or "/" in file.name or file.name.startswith((".", RECORD)):
            raise UserError(f"{file.url} cannot be stored as {file.name!r}; give it another name")
        other = by_name.setdefault(file.name, file)
        if other.url != file.url:
            raise UserError(
                f"{other.url} and {file.url} would both be stored as {file.name}; take one out, "
                "or list it under files with another name"
            )
    return list(by_name.values())


def _item(wanted: Wanted, folder: Path, record: Record, web: Web) -> Item:
    path, part = folder / wanted.name, Partial(folder, wanted.name, wanted.url)
    known = record.get(wanted.name)
    if path.exists() and known is None:
        return Item(wanted, True, path.stat().st_size, adopted=_adopted(wanted, path))
    if path.exists() and _is_recorded(wanted, path, known) and not part.path.exists():
        return Item(wanted, True, path.stat().st_size)
    return Item(wanted, False, web.size(wanted.url), part.size)


def _is_recorded(wanted: Wanted, path: Path, known: dict[str, Any]) -> bool:
    """Whether a file that was downloaded is the wanted one; if not, it may be replaced, unless it
    is of another URL."""
    same = all(known.get(kind) == value for kind, value in wanted.checksums.items())
    if known["url"] != wanted.url and not (wanted.checksums and same):
        raise UserError(
            f"{path} was downloaded from {known['url']} and not from {wanted.url}; "
            "move it away or give the new file another name"
        )
    return same and path.stat().st_size == known["bytes"]


def _adopted(wanted: Wanted, path: Path) -> dict[str, str]:
    """The checksums of a file that someone else put there, if they say that it is the one."""
    known = wanted.checksums and path.is_file()
    found = checksums(path, {"sha256", *wanted.checksums}, Event()) if known else {}
    if not found or not wanted.checksums.items() <= found.items():
        raise UserError(
            f"{path} exists and was not downloaded from {wanted.url}; "
            "move it away or give the new file another name"
        )
    return found
