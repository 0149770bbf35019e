"""The command `gengram-data verify`: runs all checks of a data set, in an order in which no check
fails because of a problem that an earlier one reports.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal

from data_prep.inspect.command import Folder
from data_prep.inspect.opened import DataSet
from data_prep.progress import Display, Report
from data_prep.schema import DataConfig
from data_prep.verify.files import check_counts, check_files, check_index, check_sequences
from data_prep.verify.samples import OrderedSplit, check_positions, check_source, source_paths
from data_prep.write import RECORDS, origins_path
from gengram_megatron.config.load import load_config
from gengram_megatron.errors import UserError


def problems(data: DataSet, sources: dict[str, Path], report: Report) -> Iterator[str]:
    """Yields a sentence for each problem of a data set.

    Args:
        data: the data set.
        sources: the FASTA files to compare it with, by source; may be empty.
        report: is told about progress.
    """
    yield from check_counts(data)
    yield from check_files(data, report)
    for name, facts in data.facts.splits.items():
        path = data.folder / f"{name}.idx"
        if path.is_file():
            yield from check_index(path, facts.fragments, data.seq_length)
    origin_problems = [*_check_origins(data)]
    yield from origin_problems
    if not sources:
        return
    if origin_problems or len(splits := _complete_splits(data)) < len(data.facts.splits):
        yield "the bases were not compared with the sources, because not all origins can be trusted"
        return
    ordered = {name: OrderedSplit.from_split(data, data.split(name)) for name in splits}
    for key, path in sources.items():
        yield from check_source(data, key, path, ordered, report)


def _check_origins(data: DataSet) -> Iterator[str]:
    """Yields problems of sequences and origins, as far as their files are complete."""
    if data.fault(RECORDS):
        return
    try:
        yield from check_sequences(data)
        splits = {name: data.split(name) for name in _complete_splits(data)}
        yield from check_positions(data, splits)
    except UserError as error:
        yield str(error)


def _complete_splits(data: DataSet) -> list[str]:
    """Returns the splits that can be read; the problems of the others are reported already."""
    if data.fault(RECORDS):
        return []  # without the names of the sequences no origin means anything
    return [
        name
        for name in data.facts.splits
        if not data.fault(f"{name}.bin") and not data.fault(origins_path(data.folder, name).name)
    ]


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
    """Read a whole data set again, and compare it with its manifest.

    Checks sizes and checksums of all files, every token, the index, the position and strand of each
    fragment, that no position occurs twice, and all counts. With --against-sources each fragment is
    also compared with the bases that its FASTA file has at its coordinates, on its strand. Every
    problem is one sentence. The exit code is 0 if there is none, 1 if there are some, and 2 if the
    folder cannot be verified at all.
    """
    data = DataSet(folder)
    sources: dict[str, Path] = {}
    if against is not None:
        sources = source_paths(data, load_config(against, [], DataConfig), against.parent)
    size = sum(facts.bytes for facts in data.facts.files.values())
    bases = sum(facts.bases for facts in data.facts.sources.values()) if sources else 0
    start, count = time.perf_counter(), 0
    with Display(Console(stderr=True)) as display:
        for count, problem in enumerate(problems(data, sources, display.report), start=1):
            if count <= limit:
                print(problem, flush=True)
    seconds = time.perf_counter() - start
    if count:
        more = f", {count - limit:,} of them not listed" if count > limit else ""
        print(f"{folder} has {count:,} problem{'s' * (count > 1)}{more}")
        raise typer.Exit(1)
    compared = f", and {bases:,} bases of its sources" if sources else ""
    print(f"{folder} is as its manifest says: read {decimal(size)}{compared} in {seconds:.1f} s")
