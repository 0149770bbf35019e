"""What a run will be, worked out from its config alone: nothing is started, no GPU is needed."""

from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from gengram_megatron.config.layout import Layout
from gengram_megatron.config.placement import Placement, group_sizes, placements
from gengram_megatron.config.schema import Config
from gengram_megatron.model.flops import count_parameters, forward_flops


def plan(config: Config, layout: Layout) -> dict:
    """Steps, parameters, FLOPs, and the memory tables of a layer with how each is split.

    A table's rows_per_rank and columns_per_rank are those of the rank that holds most.
    """
    tokens = layout.samples * config.model.seq_length
    gengram = config.model.gengram
    return {
        "processes": layout.world_size,
        "steps": layout.steps,
        "samples": layout.samples,
        "tokens": tokens,
        "parameters": asdict(count_parameters(config)),
        "forward_flops_per_token": forward_flops(config).total,
        "memory_layers": gengram.layers if gengram.enabled else [],
        "tables": [
            _table(place, config, layout)
            for place in (placements(config, layout.world_size) if gengram.enabled else ())
        ],
    }


def _table(place: Placement, config: Config, layout: Layout) -> dict:
    table = place.table
    ranks = group_sizes(config, layout.world_size)[place.over] if place.over else 1
    return {
        "name": table.name,
        "k": table.k,
        "hashed": table.hash_seed is not None,
        "rows": table.rows,
        "columns": table.columns,
        "split": place.split,
        "over": place.over or "tensor",
        "rows_per_rank": -(-table.rows // ranks),
        "columns_per_rank": place.columns_held(layout.tensor),
        "reason": place.reason,
    }


def show(plan: dict) -> None:
    """As tables, for people."""
    console = Console()
    facts = Table(title="The run", show_header=False)
    facts.add_column("what")
    facts.add_column("number", justify="right")
    for name in ("processes", "steps", "samples", "tokens"):
        facts.add_row(name, f"{plan[name]:,}")
    for name, number in plan["parameters"].items():
        facts.add_row(f"parameters, {name}", f"{number:,}")
    facts.add_row("FLOPs a token, forward", f"{plan['forward_flops_per_token']:,}")
    console.print(facts)
    if plan["tables"]:
        console.print(_tables(plan))


def _tables(plan: dict) -> Table:
    layers = ", ".join(map(str, plan["memory_layers"]))
    hashed = any(row["hashed"] for row in plan["tables"])
    shown = Table(
        title=f"Memory tables of each of the layers {layers}",
        caption="* hashed" if hashed else None,
    )
    for heading in ("table", "rows", "columns", "split by", "a rank holds", "because"):
        right = heading in ("rows", "columns", "a rank holds")
        shown.add_column(
            heading, justify="right" if right else "left", no_wrap=heading != "because"
        )
    for row in plan["tables"]:
        shown.add_row(
            row["name"] + ("*" if row["hashed"] else ""),
            f"{row['rows']:,}",
            f"{row['columns']:,}",
            f"{row['split']}, {row['over']}",
            f"{row['rows_per_rank']:,} x {row['columns_per_rank']:,}",
            row["reason"],
        )
    return shown
