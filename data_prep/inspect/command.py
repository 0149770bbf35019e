"""The command `gengram-data inspect`."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_prep.inspect.contents import contents, describe, fragments_to_count
from data_prep.inspect.opened import DataSet
from data_prep.inspect.sample import locate
from data_prep.inspect.tables import sample_table, tables
from data_prep.progress import Display, Phase
from gengram_megatron.errors import UserError
from gengram_megatron.show import print_table

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
