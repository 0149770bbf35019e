"""The runs that tests of faults break: two data-parallel ranks, and one that nothing happens to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.training.ranks import Ranks, start_ranks
from tests.training.tiny import entries

STEPS, INTERVAL = 16, 4
COMMON = (f"train.steps={STEPS}", f"checkpoint.interval={INTERVAL}", "data.workers=1")


@dataclass(frozen=True)
class Lab:
    """Where runs lie, each under its name."""

    folder: Path
    config: Path

    def run(self, name: str) -> Path:
        return self.folder / name

    def start(
        self,
        name: str,
        *settings: str,
        count: int = 2,
        attempt: str = "first",
        before: Callable[[], None] | None = None,
    ) -> Ranks:
        """Start the run of a name, or go on with it."""
        words = ["train", str(self.config), f"run.dir={self.run(name)}", *COMMON, *settings]
        return start_ranks(count, words, self.folder / "said" / name / attempt, before)

    def steps(self, name: str) -> int:
        """Steps that a run has in its log."""
        log = self.run(name) / "metrics.jsonl"
        return len(entries(self.run(name), "train")) if log.exists() else 0

    def checkpoints(self, name: str) -> list[int]:
        """Steps of the checkpoints that pass for whole."""
        found = (self.run(name) / "checkpoints").glob("step_*")
        return sorted(int(path.name[5:]) for path in found if path.suffix == "")
