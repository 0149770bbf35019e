"""Manages the run's folder: its lock, its resolved config, and the configs of earlier steps."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from gengram_megatron.config.load import dump_config
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tree import dump_yaml, flattened, inline_yaml, parse_yaml
from gengram_megatron.errors import UserError
from gengram_megatron.files import Locked, lock, replacing

LOCK = ".lock"
VISIBLE_SECONDS = 10.0
"""How long a node looks in the run's folder for a file that another node has written. Network file
systems cache for some seconds that a file does not exist."""


def make_folder(folder: Path) -> None:
    """Creates the run's folder. Raises UserError if it cannot be created or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.dir {folder} cannot be created: {error.strerror}; give another run.dir"
        ) from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"run.dir {folder} cannot be written to; give another run.dir")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a run's folder while a context lasts. Raises UserError, which names the other process,
    if another run holds the lock."""
    with ExitStack() as held:
        try:
            held.enter_context(lock(folder / LOCK))
        except Locked as holder:
            raise UserError(
                f"run.dir {folder} is in use by another run, {holder}: wait until it ends, or give "
                "another run.dir"
            ) from None
        yield


def remove_if_unused(folder: Path) -> None:
    """Removes a run's folder if it contains only its lock, so that a refused run leaves no
    folder."""
    with suppress(OSError):  # another run may be starting here
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def changed_keys(earlier: dict[str, Any], later: dict[str, Any]) -> list[str]:
    """Returns the keys whose values differ between two configs, one line each, such as
    `optimizer.lr 0.002 -> 0.0005`. Keys that only one of the two has are left out, because the
    earlier config may be of another version.

    Args:
        earlier, later: nested dicts, as from model_dump, a checkpoint or config.yaml.
    """
    before, after = flattened(earlier), flattened(later)
    return [
        f"{key} {_written(before[key])} -> {_written(after[key])}"
        for key in after
        if key in before and before[key] != after[key]
    ]


def _written(value: object) -> str:
    groups = isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
    return json.dumps(value) if groups else inline_yaml(value)


def write_config(folder: Path, config: Config, step: int, earlier: dict[str, Any] | None) -> None:
    """Writes config.yaml, and keeps the config of earlier steps. This is called after a job's first
    step, so that a job which trains nothing leaves no trace.

    If earlier steps were trained with a different config, that is kept beside the new one:
    config.until-step-N.yaml is the config that the checkpoint of step N was trained with. Configs
    of steps that were lost by a kill or damage are renamed, with `discarded` in their names.

    Args:
        step: step of the checkpoint that this job resumes from; 0 without one.
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
            # The file is from a job that trained, but left no checkpoint that still exists.
            count = len([*folder.glob("config.discarded-*.yaml")]) + 1
            path.replace(folder / f"config.discarded-{count}.yaml")
    with replacing(path) as beside:
        beside.write_text(text)


def _differs(path: Path, earlier: dict[str, Any]) -> bool:
    """Returns whether a config file cannot be read, or differs from a config."""
    try:
        return bool(changed_keys(earlier, parse_yaml(path.read_text(), str(path)).plain()))
    except UserError:
        return True
