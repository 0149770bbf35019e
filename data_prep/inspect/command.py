"""The command `gengram-data inspect`: what is known of a data set, as tables for a terminal."""

import json
from collections.abc import Iterator
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

Said = dict[str, Any]
"""What `data_prep.inspect.contents.describe` returns."""


def tables(said: Said) -> Iterator[Table]:
    """The whole data set, its groups and sources, what was dropped, and its sequences if known."""
    yield _splits(said)
    yield _sources(said)
    yield _fates(said)
    if "sequences" in said:
        yield _sequences(said)


def sample_table(place: Said) -> Table:
    """Where one sample comes from."""
    table = Table(title=f"Sample {place['sample']:,} of split {place['split']}", show_header=False)
    bases = place["sequence_bases"]
    strand = {"+": "+ (forward)", "-": "- (stored as the reverse complement)"}
    for name, text in {
        "source": f"{place['source']} ({place['fasta']})",
        "sequence": f"{place['sequence']}, {bases:,} bases",
        "coordinates": f"{place['start']} to {place['end']} (from 0, half-open, forward strand)",
        "region": f"{place['region']} (from 1, both ends included)",
        "strand": strand[place["strand"]],
        "first bases": place["first_bases"],
        "last bases": place["last_bases"],
    }.items():
        table.add_row(name, text)
    return table


def _splits(said: Said) -> Table:
    title = f"{said['folder']}: fragments of {said['seq_length']:,} bases and an end-of-document"
    percents = ["reverse %", *(f"{base} %" for base in BASES), "GC %"]
    table = _table(title, "split", ["fragments", "tokens", *percents])
    for name, split in said["splits"].items():
        composition = [_percent(split["composition"][base]) for base in BASES]
        cells = [f"{split['fragments']:,}", f"{split['tokens']:,}", _reverse(split), *composition]
        table.add_row(name, *cells, _percent(split["gc"]))
    looked = [f"{split['looked_at']:,} of {name}" for name, split in said["splits"].items()]
    table.caption = (
        f"Bases were counted in fragments evenly spread over each split: {', '.join(looked)}. "
        "reverse: share of fragments on the reverse strand; GC: share of what is not N."
    )
    return table


def _sources(said: Said) -> Table:
    """A row for each split of each source and group."""
    table = Table(title="Where the fragments come from")
    for heading in ("source or group", "split"):
        table.add_column(heading, no_wrap=True)
    for heading in ("fragments", "share %", "reverse %", "N %", "GC %"):
        table.add_column(heading, justify="right")
    for group, of_group in said["groups"].items():
        parts = {key: own for key, own in said["sources"].items() if key.startswith(f"{group}/")}
        for key, own in {**parts, group: of_group}.items():
            for name, split in said["splits"].items():
                whole, part = split["fragments"], own[name]
                share = part["fragments"] / whole if whole else None
                cells = [f"{part['fragments']:,}", _percent(share), _reverse(part)]
                cells += [_percent(part["composition"]["N"]), _percent(part["gc"])]
                table.add_row(key, name, *cells, style="bold" if key == group else None)
        table.add_section()
    table.caption = "share: of the split's fragments."
    return table


def _fates(said: Said) -> Table:
    headings = ["sequences", "bases", "genes"]
    table = _table("What became of each source's fragments", "source", headings)
    sources = said["sources"]
    fates = add_fates(table, [own["fates"] for own in sources.values()])
    for (key, own), counts in zip(sources.items(), fates):
        table.add_row(key, f"{own['records']:,}", f"{own['bases']:,}", _genes(own), *counts)
    return table


def _sequences(said: Said) -> Table:
    table = _table("Fragments by sequence", "source", ["sequence", "bases", *said["splits"]])
    for own in said["sequences"]:
        counts = [f"{own[name]:,}" for name in ("bases", *said["splits"])]
        table.add_row(own["source"], own["sequence"], *counts)
    return table


def _table(title: str, first: str, headings: list[str]) -> Table:
    table = Table(title=title)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _genes(own: Said) -> str:
    """What the manifest says of a source's genes."""
    if not own["genes"]:
        return "not asked"
    if "count" in own["genes"]:
        return f"{own['genes']['count']:,}"
    return f"none, {own['genes']['without_annotation']}"


def _reverse(part: Said) -> str:
    return _percent(part["strands"]["-"] / part["fragments"] if part["fragments"] else None)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A data set that was built.", show_default=False)
]


def inspect(
    folder: Folder,
    fragments: Annotated[
        int,
        typer.Option("--fragments", metavar="N", min=1, help="of each split to count bases in"),
    ] = 20_000,
    every: Annotated[bool, typer.Option("--all", help="count bases in all fragments")] = False,
    sequences: Annotated[
        bool, typer.Option("--sequences", help="fragments of each sequence too")
    ] = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.png", help="draw it, on one page")
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option("--sample", metavar="N", help="say only where sample N comes from, from 0"),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="NAME", help="the split of --sample: train")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="for programs, instead of tables")
    ] = False,
) -> None:
    """Show what is in a data set.

    Counts, composition, N, genes, strands and sources. With --sample it goes from a sample's number back to its source, sequence, coordinates (counted
    from 0, half-open) and strand. A sample is a fragment, and its number the one that training
    reads it by. Files are mapped and not loaded, so a large data set answers at once.
    """
    data = DataSet(folder)
    if sample is not None:
        if report or sequences or every:
            raise UserError("--sample answers alone; leave out --report, --sequences and --all")
        place = locate(data, split or "train", sample)
        _show(place, [sample_table(place)], as_json)
        return
    if split is not None:
        raise UserError("--split goes with --sample; without it all splits are shown")
    if report is not None:
        from data_prep.inspect import picture  # here, because matplotlib takes a second to load

        picture.check_ending(report)
    most = None if every else fragments
    counting = Phase("counting bases", fragments_to_count(data, most), "fragments")
    with Display(Console(stderr=True)) as display:
        found = contents(data, most, partial(display.report, counting))
    said = describe(data, found, sequences)
    _show(said, tables(said), as_json)
    if report is not None:
        picture.draw(data, said, found, report)
        if not as_json:
            print(f"wrote {report}")


def _show(said: dict, shown, as_json: bool) -> None:
    """The tables, or what they show as JSON."""
    if as_json:
        print(json.dumps(said, indent=2))
        return
    for table in shown:
        print_table(table)
