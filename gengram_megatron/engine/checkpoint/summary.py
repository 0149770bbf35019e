"""What a checkpoint holds, said without loading its tensors."""

import math
from pathlib import Path

from rich.table import Table

from gengram_megatron.engine.checkpoint.stored import StoredTensors, missing_files, read_common
from gengram_megatron.runs.store import read_facts
from gengram_megatron.show import print_table

OPTIMIZER = "optimizer."
"""What the names of the optimizer's tensors begin with; all others are weights."""

# The first that a weight's name contains says which module it belongs to.
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


def summary(checkpoint: Path) -> dict:
    """Step, tokens, layout, parameters, tables, sizes in bytes and the config of a run."""
    facts, common, stored = (
        read_facts(checkpoint),
        read_common(checkpoint),
        StoredTensors(checkpoint),
    )
    weights = [name for name in stored.names if not name.startswith(OPTIMIZER)]
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
    return next((module for part, module in _MODULES.items() if part in name), "others")


def _tables(stored: StoredTensors, weights: list[str], known: dict[str, dict]) -> list[dict]:
    """One entry a table of a layer; layers count from 1, as in the config."""
    found = []
    for name in weights:
        layer, is_table, table = name.partition(_TABLES)
        if is_table:
            number = int(layer.rpartition(".")[2]) + 1
            rows, columns = stored.shape(name)
            described = known.get(table, {})
            found.append(
                {**described, "layer": number, "name": table, "rows": rows, "columns": columns}
            )
    return sorted(found, key=lambda table: (table["layer"], table["name"]))


def show(summary: dict) -> None:
    """As tables, for people."""
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


def _can_be_resumed(summary: dict) -> str:
    if missing := summary["missing_files"]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"no, {missing[0]}{more}"
    return "yes" if summary["has_optimizer"] else "no, weights only"


def _table_of_tables(tables: list[dict]) -> Table:
    layers: dict[tuple, list[str]] = {}
    for table in tables:
        same = (table["name"], table["rows"], table["columns"])
        layers.setdefault(same, []).append(str(table["layer"]))
    shown = Table(title="Memory tables")
    for heading in ("table", "rows", "columns", "layers"):
        shown.add_column(heading, justify="right" if heading in ("rows", "columns") else "left")
    for (name, rows, columns), where in layers.items():
        shown.add_row(name, f"{rows:,}", f"{columns:,}", ", ".join(where))
    return shown
