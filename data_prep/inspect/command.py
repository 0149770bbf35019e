"""The command `gengram-data inspect`: shows what a data set holds, as tables for a terminal."""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from data_prep.inspect.contents import contents, describe, fragments_to_count, locate
from data_prep.inspect.opened import DataSet
from data_prep.manifest import add_fates
from data_prep.progress import Display, Phase
from gengram_megatron.errors import UserError
from gengram_megatron.show import print_table
from gengram_megatron.tokenizer import BASES

Description = dict[str, Any]
"""What `data_prep.inspect.contents.describe` returns, or a part of it."""


def tables(description: Description) -> Iterator[Table]:
    """Yields tables of the splits, the groups and sources, the fates of the fragments, and the
    sequences if they are in the description."""
    yield _splits(description)
    yield _sources(description)
    yield _fates(description)
    if "sequences" in description:
        yield _sequences(description)


def sample_table(location: dict[str, Any]) -> Table:
    """Returns a table of where one sample comes from; `location` is what `locate` returns."""
    table = Table(
        title=f"Sample {location['sample']:,} of split {location['split']}", show_header=False
    )
    bases, start, end = location["sequence_bases"], location["start"], location["end"]
    strand = {"+": "+ (forward)", "-": "- (stored as the reverse complement)"}
    for name, text in {
        "source": f"{location['source']} ({location['fasta']})",
        "sequence": f"{location['sequence']}, {bases:,} bases",
        "coordinates": f"{start} to {end} (from 0, half-open, forward strand)",
        "region": f"{location['region']} (from 1, both ends included)",
        "strand": strand[location["strand"]],
        "first bases": location["first_bases"],
        "last bases": location["last_bases"],
    }.items():
        table.add_row(name, text)
    return table


def _splits(description: Description) -> Table:
    bases = f"{description['seq_length']:,} bases"
    title = f"{description['folder']}: fragments of {bases} and an end-of-document"
    percents = ["reverse %", *(f"{base} %" for base in BASES), "GC %"]
    table = _table(title, "split", ["fragments", "tokens", *percents])
    for name, split in description["splits"].items():
        composition = [_percent(split["composition"][base]) for base in BASES]
        cells = [f"{split['fragments']:,}", f"{split['tokens']:,}", _reverse(split), *composition]
        table.add_row(name, *cells, _percent(split["gc"]))
    sampled = [f"{split['looked_at']:,} of {name}" for name, split in description["splits"].items()]
    table.caption = (
        f"Bases were counted in fragments evenly spread over each split: {', '.join(sampled)}. "
        "reverse: share of fragments on the reverse strand; GC: share of what is not N."
    )
    return table


def _sources(description: Description) -> Table:
    """Returns a table with a row for each split of each source and group."""
    table = Table(title="Where the fragments come from")
    for heading in ("source or group", "split"):
        table.add_column(heading, no_wrap=True)
    for heading in ("fragments", "share %", "reverse %", "N %", "GC %"):
        table.add_column(heading, justify="right")
    for group, of_group in description["groups"].items():
        sources = {
            key: source
            for key, source in description["sources"].items()
            if key.startswith(f"{group}/")
        }
        for key, row in {**sources, group: of_group}.items():
            for name, split in description["splits"].items():
                total, counts = split["fragments"], row[name]
                share = counts["fragments"] / total if total else None
                cells = [f"{counts['fragments']:,}", _percent(share), _reverse(counts)]
                cells += [_percent(counts["composition"]["N"]), _percent(counts["gc"])]
                table.add_row(key, name, *cells, style="bold" if key == group else None)
        table.add_section()
    table.caption = "share: of the split's fragments."
    return table


def _fates(description: Description) -> Table:
    headings = ["sequences", "bases", "genes"]
    table = _table("What became of each source's fragments", "source", headings)
    sources = description["sources"]
    fates = add_fates(table, [source["fates"] for source in sources.values()])
    for (key, source), counts in zip(sources.items(), fates):
        table.add_row(
            key, f"{source['records']:,}", f"{source['bases']:,}", _genes(source), *counts
        )
    return table


def _sequences(description: Description) -> Table:
    table = _table("Fragments by sequence", "source", ["sequence", "bases", *description["splits"]])
    for sequence in description["sequences"]:
        counts = [f"{sequence[name]:,}" for name in ("bases", *description["splits"])]
        table.add_row(sequence["source"], sequence["sequence"], *counts)
    return table


def _table(title: str, first: str, headings: list[str]) -> Table:
    table = Table(title=title)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _genes(source: Description) -> str:
    """Returns the cell about the genes of a source."""
    if not source["genes"]:
        return "not used"
    if "count" in source["genes"]:
        return f"{source['genes']['count']:,}"
    return f"none, {source['genes']['without_annotation']}"


def _reverse(counts: Description) -> str:
    return _percent(counts["strands"]["-"] / counts["fragments"] if counts["fragments"] else None)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A data set that was built.", show_default=False)
]


def inspect(
    folder: Folder,
    fragments: Annotated[
        int,
        typer.Option(
            "--fragments", metavar="N", min=1, help="fragments of each split to count bases in"
        ),
    ] = 20_000,
    every: Annotated[bool, typer.Option("--all", help="count bases in all fragments")] = False,
    sequences: Annotated[
        bool, typer.Option("--sequences", help="show the fragments of each sequence too")
    ] = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.png", help="draw it all on one page")
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample", metavar="N", help="only show where sample N, counted from 0, comes from"
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="NAME", help="the split of --sample; train if not given"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="for programs, instead of tables")
    ] = False,
) -> None:
    """Show what is in a data set.

    Shows counts, composition, N, genes, strands and sources. With --sample it goes from a sample's
    number back to its source, sequence, coordinates (counted from 0, half-open) and strand. A
    sample is a fragment, and its number is the one by which training reads it. Files are
    memory-mapped and not loaded, so this is fast for large data sets too.
    """
    data = DataSet(folder)
    if sample is not None:
        if report or sequences or every:
            raise UserError(
                "--sample shows only one sample; leave out --report, --sequences and --all"
            )
        location = locate(data, split or "train", sample)
        _show(location, [sample_table(location)], as_json)
        return
    if split is not None:
        raise UserError("--split needs --sample; without it all splits are shown")
    if report is not None:
        from data_prep.inspect import picture  # here, because matplotlib takes a second to load

        picture.check_ending(report)
    limit = None if every else fragments
    counting = Phase("counting bases", fragments_to_count(data, limit), "fragments")
    with Display(Console(stderr=True)) as display:
        split_contents = contents(data, limit, partial(display.report, counting))
    description = describe(data, split_contents, sequences)
    _show(description, tables(description), as_json)
    if report is not None:
        picture.draw(data, description, split_contents, report)
        if not as_json:
            print(f"wrote {report}")


def _show(description: Description, shown: Iterable[Table], as_json: bool) -> None:
    """Prints the tables, or their content as JSON."""
    if as_json:
        print(json.dumps(description, indent=2))
        return
    for table in shown:
        print_table(table)
