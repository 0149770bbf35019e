"""The command `gengram-data download`: progress bars while it runs, and the list of a dry run."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from data_prep.download import run
from data_prep.download.fetch import RECORD
from data_prep.download.plan import Item
from data_prep.download.schema import DownloadConfig
from data_prep.download.web import Web
from gengram_megatron.config.command_line import ConfigFile, Overrides
from gengram_megatron.config.load import load_config


class Bars:
    """Shows a bar for all files, one for each file being fetched, and a line for each fetched file.

    Without a terminal, such as in a log file, only the lines are shown.
    """

    def __init__(self, console: Console, items: list[Item]):
        sizes = [item.size for item in items if not item.complete]
        known = [size for size in sizes if size is not None]
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._all = self._bars.add_task(
            "all", total=sum(known) if len(known) == len(sizes) else None
        )
        self._tasks: dict[str, TaskID] = {}
        self._received: dict[str, int] = {}  # bytes of each file

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def received(self, name: str, received: int, size: int | None) -> None:
        """Shows that `received` bytes of a file are on the disk.

        `size` is that of the whole file, if known.
        """
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name)
        self._bars.update(self._tasks[name], completed=received, total=size)
        self._bars.update(self._all, advance=received - self._received.get(name, 0))
        self._received[name] = received

    def stored(self, name: str, size: int) -> None:
        """Shows that a file is complete and has its final name."""
        self.received(name, size, size)
        self._bars.update(self._tasks[name], visible=False)
        self._console.print(f"{name}: {decimal(size)}", highlight=False, soft_wrap=True)


def listing(items: list[Item]) -> Table:
    """Returns a table of all files of a download list and their state."""
    table = Table("file", "size", "checksum", "state", "from")
    for item in items:
        size = "unknown" if item.size is None else decimal(item.size)
        missing = f"{decimal(item.partial)} present" if item.partial else "to fetch"
        state = "complete" if item.complete else missing
        kinds = ", ".join(item.file.checksums) or "none"
        table.add_row(item.file.name, size, kinds, state, item.file.url)
    return table


def totals(items: list[Item]) -> str:
    """Returns a sentence about how much is to be fetched."""
    missing = [item for item in items if not item.complete]
    size = sum(item.size - item.partial for item in missing if item.size)
    unknown = sum(item.size is None for item in missing)
    more = f" and {files(unknown)} of unknown size" if unknown else ""
    return f"{files(len(items))}, {len(missing)} of them to fetch: {decimal(size)}{more}"


def files(count: int) -> str:
    """Returns a number of files in words."""
    return f"{count} file" if count == 1 else f"{count} files"


def download(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FOLDER", help="the key output")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option("--parallel", metavar="N", help="the key parallel", min=1)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list files and sizes, and fetch nothing")
    ] = False,
) -> None:
    """Fetch genomes and their annotations, and verify them.

    Fetches assemblies of NCBI by accession (the genome as FASTA, and the annotation if there is
    one), files listed in tables of URLs such as HPRC's index of its assemblies, and single URLs.
    Run it again after an interruption: complete files are kept, and partial downloads are resumed.

    A download list in full:

    \b
        output: genomes              # relative to the current folder
        parallel: 4                  # files at a time
        retries: 5                   # more tries; pauses of 1, 2, 4, ... seconds (backoff: 1)
        timeout: 60                  # seconds without a byte that end a try
        ncbi:
          annotation: gff            # or gtf, or none
          assemblies:
            - GCA_047047975.1        # with the version
            - GCF_008728515.1
        indexes:
          hprc:
            table: hprc.index.csv    # CSV or TSV; path relative to this file, or URL
            url: assembly            # column of the files' URLs: http, https or s3
            md5: assembly_md5        # column of checksums, or of URLs of .md5 files
            rows:                    # only these; without it, all rows
              sample_id: [HG00408, HG00597]
        files:
          - url: https://example.org/chm13.fa.gz
            name: chm13v2.fa.gz      # without it, the last part of the URL
            md5: 0123456789abcdef0123456789abcdef       # or sha256, or neither

    A file gets its final name only when it is complete and its checksum is right; until then it is
    NAME.partial. URL, size and checksums of each file are in downloads.json beside the files. The
    environment variables https_proxy and no_proxy are used.
    """
    changes = [*(overrides or [])]
    changes += [f"output={json.dumps(out)}"] if out is not None else []  # a name may be 2024
    changes += [f"parallel={parallel}"] if parallel is not None else []
    settings = load_config(config, changes, DownloadConfig)
    web = Web(settings.retries, settings.backoff, settings.timeout)
    console = Console(stderr=True)
    with console.status("requesting sizes and checksums"):
        items = run.plan(settings, config.parent, web)
    if dry_run:
        Console().print(listing(items))
        print(totals(items))
        return
    with Bars(console, items) as bars:
        sizes = run.download(settings, items, web, bars)
    folder = Path(settings.output)
    print(
        f"fetched {files(len(sizes))} ({decimal(sum(sizes))}) into {folder}; "
        f"{len(items) - len(sizes)} of {len(items)} were there already; {folder / RECORD} lists all"
    )
