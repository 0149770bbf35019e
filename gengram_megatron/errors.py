"""Errors that a person can mend, shown as sentences and never as tracebacks."""

import errno
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress

EXIT_CODE = 2
"""Exit code of a command that ended with a UserError, or could not use a file."""
NOT_FINITE = 3
"""Exit code of a run that ended in a loss or gradient that is not finite."""
READER_GONE = 141
"""Exit code of a command whose output nobody reads any more, as in `gengram config --keys | head`:
what a shell says of a program that SIGPIPE ended."""
PREFIX = "gengram: "
"""How each line begins that tells what went wrong."""

_REASONS = {
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "a part of its path is a file, where a folder must be",
    errno.EISDIR: "it is a folder, where a file must be",
    errno.EEXIST: "it is there already",
    errno.ENOTEMPTY: "it is a folder that holds files",
    errno.EACCES: "this user may not; change its permissions, or name another",
    errno.EPERM: "this user may not; change its permissions, or name another",
    errno.EROFS: "its file system can only be read; name another place",
    errno.ENOSPC: "the disk is full; make room, or name another place",
    errno.EDQUOT: "this user's share of the disk is used up; make room, or name another place",
    errno.EFBIG: "it would be larger than files may be here",
    errno.EIO: "the disk, or whatever is behind the file, failed",
    errno.ESTALE: "the network file system has lost it; try again",
}
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
"""Reasons for which reading and writing fail, which do not say the name of the file."""


class UserError(Exception):
    """Something the user can put right: a key, a file, a layout. The message is one sentence
    that says what was found and what to change; command lines tell it and exit with exit_code."""

    exit_code = EXIT_CODE


class NotFinite(UserError):
    """A loss or gradient that is not finite, with which training cannot go on."""

    exit_code = NOT_FINITE


class RankError(UserError):
    """An error that a single rank knows the reason of, such as a process of its own that died. That
    rank shows it, also where otherwise the first rank of each machine speaks for all."""


def print_message(problem: object) -> None:
    """Show on stderr what went wrong."""
    with suppress(OSError):  # stderr is full or closed: there is nobody to tell
        for line in str(problem).splitlines():
            print(f"{PREFIX}{line}", file=sys.stderr, flush=True)


def run_program(program: Callable[[], object]) -> None:
    """Run a command line program to its end, and exit with its code.

    Ends with a sentence: a UserError; an OSError that names a file, or whose reason is a disk
    (full, read-only, failing), as these are for the user to mend; and output that cannot be
    written. Any other exception, OSErrors of the program's own making among them, keeps its
    traceback.
    """
    try:
        code = _run(program)
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        code = READER_GONE
    if (failure := _flush_output()) is not None:
        if isinstance(failure, BrokenPipeError):
            code = READER_GONE
        else:
            print_message(f"the output could not be written: {_reason(failure)}")
            code = code or EXIT_CODE
    sys.exit(code)


def _run(program: Callable[[], object]) -> int | str | None:
    """The exit code of a program."""
    try:
        program()
    except SystemExit as end:
        # typer and rich exit with 1 where a reader is gone, rich with stdout replaced by then.
        return READER_GONE if isinstance(end.__context__, BrokenPipeError) else end.code
    except UserError as error:
        print_message(error)
        return error.exit_code
    except OSError as error:
        if (sentence := explain(error)) is None:
            raise
        if not _stdout_fails():  # else that is what failed, and run_program says so
            print_message(sentence)
        return EXIT_CODE
    return 0


def explain(error: OSError) -> str | None:
    """What the user can mend of an error of the operating system, as a sentence; None: nothing."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if _is_name(name)]
    if names:
        return f"{' -> '.join(names)} cannot be used: {_reason(error)}"
    if error.errno in _OF_THE_DISK:
        return f"the output, or a file, could not be written or read: {_reason(error)}"
    return None


def _is_name(name: object) -> bool:
    return isinstance(name, str | bytes) and bool(name)


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno) or error.strerror or str(error)


def _reader_is_gone() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _stdout_fails() -> bool:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        return True
    return False


def _flush_output() -> OSError | None:
    """Write what is left of the output; why that failed, if it did."""
    try:
        if sys.__stdout__ is not None:
            sys.__stdout__.flush()
    except OSError as error:
        # What is left goes nowhere, or the interpreter would try again when it ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.__stdout__.fileno())
        os.close(nowhere)
        return error
    return None
