"""Summarizes what a checkpoint holds, without loading its tensors."""

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from gengram_megatron.engine.checkpoint.stored import StoredTensors, missing_files, read_common
from gengram_megatron.runs.store import read_facts
from gengram_megatron.show import print_table

# A weight belongs to the module of the first key that its name contains.
_MODULES = {
    ".memory.tables.": "gengram tables",
    ".memory.": "gengram",
    "embedding.": "embedding",
    "output_layer.": "output layer",
    "layernorm.": "norms",
    ".self_attention.": "attention",
    ".router.": "routers",
    ".experts.": "experts",
    ".mlp.": "feed-forward",
}
_TABLES = ".memory.tables.weights."


def summary(checkpoint: Path) -> dict[str, Any]:
    """Returns a checkpoint's step, tokens, layout, parameters, tables, sizes in bytes and
    config."""
    facts, common, stored = (
        read_facts(checkpoint),
        read_common(checkpoint),
        StoredTensors(checkpoint),
    )
    weights = stored.weights
    parameters: dict[str, int] = {}
    for name in weights:
        module = _module(name)
        parameters[module] = parameters.get(module, 0) + math.prod(stored.shape(name))
    weight_bytes = sum(map(stored.num_bytes, weights))
    return {
        "path": str(checkpoint),
        "step": facts.step,
        "samples": facts.samples,
        "tokens": facts.samples * common["config"]["model"]["seq_length"],
        "seed": facts.seed,
        "layout": facts.layout,
        "has_optimizer": len(weights) < len(stored.names),
        "missing_files": missing_files(checkpoint),
        "dtypes": sorted({str(stored.dtype(name)).removeprefix("torch.") for name in weights}),
        "parameters": {"total": sum(parameters.values()), **parameters},
        "tables": _tables(stored, weights, facts.tables),
        "bytes": {
            "weights": weight_bytes,
            "optimizer": sum(map(stored.num_bytes, stored.names)) - weight_bytes,
            "files": sum(file.stat().st_size for file in checkpoint.iterdir()),
        },
        "config": common["config"],
    }


def _module(name: str) -> str:
    return next((module for key, module in _MODULES.items() if key in name), "others")


def _tables(
    stored: StoredTensors, weights: list[str], known: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Returns one entry per table of each layer; layers count from 1, as in the config."""
    tables = []
    for name in weights:
        layer, is_table, table = name.partition(_TABLES)
        if is_table:
            number = int(layer.rpartition(".")[2]) + 1
            rows, columns = stored.shape(name)
            described = known.get(table, {})
            tables.append(
                {**described, "layer": number, "name": table, "rows": rows, "columns": columns}
            )
    return sorted(tables, key=lambda table: (table["layer"], table["name"]))


def show(summary: dict[str, Any]) -> None:
    """Prints a summary as tables."""
    facts = Table(title=summary["path"], show_header=False)
    facts.add_column("what")
    facts.add_column("number", justify="right")
    for name in ("step", "samples", "tokens", "seed"):
        facts.add_row(name, f"{summary[name]:,}")
    facts.add_row("weights in", ", ".join(summary["dtypes"]))
    facts.add_row("can be resumed", _can_be_resumed(summary))
    for name, number in summary["parameters"].items():
        facts.add_row(f"parameters, {name}", f"{number:,}")
    for name, size in summary["bytes"].items():
        facts.add_row(f"bytes, {name}", f"{size:,}")
    for name, value in summary["layout"].items():
        facts.add_row(f"layout, {name.replace('_', ' ')}", "none" if value is None else str(value))
    print_table(facts)
    if summary["tables"]:
        print_table(_table_of_tables(summary["tables"]))


def _can_be_resumed(summary: dict[str, Any]) -> str:
    if missing := summary["missing_files"]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"no, {missing[0]}{more}"
    return "yes" if summary["has_optimizer"] else "no, weights only"


def _table_of_tables(tables: list[dict[str, Any]]) -> Table:
    layers: dict[tuple[str, int, int], list[str]] = {}
    for table in tables:
        shape = (table["name"], table["rows"], table["columns"])
        layers.setdefault(shape, []).append(str(table["layer"]))
    shown = Table(title="Gengram tables")
    for heading in ("table", "rows", "columns", "layers"):
        shown.add_column(heading, justify="right" if heading in ("rows", "columns") else "left")
    for (name, rows, columns), numbers in layers.items():
        shown.add_row(name, f"{rows:,}", f"{columns:,}", ", ".join(numbers))
    return shown
