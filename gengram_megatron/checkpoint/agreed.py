"""Loading a checkpoint on all ranks, and what an error on one of them means for all.

An error in reading says that the checkpoint is of no use, whatever it is: the one before may be.
Three kinds of error say nothing of the checkpoint, and end the run: a UserError, which is about the
config; want of memory or of file handles; and a device or a connection that failed.
"""

import errno
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from gengram_megatron.checkpoint.store import UnreadableCheckpoint
from gengram_megatron.errors import UserError
from gengram_megatron.training.processes import gather

Result = TypeVar("Result")
OF_THE_MACHINE = (
    MemoryError,
    torch.OutOfMemoryError,
    torch.AcceleratorError,
    dist.DistError,
)
NO_RESOURCES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


class CannotLoad(Exception):
    """A checkpoint that no rank can use, because it could not be read on one of them."""


def on_all_ranks(action: Callable[[], Result]) -> Result:
    """Do something on every rank, and raise an error on every rank if it fails on any.

    That is CannotLoad where the error is the checkpoint's. Any other goes on as it is on the ranks
    that have it, and is told as a UserError on those that do not.
    """
    result = error = None
    try:
        result = action()
    except (Exception, CheckpointException) as caught:
        error = caught
    causes = {} if error is None else _causes(error)
    failures: dict[int, tuple[bool, str]] = {}
    for own in gather({rank: _described(cause) for rank, cause in causes.items()}):
        failures |= own
    if any(map(_is_of_something_else, causes.values())):
        raise error
    for of_something_else, words in failures.values():
        if of_something_else:
            raise UserError(words)
    if failures:
        rank, (_, words) = min(failures.items())
        others = " and others" if len(failures) > 1 else ""
        raise CannotLoad(f"{words}, on rank {rank}{others}")
    return result


def _causes(error: BaseException) -> dict[int, BaseException]:
    """The errors by rank that torch has collected from all of them, or this rank's own."""
    if isinstance(error, CheckpointException) and error.failures:
        return {rank: cause for rank, (cause, _) in error.failures.items()}
    return {dist.get_rank(): error}


def _is_of_something_else(error: BaseException) -> bool:
    if isinstance(error, UserError):
        return not isinstance(error, UnreadableCheckpoint)
    if not isinstance(error, Exception | CheckpointException):
        return True  # torch collects requests to stop as well
    if isinstance(error, OSError):
        return error.errno in NO_RESOURCES
    return isinstance(error, OF_THE_MACHINE) or CPU_ALLOCATOR in str(error)


def _described(error: BaseException) -> tuple[bool, str]:
    """Whether an error says nothing of the checkpoint, and the error in one sentence."""
    if isinstance(error, UserError):
        words = str(error)
    else:  # torch goes on with advice to programmers
        what = str(error).partition("\n")[0].partition(". ")[0]
        words = f"{type(error).__name__}: {what}" if what else type(error).__name__
    return _is_of_something_else(error), words
