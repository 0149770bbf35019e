"""Errors that the user can fix, which are shown as sentences and never as tracebacks."""

import errno
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress

EXIT_CODE = 2
"""Exit code of a command that ended with a UserError, or could not use a file."""
NOT_FINITE = 3
"""Exit code of a run that ended with a loss or gradient that is not finite."""
READER_GONE = 141
"""Exit code of a command whose output is no longer read, as in `gengram config --keys | head`. It
is the code that shells give for a program that was ended by SIGPIPE."""
PREFIX = "gengram: "
"""Prefix of each line of an error message."""

_REASONS = {
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "a part of its path is a file, but must be a folder",
    errno.EISDIR: "it is a folder, but must be a file",
    errno.EEXIST: "it already exists",
    errno.ENOTEMPTY: "it is a folder that is not empty",
    errno.EACCES: "permission denied; change its permissions, or name another",
    errno.EPERM: "permission denied; change its permissions, or name another",
    errno.EROFS: "its file system is read-only; name another place",
    errno.ENOSPC: "the disk is full; make room, or name another place",
    errno.EDQUOT: "this user's disk quota is used up; make room, or name another place",
    errno.EFBIG: "it would be larger than files may be here",
    errno.EIO: "the disk, or whatever is behind the file, failed",
    errno.ESTALE: "the network file system has lost it; try again",
}
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
"""Reasons for which reading and writing fail with errors that do not name the file."""


class UserError(Exception):
    """An error that the user can fix: a key, a file, a layout. The message is a sentence, or
    several lines of one each, that says what is wrong and what to change. Commands print it and
    exit with exit_code."""

    exit_code = EXIT_CODE


class NotFinite(UserError):
    """A loss or gradient is not finite, so training cannot continue."""

    exit_code = NOT_FINITE


class RankError(UserError):
    """An error whose reason only one rank knows, such as the death of one of its worker processes.
    That rank prints it, even where otherwise only the first rank of each machine prints errors."""


def print_message(problem: object) -> None:
    """Prints an error message to stderr."""
    with suppress(OSError):  # stderr is closed, or its disk is full
        for line in str(problem).splitlines():
            print(f"{PREFIX}{line}", file=sys.stderr, flush=True)


def run_program(program: Callable[[], object]) -> None:
    """Runs a command-line program to its end, and exits with its code.

    Errors that the user can fix end it with a sentence: a UserError; an OSError that names a file,
    or is about a disk (full, read-only, failing); and output that cannot be written. Any other
    exception, including OSErrors that are the program's fault, keeps its traceback.
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
    """Runs a program, and returns its exit code."""
    try:
        program()
    except SystemExit as end:
        # typer and rich exit with 1 if the reader is gone; rich has replaced stdout by then.
        return READER_GONE if isinstance(end.__context__, BrokenPipeError) else end.code
    except UserError as error:
        print_message(error)
        return error.exit_code
    except OSError as error:
        if (sentence := explain(error)) is None:
            raise
        if not _stdout_fails():  # if it does, run_program reports that
            print_message(sentence)
        return EXIT_CODE
    return 0


def explain(error: OSError) -> str | None:
    """Returns a sentence for an error of the operating system that the user can fix; None if the
    user cannot fix it."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if _is_name(name)]
    if names:
        return f"{' -> '.join(names)} cannot be used: {_reason(error)}"
    if error.errno in _DISK_ERRORS:
        return f"the output, or a file, could not be written or read: {_reason(error)}"
    return None


def _is_name(name: object) -> bool:
    return isinstance(name, str | bytes) and bool(name)


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0) or error.strerror or str(error)


def _reader_is_gone() -> bool:
    """Returns whether stdout or stderr is a pipe without a reader."""
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
    """Writes the buffered output. Returns the error if that fails, otherwise None."""
    if (output := sys.__stdout__) is None:
        return None
    try:
        output.flush()
    except OSError as error:
        # The rest is discarded, because the interpreter would try to write it again at exit.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, output.fileno())
        os.close(devnull)
        return error
    return None
