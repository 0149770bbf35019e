"""The command `gengram-data verify`: all checks of a data set, in an order in which none trips over
what an earlier one found.
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
from data_prep.verify.samples import Ordered, check_places, check_source, source_paths
from data_prep.write import RECORDS, origins_path
from gengram_megatron.config.load import load_config
from gengram_megatron.errors import UserError


def problems(data: DataSet, sources: dict[str, Path], report: Report) -> Iterator[str]:
    """Everything that is wrong with a data set, a sentence each. `sources` are the FASTA files to
    compare it with, if any."""
    yield from check_counts(data)
    yield from check_files(data, report)
    for name, facts in data.facts.splits.items():
        path = data.folder / f"{name}.idx"
        if path.is_file():
            yield from check_index(path, facts.fragments, data.seq_length)
    places = [*_check_places(data)]
    yield from places
    if not sources:
        return
    if places or len(splits := _whole_splits(data)) < len(data.facts.splits):
        yield "the bases were not compared with the sources, because not all origins can be trusted"
        return
    ordered = {name: Ordered.of(data, data.split(name)) for name in splits}
    for key, path in sources.items():
        yield from check_source(data, key, path, ordered, report)


def _check_places(data: DataSet) -> Iterator[str]:
    """Problems of sequences and origins, as far as their files are whole."""
    if data.fault(RECORDS):
        return
    try:
        yield from check_sequences(data)
        yield from check_places(data, {name: data.split(name) for name in _whole_splits(data)})
    except UserError as error:
        yield str(error)


def _whole_splits(data: DataSet) -> list[str]:
    """The splits that can be looked into; of the others it was said why not."""
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
