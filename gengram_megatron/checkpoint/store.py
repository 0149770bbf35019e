"""The checkpoints of a run's folder: which there are, and which may be trusted.

A checkpoint is written to `step_00000120.partial` and renamed when all its files are on the disk,
so a folder without that ending is whole: nothing half-written is ever read.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gengram_megatron.errors import UserError
from gengram_megatron.files import flush

FORMAT = 1
PARTIAL = ".partial"
FACTS = "gengram.json"
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint without opening its tensors."""

    format: int
    step: int
    samples: int
    seed: int
    layout: dict
    tables: dict = field(default_factory=dict)
    """Gengram's tables by name, with what decides which row a k-mer has."""
    data: list[dict] = field(default_factory=list)
    """The data sets in their order: the checksum of each one's samples and its share of the run."""


class CheckpointStore:
    """The folder `checkpoints` of a run."""

    def __init__(self, folder: Path, keep: int | None):
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies once it is whole."""
        return self.folder / f"step_{step:08d}"

    def _partial(self, step: int) -> Path:
        return self.path(step).with_name(self.path(step).name + PARTIAL)

    def begin(self, step: int) -> Path:
        """An empty folder to write to. Those left by a run that was killed are removed."""
        for left in self.folder.glob("step_*" + PARTIAL):
            shutil.rmtree(left)
        partial = self._partial(step)
        partial.mkdir(parents=True)
        return partial

    def finish(self, partial: Path, facts: Facts) -> None:
        """Make a written checkpoint the newest, and remove those beyond `keep`."""
        (partial / FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n")
        # megatron-core flushes its tensors, but neither its description of them nor the rest.
        for path in (*partial.iterdir(), partial):
            flush(path)
        whole = self.path(facts.step)
        if whole.exists():
            raise UserError(f"{whole} is there already: another run writes to this folder")
        os.rename(partial, whole)
        flush(self.folder)
        self._prune()

    def newest(self) -> Path | None:
        """The whole checkpoint with the highest step, if there is one."""
        steps = self._steps()
        return self.path(steps[-1]) if steps else None

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def _prune(self) -> None:
        for step in self._steps()[: -self.keep] if self.keep else []:
            # Renamed first: one that is removed in part must not pass for a whole one.
            os.rename(self.path(step), self._partial(step))
            shutil.rmtree(self._partial(step))


def read_facts(checkpoint: Path) -> Facts:
    """The facts of a checkpoint, or one sentence why it cannot be read."""
    try:
        facts = Facts(**json.loads((checkpoint / FACTS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint} is not a checkpoint of gengram: {error}") from None
    if facts.format != FORMAT:
        raise UserError(
            f"{checkpoint} has format {facts.format}, this version reads {FORMAT}: "
            "use the version of gengram that wrote it"
        )
    return facts
