"""The checkpoints of a run's folder: which there are, and which may be trusted.

A checkpoint is written to `step_00000120.<random>.partial` and renamed when all its files are on
the disk, so a folder without an ending is whole: nothing half-written is ever read. What happens to
its files later is found by their checksums, which lie beside them in a file that `sha256sum -c`
reads, too; a damaged checkpoint is renamed to `.damaged` and stays.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from uuid import uuid4

from gengram_megatron.config.schema import Config
from gengram_megatron.config.weights import count_parameters
from gengram_megatron.errors import UserError
from gengram_megatron.files import checksum, flush


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of the system while `path` is read, or a file in it, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path} cannot be read: {error.strerror or error}; see that it is "
            "there and may be read"
        ) from None


def check_readable(files: Iterable[Path]) -> None:
    """UserError: one of these files cannot be opened and read."""
    for path in files:
        with reading(path), path.open("rb") as file:
            file.read(1)


CHECKSUMS = "checksums.sha256"


def write_checksums(folder: Path, known: dict[str, str]) -> None:
    """Note the checksums of all files of a folder, and flush.

    known: those that are there already, by file name; the others are computed.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS)
    lines = (f"{known.get(name) or checksum(folder / name)}  {name}\n" for name in names)
    (folder / CHECKSUMS).write_text("".join(lines))
    flush(folder / CHECKSUMS)


def read_checksums(folder: Path) -> dict[str, str]:
    """The checksums by file name.

    Raises ValueError, in words, if the manifest is not whole.
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
    """What is wrong with a checkpoint's files, a phrase each; none if it is whole.

    share, shares: reads only every shares-th file, so that many processes can do it together.
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
    there = {path.name for path in folder.iterdir()}
    return [f"{CHECKSUMS} lacks {name}" for name in sorted(there - {CHECKSUMS, *expected})]


def _changed(folder: Path, expected: dict[str, str]) -> list[str]:
    found = []
    for name, digest in expected.items():
        try:
            if checksum(folder / name) != digest:
                found.append(f"{name} is not what was written")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
    return found


def check_whole(folder: Path) -> None:
    """UserError: a checkpoint's files are not what was written, so nothing is to be made of them."""
    if problems := damage(folder):
        raise UserError(
            f"{folder} is damaged: {'; '.join(problems)}; take an earlier checkpoint of the run"
        )


FORMAT = 1
PARTIAL, DAMAGED = ".partial", ".damaged"
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
    """The folder `checkpoints` of a run.

    Args:
        folder: need not be there yet.
        keep: so many of the newest stay; None: all.
        keep_every: those of steps that this number divides stay besides; None: no others.
    """

    def __init__(self, folder: Path, keep: int | None = None, keep_every: int | None = None):
        self.folder, self.keep, self.keep_every = folder, keep, keep_every

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies once it is whole."""
        return self.folder / f"step_{step:08d}"

    def begin(self, step: int, estimate: int = 0) -> Path:
        """An empty folder to write to. Those left by a run that was killed are removed.

        Its name is new each time: the writer of a run that was killed may still be at work.
        estimate: bytes that the checkpoint will have, if there is none to learn it from.
        """
        for left in self.folder.glob("step_*" + PARTIAL):
            shutil.rmtree(left, ignore_errors=True)
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
        """Make a written checkpoint the newest, and remove those beyond `keep`.

        checksums: of the files whose writers computed them, by name.
        """
        (partial / FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n")
        write_checksums(partial, checksums or {})
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
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def steps(self) -> list[int]:
        """Of all whole checkpoints, in order."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def checkpoints(self) -> list[Path]:
        """All whole checkpoints, in the order of their steps."""
        return [self.path(step) for step in self.steps()]

    def set_aside(self, checkpoint: Path) -> Path:
        """Take a damaged checkpoint out of the row; the path that it gets."""
        aside = checkpoint.with_suffix(f".{uuid4().hex[:8]}{DAMAGED}")
        os.rename(checkpoint, aside)
        return aside

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep] if self.keep else []:
            if self.keep_every is None or step % self.keep_every:
                # Renamed first: one that is removed in part must not pass for a whole one.
                removed = self.path(step).with_suffix(PARTIAL)
                os.rename(self.path(step), removed)
                # What is still being read, on a network's disk, is removed by the next save.
                shutil.rmtree(removed, ignore_errors=True)


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoints that a path of the user's means, in the order of their steps: itself, or all
    of a run's folder or of its folder `checkpoints`."""
    if (path / FACTS).is_file():
        return [path]
    return (
        CheckpointStore(path / "checkpoints").checkpoints() or CheckpointStore(path).checkpoints()
    )


def size(checkpoint: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in checkpoint.iterdir())


def estimated_size(config: Config) -> int:
    """Bytes of a run's checkpoint: weights, and three float32 numbers each for the optimizer."""
    weight = 2 if config.train.dtype == "bf16" else 4
    return count_parameters(config).total * (weight + 12)


class UnreadableCheckpoint(UserError):
    """A checkpoint's own description cannot be read: it is damaged, or it is no checkpoint."""


def read_facts(checkpoint: Path) -> Facts:
    """The facts of a checkpoint, or one sentence why it cannot be read."""
    try:
        found = json.loads((checkpoint / FACTS).read_text())
        if (format := found["format"]) == FORMAT:
            return Facts(**found)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UnreadableCheckpoint(
            f"{checkpoint} is not a checkpoint of gengram: {error}"
        ) from None
    raise UserError(
        f"{checkpoint} has format {format}, this version reads {FORMAT}: "
        "use the version of gengram that wrote it"
    )
