"""The command `gengram`.

torch and megatron-core are imported only by the commands that compute, so that help, configs
and error messages appear immediately.
"""

from functools import partial
from typing import Annotated

import typer

from gengram_megatron import __version__
from gengram_megatron.commands import checkpoint
from gengram_megatron.commands.config import config
from gengram_megatron.commands.doctor.command import doctor
from gengram_megatron.commands.init import init
from gengram_megatron.commands.launch import launch
from gengram_megatron.commands.plan import plan
from gengram_megatron.commands.sweep import sweep
from gengram_megatron.commands.train import train
from gengram_megatron.config.command_line import HELP_OPTIONS
from gengram_megatron.errors import run_program

app = typer.Typer(
    name="gengram",
    help="Pretraining of genomic language models with Gengram memory, on megatron-core.",
    no_args_is_help=True,
    context_settings=HELP_OPTIONS,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(checkpoint.app, name="checkpoint")


def main(own_log: bool = False) -> None:
    """Runs the command line. Errors that the user can fix are shown as sentences, never as
    tracebacks.

    Args:
        own_log: whether this process has its output to itself, so that no other process of the
            run writes to the same terminal or file.
    """
    run_program(partial(app, obj=own_log))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gengram {__version__}")
        raise typer.Exit


@app.callback()
def _gengram(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


for command in (train, config, init, doctor, launch, plan, sweep):
    app.command()(command)
