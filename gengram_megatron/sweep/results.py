"""Reads the progress and results of a sweep's runs from their folders, and writes them as a table,
CSV and JSON.
"""

import csv
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tree import describe, flattened, inline_yaml
from gengram_megatron.errors import UserError
from gengram_megatron.files import replacing
from gengram_megatron.runs.metrics import FILE, MAX_CONSECUTIVE_SKIPS, read_metrics
from gengram_megatron.runs.store import CheckpointStore, read_facts
from gengram_megatron.sweep.runs import SweepRun

DECISIVE = ("run.seed", "checkpoint.load", "model.", "data.", "optimizer.", "train.")
"""Prefixes of the keys that affect a run's losses."""
INDIFFERENT = {
    "model.gengram.split",
    "model.gengram.rows_over",
    "model.gengram.project",
    "data.tokenizer",
    "data.workers",
    "optimizer.distributed",
    "optimizer.overlap_grad_reduce",
    "optimizer.overlap_param_gather",
    "train.stop_at",
    "train.deterministic",
    "train.on_nan",
    "train.watchdog_seconds",
    "train.recompute",
    "train.validation_interval",
}
"""Keys with these prefixes that do not affect losses, except by rounding: they decide how fast and
how safely a run computes, and how often it validates. train.validation_samples is not among them,
because a sweep compares validation losses, which are means over these samples."""

RUNNING = "RUNNING"
"""Slurm's state of a running job."""


@dataclass(frozen=True)
class State:
    """The progress of a run.

    Attributes:
        step: steps done.
        last: steps wanted.
        loss: loss of the validation after the last step, in nats per base; None before it.
        finished: whether nothing is left to do, including the checkpoint at the end.
        changed: keys that affect losses and have other values in the folder's config.yaml.
        unreadable: why the folder's files cannot be read, such as a key of another version or a
            damaged line; "" if they can.
        failed: whether it ended in a loss or gradient that is not finite.
        queue: its state in Slurm's queue, such as PENDING; "" if it is not in the queue.
    """

    step: int
    last: int
    loss: float | None
    finished: bool
    changed: list[str]
    unreadable: str
    failed: bool = False
    queue: str = ""

    @property
    def objection(self) -> str:
        """The reason why the folder's content does not count as this run, or "" if it does."""
        if self.unreadable:
            return f"cannot be read ({self.unreadable})"
        if self.changed:
            return f"was trained with other values of {', '.join(self.changed)}"
        return ""

    @property
    def words(self) -> str:
        """The state in words, for a table."""
        if self.unreadable:
            return "unreadable"
        if self.changed:
            return f"other {', '.join(self.changed[:3])}{', ...' if self.changed[3:] else ''}"
        if self.finished:
            return "finished"
        if self.queue == RUNNING:
            return f"running, step {self.step} of {self.last}"
        if self.queue:
            return "queued"
        if self.failed:
            return f"failed: not finite in step {self.step}"
        return f"step {self.step} of {self.last}" if self.step else "to do"


def read_state(config: Config, steps: int, queue: str = "") -> State:
    """Reads the progress of a run from its folder.

    Args:
        steps: steps of the whole run.
        queue: its state in Slurm's queue, see State.
    """
    last = min(steps, config.train.stop_at or steps)
    try:
        return replace(_state(config, last), queue=queue)
    except UserError as error:
        return State(0, last, None, False, [], str(error).replace("\n", "; "))


def _state(config: Config, last: int) -> State:
    """Reads the progress of a run. Raises UserError if a file of the folder cannot be read."""
    folder = Path(config.run.dir)
    metrics = read_metrics(folder / FILE) if (folder / FILE).exists() else []
    done = [entry["step"] for entry in metrics if entry["kind"] == "train"]
    at_end = [e["loss"] for e in metrics if e["kind"] == "validation" and e["step"] == last]
    return State(
        step=max(done, default=0),
        last=last,
        loss=at_end[-1] if at_end else None,
        finished=bool(at_end) and (not config.checkpoint.at_end or _saved(folder) >= last),
        changed=_changed(folder, config),
        unreadable="",
        failed=_failed(metrics, config),
    )


def _failed(metrics: list[dict[str, Any]], config: Config) -> bool:
    """Returns whether the last steps ended the run: one step that is not finite, or, with
    train.on_nan skip, MAX_CONSECUTIVE_SKIPS in a row."""
    steps = [entry for entry in metrics if entry["kind"] == "train"]
    needed = MAX_CONSECUTIVE_SKIPS if config.train.on_nan == "skip" else 1
    return len(steps) >= needed and not any(map(_finite, steps[-needed:]))


def _finite(step: dict[str, Any]) -> bool:
    return all(math.isfinite(step.get(name, 0.0)) for name in ("loss", "grad_norm"))


def _saved(folder: Path) -> int:
    """Returns the step of the newest checkpoint; 0 if there is none."""
    newest = CheckpointStore(folder / "checkpoints").newest()
    return read_facts(newest).step if newest else 0


def _changed(folder: Path, config: Config) -> list[str]:
    """Returns the keys that affect losses and have another value in the folder's config.yaml."""
    path = folder / "config.yaml"
    if not path.exists():
        return []
    stored, wanted = _decisive(load_config(path, [], Config)), _decisive(config)
    return [key for key in wanted if stored.get(key) != wanted[key]]


def _decisive(config: Config) -> dict[str, Any]:
    flat = flattened(config.model_dump())
    return {k: v for k, v in flat.items() if k.startswith(DECISIVE) and k not in INDIFFERENT}


Row = dict[str, Any]
NUMBERS = ("loss", "bits_per_base")


def rows(runs: list[SweepRun], states: list[State]) -> list[Row]:
    """Returns a row for each run. Its loss is that of the last validation, in nats per base; None
    if the run is not finished."""
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


def varied(rows: list[Row]) -> list[str]:
    """Returns the keys that vary, in the order of the file."""
    return list(dict.fromkeys(key for row in rows for key in row["settings"]))


def shown(rows: list[Row], title: str) -> Table:
    """Returns the rows as a table, with the best loss in bold."""
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    table = Table(title=title)
    for heading in ("run", "differs in", "state"):
        table.add_column(heading, no_wrap=heading == "run")
    for heading in ("loss, nats", "bits per base"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        settings = (f"{key}={_written(value)}" for key, value in row["settings"].items())
        numbers = ("" if row[name] is None else f"{row[name]:.4f}" for name in NUMBERS)
        best = "bold" if row["loss"] is not None and row["loss"] == min(losses) else None
        table.add_row(row["name"], "\n".join(settings), row["state"], *numbers, style=best)
    return table


def _written(value: Any) -> str:
    return describe(value) if isinstance(value, dict) else inline_yaml(value)


def files(folder: Path) -> list[Path]:
    """Returns the files that --results writes into the folder of a sweep: two tables and the
    picture."""
    return [folder / f"results.{ending}" for ending in ("json", "csv", "png")]


def write_files(rows: list[Row], folder: Path) -> None:
    """Writes results.json and results.csv, in full precision."""
    keys, (*tables, _) = varied(rows), files(folder)
    for file in tables:
        with replacing(file) as beside, beside.open("w", newline="") as out:
            if file.suffix == ".json":
                json.dump(rows, out, indent=1)
            else:
                plain = [name for name in rows[0] if name != "settings"]
                writer = csv.writer(out)
                writer.writerow([*keys, *plain])
                for row in rows:
                    settings = [row["settings"].get(key, "") for key in keys]
                    writer.writerow([*settings, *(row[name] for name in plain)])
