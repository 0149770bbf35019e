"""The command `gengram doctor`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from gengram_megatron.config.arguments import Overrides
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.doctor.examine import examine
from gengram_megatron.doctor.show import show

CANNOT_RUN = 1
"""Exit code where a config is in order, and this machine is not in order for it."""


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="The YAML file of a run; none: only the machine.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="In three seconds, without torch: no parts of the model, no speeds; GPUs as "
            "nvidia-smi lists them.",
        ),
    ] = False,
    no_speeds: Annotated[bool, typer.Option("--no-speeds", help="Measure nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what a machine has, and how a config would run on it.

    Versions, GPUs and their links; for each part of the model the implementation that it gets here,
    read off a small model of the same kind that is built and makes a step, and why not a faster
    one; whether memory and disk suffice; the speed of a matrix product, an all-reduce of two
    processes, and the file system of run.dir; and what is missing to be faster.

    \b
      gengram doctor
      gengram doctor configs/smoke/cpu.yaml
      gengram doctor my_run.yaml launch.processes=8 --quick

    The exit code is 1 if the config cannot run here; the last lines say why.
    """
    loaded = load_config(config, overrides or [], Config) if config else None
    found = examine(loaded, quick, speeds=not no_speeds)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    if found["problems"]:
        raise typer.Exit(CANNOT_RUN)
