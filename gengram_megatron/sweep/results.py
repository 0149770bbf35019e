"""What the runs of a sweep came to: a table for people, CSV and JSON for programs."""

import csv
import json
import math
from pathlib import Path
from typing import Any

from rich.table import Table

from gengram_megatron.config.tree import describe, inline_yaml
from gengram_megatron.files import replacing
from gengram_megatron.sweep.runs import SweepRun
from gengram_megatron.sweep.state import State

Row = dict[str, Any]
NUMBERS = ("loss", "bits_per_base")


def rows(runs: list[SweepRun], states: list[State]) -> list[Row]:
    """A row for each run. loss is that of the last validation of a finished run, in nats a base;
    of the others it is None."""
    return [_row(run, state) for run, state in zip(runs, states)]


def _row(run: SweepRun, state: State) -> Row:
    loss = state.loss if state.finished and not state.objection else None
    return {
        "name": run.name,
        "group": run.group,
        "folder": run.config.run.dir,
        "settings": run.settings,
        "state": state.words,
        "objection": state.objection,
        "step": state.step,
        "steps": state.last,
        "samples": state.step * run.config.train.global_batch_size,
        "tokens": state.step * run.config.train.global_batch_size * run.config.model.seq_length,
        "loss": loss,
        "bits_per_base": None if loss is None else loss / math.log(2),
    }


def varied(found: list[Row]) -> list[str]:
    """The keys that vary, in the order of the file."""
    return list(dict.fromkeys(key for row in found for key in row["settings"]))


def shown(found: list[Row], title: str) -> Table:
    """The rows as a table; the best loss stands out."""
    losses = [row["loss"] for row in found if row["loss"] is not None]
    table = Table(title=title)
    for heading in ("run", "differs in", "state"):
        table.add_column(heading, no_wrap=heading == "run")
    for heading in ("loss, nats", "bits a base"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found:
        settings = (f"{key}={_written(value)}" for key, value in row["settings"].items())
        numbers = ("" if row[name] is None else f"{row[name]:.4f}" for name in NUMBERS)
        best = "bold" if row["loss"] is not None and row["loss"] == min(losses) else None
        table.add_row(row["name"], "\n".join(settings), row["state"], *numbers, style=best)
    return table


def _written(value: Any) -> str:
    return describe(value) if isinstance(value, dict) else inline_yaml(value)


def files(folder: Path) -> list[Path]:
    """What --results writes into the folder of a sweep: two tables and the picture."""
    return [folder / f"results.{ending}" for ending in ("json", "csv", "png")]


def write_files(found: list[Row], folder: Path) -> None:
    """Write results.json and results.csv, in full precision."""
    keys, (*tables, _) = varied(found), files(folder)
    for file in tables:
        with replacing(file) as beside, beside.open("w", newline="") as out:
            if file.suffix == ".json":
                json.dump(found, out, indent=1)
            else:
                plain = [name for name in found[0] if name != "settings"]
                writer = csv.writer(out)
                writer.writerow([*keys, *plain])
                for row in found:
                    settings = [row["settings"].get(key, "") for key in keys]
                    writer.writerow([*settings, *(row[name] for name in plain)])
