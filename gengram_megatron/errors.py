"""The one error that a person can mend, shown as sentences and never as a traceback."""

import sys

EXIT_CODE = 2
"""Exit code of a command that ended with a UserError."""
PREFIX = "gengram: "
"""How each line begins that tells what went wrong."""


class UserError(Exception):
    """Something the user can put right: a key, a file, a layout. The message is one sentence
    that says what was found and what to change; command lines tell it and exit with EXIT_CODE."""


def tell(problem: object) -> None:
    """Show on stderr what went wrong."""
    for line in str(problem).splitlines():
        print(f"{PREFIX}{line}", file=sys.stderr, flush=True)
