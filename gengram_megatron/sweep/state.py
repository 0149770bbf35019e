"""How far a run of a sweep is, read from its folder."""

from dataclasses import dataclass
from pathlib import Path

from gengram_megatron.checkpoint.store import CheckpointStore, read_facts
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.training.metrics import FILE, read_metrics

DECISIVE = ("model", "data", "optimizer", "train")
"""Sections that decide a run's losses; run.seed does so as well."""


@dataclass(frozen=True)
class State:
    """How far a run is.

    step: steps done; last: steps wanted.
    loss: of the validation after the last step, in nats a base; None before.
    finished: nothing is left to do, the checkpoint at the end included.
    changed: keys whose values in the folder are others than those of the sweep.
    """

    step: int
    last: int
    loss: float | None
    finished: bool
    changed: list[str]

    @property
    def words(self) -> str:
        """For a table."""
        if self.changed:
            return f"other {', '.join(self.changed[:3])}{', ...' if self.changed[3:] else ''}"
        if self.finished:
            return "finished"
        return f"step {self.step} of {self.last}" if self.step else "to do"


def read_state(config: Config, steps: int) -> State:
    """steps: of the whole run."""
    folder = Path(config.run.dir)
    last = min(steps, config.train.stop_at or steps)
    metrics = read_metrics(folder / FILE) if (folder / FILE).exists() else []
    done = [entry["step"] for entry in metrics if entry["kind"] == "train"]
    at_end = [e["loss"] for e in metrics if e["kind"] == "validation" and e["step"] == last]
    finished = bool(at_end) and (not config.checkpoint.at_end or _saved(folder) >= last)
    return State(
        step=max(done, default=0),
        last=last,
        loss=at_end[-1] if at_end else None,
        finished=finished,
        changed=_changed(folder, config),
    )


def _saved(folder: Path) -> int:
    """The step of the newest checkpoint."""
    newest = CheckpointStore(folder / "checkpoints", None).newest()
    return read_facts(newest).step if newest else 0


def _changed(folder: Path, config: Config) -> list[str]:
    """Keys that decide losses and have another value in the folder's config.yaml."""
    path = folder / "config.yaml"
    if not path.exists():
        return []
    there, wanted = (_decisive(one) for one in (load_config(path, [], Config), config))
    return [key for key in wanted if there.get(key) != wanted[key]]


def _decisive(config: Config) -> dict:
    groups = {name: getattr(config, name).model_dump() for name in DECISIVE}
    flat = {**_flat(groups, ""), "run.seed": config.run.seed}
    del flat["train.stop_at"]  # decides where a run pauses
    return flat


def _flat(group: dict, prefix: str) -> dict:
    """Nested groups as one, keys written with dots."""
    flat = {}
    for name, value in group.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat
