"""What every command that reads a config file takes on its command line."""

from pathlib import Path
from typing import Annotated

import typer

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
"""Settings of both programs, which their commands inherit."""

ConfigFile = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="The YAML file, as shown above.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings that win over the file's, such as optimizer.lr=3e-4 of a run, or seed=1 of a "
        "data set.",
        show_default=False,
    ),
]
