"""What is wrong with a data set that a run names, as far as its folder shows it: it is not there,
where it was looked for and what would build it; or it is of another sequence length."""

import os
from collections.abc import Iterator
from pathlib import Path

from gengram_megatron.config.keys import dotted
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tree import read_tree
from gengram_megatron.errors import UserError

PLACES = (".", "configs", "configs/data")
"""Folders, from the current one, whose data configs are looked through."""


def check_data_sets_exist(config: Config, config_file: Path) -> None:
    """Raise UserError with a line for each data set of a run whose folder is not there.

    It opens nothing, and so takes no time before the work of a run begins. config_file: whose
    folder is looked through for the data config too.
    """
    missing = [
        no_data_set(key, Path(folder), beside=config_file.parent)
        for key, folder in data_sets(config).items()
        if not Path(folder).is_dir()
    ]
    if missing:
        raise UserError("\n".join(missing))


def data_sets(config: Config) -> dict[str, str]:
    """The folders of a run's data sets, by the keys that name them."""
    if config.data.path is not None:
        return {"data.path": config.data.path}
    return {
        dotted(("data", "blend", number, "path")): part.path
        for number, part in enumerate(config.data.blend)
    }


def no_data_set(key: str, folder: Path, beside: Path | None = None) -> str:
    """A sentence: a data set is not there, which absolute path that is, and what would build it.

    Args:
        key: of the config that names the folder.
        beside: one more folder to look for data configs in.
    """
    where = os.path.abspath(folder)
    if not folder.is_absolute():
        where += f" ({folder} is relative to the current folder)"
    builds = _config_that_builds(folder, beside)
    command = f"gengram-data build {builds}" if builds else "gengram-data build"
    return f"{key}: there is no folder {where}; `{command}` makes it"


def other_seq_length(key: str, folder: Path, found: int, wanted: int) -> str:
    """A sentence: the fragments of a data set are not as long as the model's sequences."""
    return (
        f"{key}: the fragments in {folder} have {found} bases and model.seq_length is {wanted}; "
        f"set it to {found}, or build the data set with another seq_length"
    )


def _config_that_builds(folder: Path, beside: Path | None) -> Path | None:
    """The data config whose output a folder is, if there is one nearby."""
    for path in _nearby(beside):
        try:
            tree = read_tree(path).plain()
        except (UserError, OSError):
            continue
        output = tree.get("output") if "groups" in tree else None
        if isinstance(output, str) and os.path.abspath(output) == os.path.abspath(folder):
            return path
    return None


def _nearby(beside: Path | None) -> Iterator[Path]:
    folders = dict.fromkeys([*map(Path, PLACES), *([beside] if beside else [])])
    for folder in folders:
        yield from sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
