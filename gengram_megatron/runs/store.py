"""Manages the checkpoints of a run's folder: which exist, and which are intact.

A checkpoint is written to `step_00000120.<random>.partial` and renamed when all its files are on
the disk, so a folder without a suffix is complete, and nothing half-written is ever read. Later
damage to its files is detected by their checksums, which are stored beside them in a file that
`sha256sum -c` can read too; a damaged checkpoint is renamed to `.damaged` and kept.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from gengram_megatron.config.schema import Config
from gengram_megatron.config.weights import count_parameters
from gengram_megatron.errors import UserError
from gengram_megatron.files import checksum, flush


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError in the context, which reads `path` or a file in it, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path} cannot be read: {error.strerror or error}; check that it "
            "exists and that its permissions allow reading"
        ) from None


def check_readable(files: Iterable[Path]) -> None:
    """Raises UserError if one of these files cannot be opened and read."""
    for path in files:
        with reading(path), path.open("rb") as file:
            file.read(1)


CHECKSUMS = "checksums.sha256"


def write_checksums(folder: Path, known: dict[str, str]) -> None:
    """Writes the checksums of all files of a folder to its checksum file, and flushes it.

    Args:
        known: checksums that have been computed already, by file name.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS)
    lines = (f"{known.get(name) or checksum(folder / name)}  {name}\n" for name in names)
    (folder / CHECKSUMS).write_text("".join(lines))
    flush(folder / CHECKSUMS)


def read_checksums(folder: Path) -> dict[str, str]:
    """Returns the checksums by file name.

    Raises ValueError, with a message for the user, if the checksum file is missing or damaged.
    """
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
        return {name: digest for digest, name in (line.split("  ") for line in lines)}
    except FileNotFoundError:
        raise ValueError(f"{CHECKSUMS} is missing") from None
    except OSError as error:
        raise ValueError(f"{CHECKSUMS} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{CHECKSUMS} is not a list of checksums and names") from None


def damage(folder: Path, share: int = 0, shares: int = 1) -> list[str]:
    """Returns a phrase for each problem with a checkpoint's files; empty if it is intact.

    Args:
        share, shares: read only every shares-th file, from number `share` on, so that several
            processes can divide the work.
    """
    try:
        expected = read_checksums(folder)
    except ValueError as error:
        return [str(error)]
    names = sorted(expected)[share::shares]
    return [
        *_unknown(folder, expected),
        *_changed(folder, {name: expected[name] for name in names}),
    ]


def _unknown(folder: Path, expected: Iterable[str]) -> list[str]:
    present = {path.name for path in folder.iterdir()}
    return [f"{CHECKSUMS} lacks {name}" for name in sorted(present - {CHECKSUMS, *expected})]


def _changed(folder: Path, expected: dict[str, str]) -> list[str]:
    problems = []
    for name, digest in expected.items():
        try:
            if checksum(folder / name) != digest:
                problems.append(f"{name} is not what was written")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    return problems


def check_whole(folder: Path) -> None:
    """Raises UserError if a checkpoint's files are not what was written, before they are used."""
    if problems := damage(folder):
        raise UserError(
            f"{folder} is damaged: {'; '.join(problems)}; use an earlier checkpoint of the run"
        )


FORMAT = 1
PARTIAL, DAMAGED = ".partial", ".damaged"
FACTS = "gengram.json"
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Facts:
    """What is known about a checkpoint without opening its tensors."""

    format: int
    step: int
    samples: int
    seed: int
    layout: dict[str, Any]
    tables: dict[str, Any] = field(default_factory=dict)
    """Gengram's tables by name, with what decides which row a k-mer has."""
    data: list[dict[str, Any]] = field(default_factory=list)
    """The data sets in order: the checksum of each one's samples, and its share of the run."""


class CheckpointStore:
    """The folder `checkpoints` of a run.

    Args:
        folder: need not exist yet.
        keep: how many of the newest to keep; None: all.
        keep_every: also keep those of steps that are multiples of this; None: no others.
    """

    def __init__(self, folder: Path, keep: int | None = None, keep_every: int | None = None):
        self.folder, self.keep, self.keep_every = folder, keep, keep_every

    def path(self, step: int) -> Path:
        """Returns the folder of a step's checkpoint once it is complete."""
        return self.folder / f"step_{step:08d}"

    def begin(self, step: int, estimate: int = 0) -> Path:
        """Creates an empty folder to write to, and removes those that a killed run has left.

        Its name is new each time, because the writer of a killed run may still be running.

        Args:
            estimate: estimated bytes of the checkpoint, used if there is no earlier one.
        """
        for leftover in self.folder.glob("step_*" + PARTIAL):
            shutil.rmtree(leftover, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_space(estimate)
        partial = self.path(step).with_suffix(f".{uuid4().hex[:8]}{PARTIAL}")
        partial.mkdir()
        return partial

    def _check_space(self, estimate: int) -> None:
        newest = self.newest()
        needed = size(newest) if newest else estimate
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"a checkpoint needs {needed:,} bytes and {free:,} are free: make room, or keep "
                "fewer with checkpoint.keep"
            )

    def finish(self, partial: Path, facts: Facts, checksums: dict[str, str] | None = None) -> None:
        """Makes a written checkpoint the newest, and removes those beyond `keep`.

        Args:
            checksums: checksums that the writers have computed, by file name.
        """
        (partial / FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n")
        write_checksums(partial, checksums or {})
        # megatron-core flushes its tensor files, but no others.
        for path in (*partial.iterdir(), partial):
            flush(path)
        whole = self.path(facts.step)
        if whole.exists():
            raise UserError(f"{whole} already exists: another run writes to this folder")
        os.rename(partial, whole)
        flush(self.folder)
        self._prune()

    def newest(self) -> Path | None:
        """Returns the complete checkpoint with the highest step; None if there is none."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, in order."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def checkpoints(self) -> list[Path]:
        """Returns all complete checkpoints, in the order of their steps."""
        return [self.path(step) for step in self.steps()]

    def set_aside(self, checkpoint: Path) -> Path:
        """Renames a damaged checkpoint, so that it is no longer used. Returns its new path."""
        aside = checkpoint.with_suffix(f".{uuid4().hex[:8]}{DAMAGED}")
        os.rename(checkpoint, aside)
        return aside

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep] if self.keep else []:
            if self.keep_every is None or step % self.keep_every:
                # Renamed first, because a partly removed checkpoint must not look complete.
                removed = self.path(step).with_suffix(PARTIAL)
                os.rename(self.path(step), removed)
                # Files still being read on a network file system are removed by the next save.
                shutil.rmtree(removed, ignore_errors=True)


def checkpoints_at(path: Path) -> list[Path]:
    """Returns the checkpoints at a path, in the order of their steps. The path may be a checkpoint,
    a run's folder, or its folder `checkpoints`."""
    if (path / FACTS).is_file():
        return [path]
    return (
        CheckpointStore(path / "checkpoints").checkpoints() or CheckpointStore(path).checkpoints()
    )


def find_checkpoint(path: Path) -> Path:
    """Returns the checkpoint that `path` refers to: the path itself, or the newest in a run's
    folder."""
    if checkpoints := checkpoints_at(path):
        return checkpoints[-1]
    raise UserError(
        f"{path} is neither a checkpoint of gengram nor the folder of a run that has one: "
        "give a folder such as runs/mine or runs/mine/checkpoints/step_00001000"
    )


def source_checkpoints(given: Path) -> list[Path]:
    """Returns the checkpoints that checkpoint.load refers to, in the order of their steps: the one
    that it names, or all in a run's folder."""
    if checkpoints := checkpoints_at(given):
        return checkpoints
    raise UserError(
        f"checkpoint.load is {given}, which is neither a checkpoint nor the folder of a run that "
        "has one: give a folder such as runs/mine or runs/mine/checkpoints/step_00001000; "
        "`gengram checkpoint import` makes one from a published model"
    )


def check_load(config: Config) -> None:
    """Raises UserError if a run would start from checkpoint.load, and there is no checkpoint. A run
    that has checkpoints of its own resumes from them and does not need it."""
    load = config.checkpoint.load
    if load is not None and not checkpoints_at(Path(config.run.dir)):
        source_checkpoints(Path(load))


def size(checkpoint: Path) -> int:
    """Returns the bytes of all files of a checkpoint."""
    return sum(path.stat().st_size for path in checkpoint.iterdir())


def estimated_size(config: Config) -> int:
    """Estimates the bytes of a run's checkpoint: its weights, and three float32 optimizer states
    for each weight."""
    weight = 2 if config.train.dtype == "bf16" else 4
    return count_parameters(config).total * (weight + 12)


class UnreadableCheckpoint(UserError):
    """The facts file of a checkpoint cannot be read: it is damaged, or this is not a checkpoint."""


def read_facts(checkpoint: Path) -> Facts:
    """Reads the facts of a checkpoint. Raises UserError if they cannot be read."""
    try:
        facts = json.loads((checkpoint / FACTS).read_text())
        if (format := facts["format"]) == FORMAT:
            return Facts(**facts)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UnreadableCheckpoint(
            f"{checkpoint} is not a checkpoint of gengram: {error}"
        ) from None
    raise UserError(
        f"{checkpoint} has format {format}, but this version reads format {FORMAT}: "
        "use the version of gengram that wrote it"
    )
