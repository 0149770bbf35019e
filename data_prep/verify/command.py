"""The command `gengram-data verify`."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal

from data_prep.inspect.command import Folder
from data_prep.inspect.opened import DataSet
from data_prep.progress import Display
from data_prep.schema import DataConfig
from data_prep.verify.run import problems
from data_prep.verify.sources import source_paths
from gengram_megatron.config.load import load_config


def verify(
    folder: Folder,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against-sources",
            metavar="CONFIG",
            help="compare every base with the FASTA files that this data config names",
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="problems to list")
    ] = 50,
) -> None:
    """Read all of a data set again, and compare it with its manifest.

    Checked are sizes and checksums of all files, every token, the index, the place and strand of
    each fragment, that no place is there twice, and all counts. With --against-sources each
    fragment is also compared with the bases that its FASTA file has at its coordinates, on its
    strand. Every problem is one sentence. The exit code is 0 if there is none, 1 if there are
    some, and 2 if the folder cannot be verified at all.
    """
    data = DataSet(folder)
    sources: dict[str, Path] = {}
    if against is not None:
        sources = source_paths(data, load_config(against, [], DataConfig), against.parent)
    size = sum(facts.bytes for facts in data.facts.files.values())
    bases = sum(facts.bases for facts in data.facts.sources.values()) if sources else 0
    start, found = time.perf_counter(), 0
    with Display(Console(stderr=True)) as display:
        for found, problem in enumerate(problems(data, sources, display.report), start=1):
            if found <= limit:
                print(problem, flush=True)
    seconds = time.perf_counter() - start
    if found:
        more = f", {found - limit:,} of them not listed" if found > limit else ""
        print(f"{folder} has {found:,} problem{'s' * (found > 1)}{more}")
        raise typer.Exit(1)
    compared = f", and {bases:,} bases of its sources" if sources else ""
    print(f"{folder} is as its manifest says: read {decimal(size)}{compared} in {seconds:.1f} s")
