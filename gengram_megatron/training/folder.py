"""The run's folder: its config as resolved, and what it was before a run went on with another."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gengram_megatron.config.load import dump_config
from gengram_megatron.config.schema import Config
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


def write_config(folder: Path, config: Config, step: int) -> None:
    """Write config.yaml. One that says something else is kept as config.until-step-N.yaml."""
    path, text = folder / "config.yaml", dump_config(config)
    if path.exists():
        if path.read_text() == text:
            return
        path.replace(folder / f"config.until-step-{step}.yaml")
    with replacing(path) as beside:
        beside.write_text(text)
