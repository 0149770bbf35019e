"""The command `gengram config`: prints the whole config of a run, or what its keys mean."""

from pathlib import Path
from typing import Annotated

import typer

from gengram_megatron.config.command_line import Overrides, print_keys
from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.load import dump_config, load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError


def config(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="The YAML file of a run.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    keys: Annotated[
        bool,
        typer.Option(
            "--keys",
            help="List all keys with allowed values, defaults and meanings, or only the keys named "
            "in place of CONFIG.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print --keys as JSON.")] = False,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Also check that the run works on this number of processes."),
    ] = None,
) -> None:
    """Print the whole config of a run, or what its keys mean.

    Merges files, overrides and defaults. The output is itself a config file that gives the same
    run.

    \b
      gengram config configs/smoke/cpu.yaml optimizer.lr=3e-4
      gengram config configs/smoke/cpu.yaml --nproc 4
      gengram config --keys
      gengram config --keys optimizer.lr model.gengram
    """
    if keys:
        print_keys(Config, [*filter(None, [config]), *(overrides or [])], as_json)
        return
    if config is None:
        raise UserError("CONFIG is missing: name the config file to print, or give --keys")
    loaded = load_config(Path(config), overrides or [], Config)
    if nproc is not None:
        check_layout(loaded, nproc)
    print(dump_config(loaded), end="")
