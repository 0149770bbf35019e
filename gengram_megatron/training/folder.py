"""The run's folder: its config as resolved, and what it was before a run went on with another."""

import os
from pathlib import Path

from gengram_megatron.config.load import dump_config
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError


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


def write_config(folder: Path, config: Config, step: int) -> None:
    """Write config.yaml. One that says something else is kept as config.until-step-N.yaml."""
    path, text = folder / "config.yaml", dump_config(config)
    if path.exists():
        if path.read_text() == text:
            return
        os.replace(path, folder / f"config.until-step-{step}.yaml")
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)
