"""What all commands that read a config file share: their arguments, and --keys, which prints the
keys of a schema with allowed values, defaults and meanings.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from gengram_megatron.config.keys import Key, Keys
from gengram_megatron.config.load import COMMAND_LINE
from gengram_megatron.config.tree import inline_yaml
from gengram_megatron.errors import UserError
from gengram_megatron.show import print_table

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
"""Typer settings of both programs (`gengram` and `gengram-data`); their commands inherit them."""

ConfigFile = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="The YAML config file.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings that override the file's, such as optimizer.lr=3e-4.",
        show_default=False,
    ),
]


def print_keys(schema: type[BaseModel], names: list[str], as_json: bool = False) -> None:
    """Lists the keys of a schema as a table, or as JSON.

    Args:
        names: keys, or sections, all of whose keys are listed; an empty list means every key.

    Raises UserError with one line for each name that the schema does not have.
    """
    keys = _chosen(Keys(schema), names)
    if as_json:
        print(json.dumps([_as_json(key) for key in keys], indent=1))
        return
    from rich.table import Table

    table = Table()
    table.add_column("key", no_wrap=True)
    for heading in ("may be", "default", "meaning"):
        table.add_column(heading)
    section = None
    for key in keys:
        if section not in (None, key.name.split(".")[0]):
            table.add_section()
        section = key.name.split(".")[0]
        default = "(required)" if key.required else inline_yaml(key.default)
        table.add_row(key.name, key.allowed, default, key.description)
    print_table(table)


def _chosen(keys: Keys, names: list[str]) -> list[Key]:
    if not names:
        return keys.with_entries()
    matches = {name: keys.named(name) for name in names}
    problems = [
        f"{COMMAND_LINE}: there is no key {name}; {keys.suggestion(tuple(name.split('.')))}"
        for name in names
        if not matches[name]
    ]
    if problems:
        raise UserError("\n".join(problems))
    return list({key.name: key for matching in matches.values() for key in matching}.values())


def _as_json(key: Key) -> dict[str, Any]:
    return {
        "key": key.name,
        "allowed": key.allowed,
        "required": key.required,
        "default": key.default,
        "description": key.description,
    }
