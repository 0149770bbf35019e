"""The one error that a person can mend, shown as sentences and never as a traceback."""

import sys

EXIT_CODE = 2
"""Exit code of a command that ended with a UserError."""
NOT_FINITE = 3
"""Exit code of a run that ended in a loss or gradient that is not finite."""
PREFIX = "gengram: "
"""How each line begins that tells what went wrong."""


class UserError(Exception):
    """Something the user can put right: a key, a file, a layout. The message is one sentence
    that says what was found and what to change; command lines tell it and exit with exit_code."""

    exit_code = EXIT_CODE


class NotFinite(UserError):
    """A loss or gradient that is not finite, with which training cannot go on."""

    exit_code = NOT_FINITE


def tell(problem: object) -> None:
    """Show on stderr what went wrong."""
    for line in str(problem).splitlines():
        print(f"{PREFIX}{line}", file=sys.stderr, flush=True)
