"""The run's folder: its lock, its config as resolved, and what that was for earlier steps."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gengram_megatron.config.load import dump_config
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tree import dump_yaml, flattened, inline_yaml, parse_yaml
from gengram_megatron.errors import UserError
from gengram_megatron.files import Locked, lock, replacing

LOCK = ".lock"
VISIBLE_SECONDS = 10.0
"""For so long a node looks in the run's folder for a file that another one has written: network
file systems remember for some seconds that a file was not there."""


def make_folder(folder: Path) -> None:
    """Make the run's folder, or say in one sentence why that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.dir {folder} cannot be made: {error.strerror}; give another run.dir"
        ) from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"run.dir {folder} cannot be written to; give another run.dir")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder; a second run that wants it is told who has it."""
    with ExitStack() as held:
        try:
            held.enter_context(lock(folder / LOCK))
        except Locked as holder:
            raise UserError(
                f"run.dir {folder} is in use by another run, {holder}: wait for its end, or give "
                "another run.dir"
            ) from None
        yield


def remove_if_unused(folder: Path) -> None:
    """Remove a run's folder that holds nothing but its lock: a run that was refused leaves none."""
    with suppress(OSError):  # another run may begin here just now
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def changed_keys(earlier: dict, later: dict) -> list[str]:
    """The keys whose values differ between two configs, a line each, such as
    `optimizer.lr 0.002 -> 0.0005`. Keys that only one of the two has are left out: the earlier one
    may be of another version.

    earlier, later: as model_dump, a checkpoint or config.yaml gives them.
    """
    was, now = flattened(earlier), flattened(later)
    return [
        f"{key} {_written(was[key])} -> {_written(now[key])}"
        for key in now
        if key in was and was[key] != now[key]
    ]


def _written(value: object) -> str:
    groups = isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
    return json.dumps(value) if groups else inline_yaml(value)


def write_config(folder: Path, config: Config, step: int, earlier: dict | None) -> None:
    """Write config.yaml, and what the run was before. Called when a job has done its first step, so
    that a job which trains nothing leaves no trace.

    A config that differs from the one that the steps before were trained with is recorded beside
    it: config.until-step-N.yaml is what the checkpoint of step N was trained with. What describes
    only steps that a kill or damage has undone is renamed, with `discarded` in its name.

    Args:
        step: of the checkpoint that this job goes on from, 0 if from none.
        earlier: the config in that checkpoint.
    """
    path, text = folder / "config.yaml", dump_config(config)
    for until in folder.glob("config.until-step-*.yaml"):
        number = until.stem.removeprefix("config.until-step-")
        if number.isdigit() and int(number) > step:
            until.replace(until.with_name(f"{until.stem}.discarded.yaml"))
    if earlier is not None and changed_keys(earlier, config.model_dump()):
        with replacing(folder / f"config.until-step-{step}.yaml") as beside:
            beside.write_text(dump_yaml(earlier))
    if path.exists():
        if path.read_text() == text:
            return
        if earlier is None or _differs(path, earlier):
            # Of a job that trained, and reached no checkpoint that is still there.
            number = len([*folder.glob("config.discarded-*.yaml")]) + 1
            path.replace(folder / f"config.discarded-{number}.yaml")
    with replacing(path) as beside:
        beside.write_text(text)


def _differs(path: Path, earlier: dict) -> bool:
    """Whether a config file, as far as it can be read, says something else than a config."""
    try:
        return bool(changed_keys(earlier, parse_yaml(path.read_text(), str(path)).plain()))
    except UserError:
        return True
