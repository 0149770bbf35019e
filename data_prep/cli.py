"""The command `gengram-data`."""

import sys

import typer

from data_prep.build_command import build
from data_prep.download.command import download
from data_prep.inspect.command import inspect
from data_prep.verify.command import verify
from gengram_megatron.errors import EXIT_CODE, UserError, tell

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


app.command()(download)
app.command()(build)
app.command()(inspect)
app.command()(verify)


@app.callback()
def commands() -> None:
    """Turn genomes into data sets for pretraining."""


def main() -> None:
    """Run the command; an error that the user can mend is a sentence and exit code 2."""
    try:
        app()
    except UserError as error:
        tell(error)
        sys.exit(EXIT_CODE)
