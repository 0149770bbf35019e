"""Writes one rank's files of a checkpoint in a separate process, while training continues.

The process is forked, so it sees the tensors as they were; tensors on GPUs are copied to the host
first. It computes the checksums of what it wrote, and returns them through an in-memory file
(memfd).
"""

import gc
import multiprocessing
import os
import pickle
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from gengram_megatron.files import checksum
from gengram_megatron.signals import ignore_stop_signals

POLL_SECONDS = 0.05


class MemfdQueue:
    """A queue of results from a writer to the process that forked it: pickles in an in-memory file.

    It replaces megatron-core's queue (with put and get_nowait), which needs a separate process that
    takes seconds to start and outlives a trainer that is killed.
    """

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("answers"), "w+b")
        self._read_offset = 0

    def put(self, result: object) -> None:
        """Adds a result. The writer calls this."""
        pickle.dump(result, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Returns the next result. This is called when the writer has ended."""
        self._file.seek(self._read_offset)
        try:
            result = pickle.load(self._file)
        except EOFError:
            raise queue.Empty from None
        self._read_offset = self._file.tell()
        return result


class Writer:
    """The process that writes one rank's files of one checkpoint.

    It is created before megatron-core plans the save; start() is called with the plan.
    """

    def __init__(self) -> None:
        self._results = MemfdQueue()
        filesystem_async._results_queue = self._results  # megatron-core reads it while planning
        self._process: BaseProcess | None = None

    def start(self, request: AsyncRequest) -> None:
        """Copies the tensors to the host and starts writing them. Returns after the copy."""
        self._finalize: list[Callable[[], None]] = request.finalize_fns
        if request.async_fn is None:  # this rank has nothing to write
            return
        rank, buckets, results = request.async_fn_args
        if request.preload_fn is not None:
            buckets = request.preload_fn()
        torch.cuda.synchronize()
        files = [Path(path) for path, *_ in buckets]
        write = partial(request.async_fn, rank, buckets, results)
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_write, args=(write, files, results, os.getpid()))
        # Tensors on the GPU belong to this process: the forked one must not garbage-collect them.
        gc.disable()
        try:
            self._process.start()
        finally:
            gc.enable()

    @property
    def running(self) -> bool:
        """Whether the process is still writing."""
        return self._process is not None and self._process.is_alive()

    @property
    def died(self) -> bool:
        """Whether the process ended without having written everything."""
        return self._process is not None and self._process.exitcode not in (None, 0)

    def join(self) -> None:
        """Waits until the process has ended."""
        if self._process is not None:
            self._process.join()

    def finalize(self) -> dict[str, str]:
        """Lets megatron-core write the metadata. All ranks call this. Returns the checksums of this
        rank's files, by name.

        Raises CheckpointException, on all ranks, if one of them could not write.
        """
        for finalize in self._finalize:
            finalize()
        checksums: dict[str, str] = {} if self._process is None else self._results.get_nowait()
        return checksums

    def abandon(self) -> None:
        """Kills the process, whatever it has written so far."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _write(
    write: Callable[[], object], files: list[Path], results: MemfdQueue, trainer: int
) -> None:
    """Runs in the forked process: writes the files, then reads them back for the checksums."""
    gc.disable()
    ignore_stop_signals()  # the trainer handles them, and waits for this process
    watched = (trainer, _track_started_processes())
    threading.Thread(target=_exit_with_trainer_or_helper, args=watched, daemon=True).start()
    write()
    results.put({path.name: checksum(path) for path in files if path.exists()})


def _track_started_processes() -> list[BaseProcess]:
    """Returns a list to which every process is added that this process starts from now on.

    multiprocessing.active_children() would miss one that was killed right after its start: it
    forgets processes that have ended.
    """
    started: list[BaseProcess] = []
    start = BaseProcess.start

    def start_and_record(process: BaseProcess) -> None:
        start(process)
        started.append(process)

    # Replacing the method of all processes is the purpose.
    BaseProcess.start = start_and_record  # type: ignore[assignment, method-assign]
    return started


def _exit_with_trainer_or_helper(trainer: int, helpers: list[BaseProcess]) -> None:
    """Exits this process when the trainer is gone, or when one of the helper processes with which
    megatron-core writes the files was killed: this process would wait for it forever."""
    while os.getppid() == trainer:
        if any(helper.exitcode not in (None, 0) for helper in list(helpers)):
            break
        time.sleep(POLL_SECONDS)
    os._exit(1)
