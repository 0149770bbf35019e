"""Turns a download list into the files that have to be fetched, before anything is fetched.

A list names single files, tables of URLs such as HPRC's index of its assemblies, and accessions of
NCBI, whose assemblies lie in one tree, https://ftp.ncbi.nlm.nih.gov/genomes/all: GCA_047047975.1 is
in GCA/047/047/975/, in a folder named after accession and assembly, whose md5checksums.txt lists
the files that it holds.
"""

import csv
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from rich.filesize import decimal

from data_prep.download.fetch import (
    RECORD,
    Partial,
    Record,
    RemoteFile,
    checksums,
    name_in,
    web_address,
)
from data_prep.download.schema import DownloadConfig, File, Index, Ncbi
from data_prep.download.web import Web
from data_prep.workers import as_finished, interrupts_held_back
from gengram_megatron.errors import UserError

MD5 = re.compile(r"\b[0-9a-fA-F]{32}\b")


def index_rows(
    name: str, index: Index, folder: Path, web: Web
) -> Iterator[Callable[[], list[RemoteFile]]]:
    """Yields for each selected row of a table a function that returns the row's one file; the
    function may have to request the checksum from the server."""
    text = _read(name, index, folder, web)
    first_line = text.partition("\n")[0]
    table = csv.DictReader(text.splitlines(), delimiter="\t" if "\t" in first_line else ",")
    columns = table.fieldnames or []
    for column in filter(None, (index.url, index.md5, *index.rows)):
        if column not in columns:
            raise UserError(
                f"indexes.{name}: {index.table} has no column {column!r}; "
                f"its columns are {', '.join(columns)}"
            )
    missing = {(column, value) for column, values in index.rows.items() for value in values}
    for row in table:
        if all(row[column] in values for column, values in index.rows.items()):
            missing -= {(column, row[column]) for column in index.rows}
            yield partial(_row_files, f"indexes.{name}, line {table.line_num}", row, index, web)
    for column, value in sorted(missing):
        raise UserError(f"indexes.{name}.rows: no selected row has {value!r} as its {column}")


def _read(name: str, index: Index, folder: Path, web: Web) -> str:
    if "://" in index.table:
        return web.text(web_address(index.table))
    path = folder / index.table
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"indexes.{name}.table: {path} cannot be read: {reason}") from error


def _row_files(location: str, row: dict[str, str], index: Index, web: Web) -> list[RemoteFile]:
    url = web_address(row[index.url] or "")
    if not re.match(r"https?://[^/]+/.*[^/]$", url):
        raise UserError(
            f"{location}: {index.url} is {row[index.url]!r}, which is not the URL of a file; "
            f"leave such rows out with indexes.*.rows"
        )
    checksums = {}
    if index.md5 and row[index.md5]:
        checksums["md5"] = _md5(location, row[index.md5], web)
    return [RemoteFile(name_in(url), url, checksums)]


def _md5(location: str, cell: str, web: Web) -> str:
    """Returns the MD5 in a cell, or in the file whose URL is in the cell."""
    text = web.text(web_address(cell)) if "://" in cell else cell
    match = MD5.search(text)
    if not match:
        raise UserError(
            f"{location}: {cell} is not an MD5 and not the URL of a file with one; set md5: null"
        )
    return match[0].lower()


def assembly_files(accession: str, settings: Ncbi, web: Web) -> list[RemoteFile]:
    """Returns the genome of an assembly, and its annotation if one is requested and exists."""
    folder_url = _folder(accession, settings.base, web)
    folder = folder_url.rsplit("/", 1)[1]
    checksums = _checksums(web.text(f"{folder_url}/md5checksums.txt"))
    # Whole names, because *_genomic.fna.gz would also match cds_from_genomic and rna_from_genomic.
    genome = f"{folder}_genomic.fna.gz"
    if genome not in checksums:
        raise UserError(
            f"{accession} has no genome at {folder_url}, perhaps because it was withdrawn; "
            "use another version of it or leave it out of ncbi.assemblies"
        )
    annotation = f"{folder}_genomic.{settings.annotation}.gz"
    return [
        RemoteFile(name, f"{folder_url}/{name}", {"md5": checksums[name]})
        for name in (genome, annotation)
        if name in checksums
    ]


def _folder(accession: str, base: str, web: Web) -> str:
    kind, digits = accession[:3], accession[4:13]
    parent = "/".join((base.rstrip("/"), kind, digits[:3], digits[3:6], digits[6:]))
    links = _Links()
    links.feed(web.text(f"{parent}/"))
    folders = [name_in(link) for link in links.targets if link.endswith("/")]
    for folder in folders:
        if folder.startswith(f"{accession}_"):
            return f"{parent}/{folder}"
    versions = sorted({name for name in map(_accession, folders) if name})
    verb = "is" if len(versions) == 1 else "are"
    available = f"but {' and '.join(versions)} {verb}" if versions else "nor is another version"
    raise UserError(f"{accession} is not in {parent}/, {available}; correct ncbi.assemblies")


def _accession(folder: str) -> str | None:
    match = re.match(r"GC[AF]_\d{9}\.\d+(?=_)", folder)
    return match[0] if match else None


def _checksums(text: str) -> dict[str, str]:
    """Returns the MD5 by file name from md5checksums.txt, whose lines are `<md5>  ./<name>`."""
    pairs = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return {pair[1].strip().removeprefix("./"): pair[0].lower() for pair in pairs if len(pair) == 2}


class _Links(HTMLParser):
    """Collects the targets of the links on a page that lists a folder."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.targets += [value for name, value in attrs if name == "href" and value]


Result = TypeVar("Result")


@dataclass(frozen=True)
class Item:
    """A file of a download list and its state."""

    file: RemoteFile
    complete: bool
    """Whether the file is complete and verified, so that it need not be fetched."""
    size: int | None
    """Bytes of the whole file; None if not known."""
    partial: int = 0
    """Bytes that an interrupted download has received."""
    adopted: dict[str, str] = field(default_factory=dict)
    """The checksums of a complete file that is not in downloads.json because the user put it into
    the folder; empty for all other files."""


def remote_files(config: DownloadConfig, config_folder: Path, web: Web) -> list[RemoteFile]:
    """Returns all files of a download list, each once.

    Raises UserError if two of them would be stored under the same name.
    """
    calls: list[Callable[[], list[RemoteFile]]] = []
    if ncbi := config.ncbi:
        calls += [partial(assembly_files, accession, ncbi, web) for accession in ncbi.assemblies]
    for name, index in config.indexes.items():
        calls += index_rows(name, index, config_folder, web)
    listed = [file for files in run_parallel(calls, config.parallel) for file in files]
    return _without_clashes([*listed, *map(_from_config, config.files)])


def check_state(
    files: list[RemoteFile], folder: Path, record: Record, web: Web, parallel: int
) -> list[Item]:
    """Returns the state of each file: whether it is complete, and how large it is."""
    return run_parallel([partial(_item, file, folder, record, web) for file in files], parallel)


def check_space(items: list[Item], folder: Path) -> None:
    """Raises UserError if the disk has no room for the files whose size is known."""
    needed = sum(item.size - item.partial for item in items if item.size and not item.complete)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{folder} has {decimal(free)} of free space, but {decimal(needed)} are to be fetched; "
            "make room, or give another folder with --out"
        )


def run_parallel(calls: list[Callable[[], Result]], parallel: int) -> list[Result]:
    """Runs several functions, `parallel` at a time, and returns their results in order.

    Raises all their UserErrors as one.
    """
    results, problems = [], {}
    pool = ThreadPoolExecutor(parallel)
    try:
        with interrupts_held_back():
            futures = [pool.submit(call) for call in calls]
        list(as_finished(futures))
    finally:  # after Ctrl-C, drop the calls that have not started
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


def _from_config(file: File) -> RemoteFile:
    given = {"md5": file.md5, "sha256": file.sha256}
    known = {kind: value.lower() for kind, value in given.items() if value}
    return RemoteFile(file.name or name_in(file.url), web_address(file.url), known)


def _without_clashes(files: Iterable[RemoteFile]) -> list[RemoteFile]:
    by_name: dict[str, RemoteFile] = {}
    for file in files:
        if not file.name or "/" in file.name or file.name.startswith((".", RECORD)):
            raise UserError(f"{file.url} cannot be stored as {file.name!r}; give it another name")
        other = by_name.setdefault(file.name, file)
        if other.url != file.url:
            raise UserError(
                f"{other.url} and {file.url} would both be stored as {file.name}; remove one of "
                "them, or list it under files with another name"
            )
    return list(by_name.values())


def _item(file: RemoteFile, folder: Path, record: Record, web: Web) -> Item:
    path, part = folder / file.name, Partial(folder, file.name, file.url)
    recorded = record.get(file.name)
    if path.exists():
        if recorded is None:
            return Item(file, True, path.stat().st_size, adopted=_adopted(file, path))
        if _is_recorded(file, path, recorded) and not part.path.exists():
            return Item(file, True, path.stat().st_size)
    return Item(file, False, web.size(file.url), part.size)


def _is_recorded(file: RemoteFile, path: Path, recorded: dict[str, Any]) -> bool:
    """Returns whether the file on the disk is the one to fetch; if not, it may be replaced.

    Raises UserError if it is from another URL and checksums do not show that it is the same.
    """
    same = all(recorded.get(kind) == value for kind, value in file.checksums.items())
    if recorded["url"] != file.url and not (file.checksums and same):
        raise UserError(
            f"{path} was downloaded from {recorded['url']} and not from {file.url}; "
            "move it away or give the new file another name"
        )
    return same and path.stat().st_size == recorded["bytes"]


def _adopted(file: RemoteFile, path: Path) -> dict[str, str]:
    """Returns the checksums of a file that is not in the record.

    Raises UserError unless known checksums show that it is the file to fetch.
    """
    verifiable = file.checksums and path.is_file()
    computed = checksums(path, {"sha256", *file.checksums}, Event()) if verifiable else {}
    if not computed or not file.checksums.items() <= computed.items():
        raise UserError(
            f"{path} exists and was not downloaded from {file.url}; "
            "move it away or give the new file another name"
        )
    return computed
