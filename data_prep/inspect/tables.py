"""What is known of a data set, as tables for a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from data_prep.fate_table import add_fates
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
