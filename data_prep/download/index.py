"""From a table of addresses, such as HPRC's index of its assemblies, to files."""

import csv
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from data_prep.download.schema import Index
from data_prep.download.wanted import Wanted, name_in, web_address
from data_prep.download.web import Web
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
