"""How far a run of a sweep is, read from its folder."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from gengram_megatron.checkpoint.store import CheckpointStore, read_facts
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tree import flattened
from gengram_megatron.errors import UserError
from gengram_megatron.training.metrics import FILE, SKIPS, read_metrics

DECISIVE = ("run.seed", "checkpoint.load", "model.", "data.", "optimizer.", "train.")
"""How the keys begin that decide a run's losses."""
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
"""Those among them that do not: how fast and how safely a run computes the same, up to rounding,
and how often it validates. Not train.validation_samples, as the loss that counts is their mean."""

RUNNING = "RUNNING"
"""Slurm's word for a job that computes."""


@dataclass(frozen=True)
class State:
    """How far a run is.

    step: steps done; last: steps wanted.
    loss: of the validation after the last step, in nats a base; None before.
    finished: nothing is left to do, the checkpoint at the end included.
    changed: keys that decide losses and have other values in the folder's config.yaml.
    failed: it ended in a loss or gradient that is not finite.
    queue: its state in Slurm's queue, such as PENDING; "" where it is not in there.
    unreadable: what keeps the folder's files from being read, such as a key of another version or a
    damaged line; else "".
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
        """Why what is in the folder cannot be taken for this run; empty where it can."""
        if self.unreadable:
            return f"cannot be read ({self.unreadable})"
        if self.changed:
            return f"was trained with other values of {', '.join(self.changed)}"
        return ""

    @property
    def words(self) -> str:
        """For a table."""
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
    """steps: of the whole run; queue: see State."""
    last = min(steps, config.train.stop_at or steps)
    try:
        return replace(_state(config, last), queue=queue)
    except UserError as error:
        return State(0, last, None, False, [], str(error).replace("\n", "; "))


def _state(config: Config, last: int) -> State:
    """UserError: a file of the folder cannot be read."""
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


def _failed(metrics: list[dict], config: Config) -> bool:
    """Whether the last steps are such as end a run: one that is not finite, or with train.on_nan
    skip so many in a row."""
    steps = [entry for entry in metrics if entry["kind"] == "train"]
    needed = SKIPS if config.train.on_nan == "skip" else 1
    return len(steps) >= needed and not any(map(_finite, steps[-needed:]))


def _finite(step: dict) -> bool:
    return all(math.isfinite(step.get(name, 0.0)) for name in ("loss", "grad_norm"))


def _saved(folder: Path) -> int:
    """The step of the newest checkpoint."""
    newest = CheckpointStore(folder / "checkpoints").newest()
    return read_facts(newest).step if newest else 0


def _changed(folder: Path, config: Config) -> list[str]:
    """Keys that decide losses and have another value in the folder's config.yaml."""
    path = folder / "config.yaml"
    if not path.exists():
        return []
    there, wanted = (_decisive(one) for one in (load_config(path, [], Config), config))
    return [key for key in wanted if there.get(key) != wanted[key]]


def _decisive(config: Config) -> dict:
    flat = flattened(config.model_dump())
    return {k: v for k, v in flat.items() if k.startswith(DECISIVE) and k not in INDIFFERENT}
