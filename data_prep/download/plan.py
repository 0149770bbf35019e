"""From a download list to the files that are to be fetched, before anything is fetched.

A list names single files, tables of addresses such as HPRC's index of its assemblies, and
accessions of NCBI, whose assemblies lie in one tree, https://ftp.ncbi.nlm.nih.gov/genomes/all:
GCA_047047975.1 is in GCA/047/047/975/, in a folder named for accession and assembly, whose
md5checksums.txt lists the files it holds.
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
    Wanted,
    checksums,
    name_in,
    web_address,
)
from data_prep.download.schema import DownloadConfig, File, Index, Ncbi
from data_prep.download.web import Web
from data_prep.workers import as_finished, interrupts_held_back
from gengram_megatron.errors import UserError

MD5 = re.compile(r"\b[0-9a-fA-F]{32}\b")


def index_rows(name: str, index: Index, folder: Path, web: Web) -> Iterator[Callable[[], Wanted]]:
    """For each row of the table that is wanted, a call that finds out its file; it may have to
    ask the server for the checksum."""
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
            yield partial(_file, f"indexes.{name}, line {table.line_num}", row, index, web)
    for column, value in sorted(missing):
        raise UserError(f"indexes.{name}.rows: no row is taken whose {column} is {value!r}")


def _read(name: str, index: Index, folder: Path, web: Web) -> str:
    if "://" in index.table:
        return web.text(web_address(index.table))
    path = folder / index.table
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"indexes.{name}.table: {path} cannot be read: {reason}") from error


def _file(place: str, row: dict[str, str], index: Index, web: Web) -> Wanted:
    url = web_address(row[index.url] or "")
    if not re.match(r"https?://[^/]+/.*[^/]$", url):
        raise UserError(
            f"{place}: {index.url} is {row[index.url]!r} and no URL of a file; "
            f"leave such rows out with indexes.*.rows"
        )
    checksums = {}
    if index.md5 and row[index.md5]:
        checksums["md5"] = _md5(place, row[index.md5], web)
    return Wanted(name_in(url), url, checksums)


def _md5(place: str, cell: str, web: Web) -> str:
    """The MD5 that a cell holds, or that the file holds whose address it is."""
    text = web.text(web_address(cell)) if "://" in cell else cell
    match = MD5.search(text)
    if not match:
        raise UserError(f"{place}: {cell} is no MD5, nor the address of one; set md5: null")
    return match[0].lower()


def assembly_files(accession: str, settings: Ncbi, web: Web) -> list[Wanted]:
    """The genome of an assembly, and its annotation if it is wanted and there is one."""
    folder_url = _folder(accession, settings.base, web)
    folder = folder_url.rsplit("/", 1)[1]
    checksums = _checksums(web.text(f"{folder_url}/md5checksums.txt"))
    # Whole names, because *_genomic.fna.gz would also match cds_from_genomic and rna_from_genomic.
    genome = f"{folder}_genomic.fna.gz"
    if genome not in checksums:
        raise UserError(
            f"{accession} has no genome at {folder_url}, perhaps because it was withdrawn; "
            "take another version of it or leave it out of ncbi.assemblies"
        )
    annotation = f"{folder}_genomic.{settings.annotation}.gz"
    return [
        Wanted(name, f"{folder_url}/{name}", {"md5": checksums[name]})
        for name in (genome, annotation)
        if name in checksums
    ]


def _folder(accession: str, base: str, web: Web) -> str:
    kind, digits = accession[:3], accession[4:13]
    parent = "/".join((base.rstrip("/"), kind, digits[:3], digits[3:6], digits[6:]))
    links = _Links()
    links.feed(web.text(f"{parent}/"))
    folders = [name_in(link) for link in links.found if link.endswith("/")]
    for folder in folders:
        if folder.startswith(f"{accession}_"):
            return f"{parent}/{folder}"
    versions = sorted({name for name in map(_accession, folders) if name})
    there = f"there is {' and '.join(versions)}" if versions else "nor is another version of it"
    raise UserError(f"{accession} is not in {parent}/, {there}; correct ncbi.assemblies")


def _accession(folder: str) -> str | None:
    match = re.match(r"GC[AF]_\d{9}\.\d+(?=_)", folder)
    return match[0] if match else None


def _checksums(text: str) -> dict[str, str]:
    """md5checksums.txt as file name to MD5; its lines are `<md5>  ./<name>`."""
    pairs = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return {pair[1].strip().removeprefix("./"): pair[0].lower() for pair in pairs if len(pair) == 2}


class _Links(HTMLParser):
    """The links of a page that lists a folder."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


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
