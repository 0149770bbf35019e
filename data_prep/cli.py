"""The command `gengram-data`."""

import sys
from importlib import import_module

import typer

from gengram_megatron.config.arguments import HELP_OPTIONS
from gengram_megatron.errors import run_program

COMMANDS = {
    "download": "data_prep.download.command",
    "build": "data_prep.build_command",
    "inspect": "data_prep.inspect.command",
    "verify": "data_prep.verify.command",
}
"""The module of each command, which has a function of its name."""


def commands() -> None:
    """Turn genomes into data sets for pretraining."""


def program(words: list[str]) -> typer.Typer:
    """The commands; only one, if the command line begins with it, as to import all takes as long as
    100 Mbp."""
    app = typer.Typer(
        context_settings=HELP_OPTIONS,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(commands)
    for name in words[:1] if words and words[0] in COMMANDS else COMMANDS:
        app.command()(getattr(import_module(COMMANDS[name]), name))
    return app


def main() -> None:
    """Run the command; an error that the user can mend is a sentence and exit code 2."""
    run_program(program(sys.argv[1:]))
