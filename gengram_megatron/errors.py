"""The one error that a person can mend, shown as a sentence and never as a traceback."""

EXIT_CODE = 2
"""Exit code of a command that ended with a UserError."""


class UserError(Exception):
    """Something the user can put right: a key, a file, a layout. The message is one sentence
    that says what was found and what to change; command lines print it and exit with EXIT_CODE."""
