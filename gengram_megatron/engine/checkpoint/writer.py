"""Writes one rank's files of a checkpoint in a process of its own, while training goes on.

The process is forked, so it sees the tensors as they were; on GPUs they are copied to the host
first. It computes the checksums of what it wrote, and answers through a file in memory.
"""

import gc
import multiprocessing
import os
import pickle
import queue
import threading
import time
from functools import partial
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from gengram_megatron.files import checksum
from gengram_megatron.signals import ignore_stop_signals

LOOK_SECONDS = 0.05


class MemfdQueue:
    """What a writer tells the process that forked it: pickles in a file in memory.

    It takes the place of megatron-core's queue (with put and get_nowait), which lives in a process
    of its own: that one takes seconds to start, and outlives a trainer that is killed.
    """

    def __init__(self):
        self._file = os.fdopen(os.memfd_create("answers"), "w+b")
        self._read_from = 0

    def put(self, answer: object) -> None:
        pickle.dump(answer, self._file)
        self._file.flush()

    def get_nowait(self):
        """The next answer. Called when the writer has ended."""
        self._file.seek(self._read_from)
        try:
            answer = pickle.load(self._file)
        except EOFError:
            raise queue.Empty from None
        self._read_from = self._file.tell()
        return answer


class Writer:
    """The process that writes one rank's files of one checkpoint.

    Made before megatron-core plans the save; start() is called with what it planned.
    """

    def __init__(self):
        self._answers = MemfdQueue()
        filesystem_async._results_queue = self._answers  # read while the save is planned
        self._process = None

    def start(self, request: AsyncRequest) -> None:
        """Copy the tensors to the host, and write from there. Returns after the copy."""
        self._finalize = request.finalize_fns
        if request.async_fn is None:  # nothing of the checkpoint lies on this rank
            return
        rank, buckets, answers = request.async_fn_args
        if request.preload_fn is not None:
            buckets = request.preload_fn()
        torch.cuda.synchronize()
        files = [Path(path) for path, *_ in buckets]
        write = partial(request.async_fn, rank, buckets, answers)
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_write, args=(write, files, answers, os.getpid()))
        # Tensors on the GPU belong to this process: the other must not collect any.
        gc.disable()
        try:
            self._process.start()
        finally:
            gc.enable()

    @property
    def at_work(self) -> bool:
        return self._process is not None and self._process.is_alive()

    @property
    def died(self) -> bool:
        """Ended without having written everything."""
        return self._process is not None and self._process.exitcode not in (None, 0)

    def join(self) -> None:
        if self._process is not None:
            self._process.join()

    def finalize(self) -> dict[str, str]:
        """Have megatron-core describe the files, together with all ranks; this rank's checksums.

        Raises CheckpointException, on all ranks, if one of them could not write.
        """
        for finalize in self._finalize:
            finalize()
        return {} if self._process is None else self._answers.get_nowait()

    def abandon(self) -> None:
        """End the process, whatever it has written."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _write(write: partial, files: list[Path], answers: MemfdQueue, trainer: int) -> None:
    """What the process does: write, then read back for the checksums."""
    gc.disable()
    ignore_stop_signals()  # the trainer heeds them, and waits for what is written here
    family = (trainer, _processes_from_now_on())
    threading.Thread(target=_end_with_family, args=family, daemon=True).start()
    write()
    answers.put({path.name: checksum(path) for path in files if path.exists()})


def _processes_from_now_on() -> list[multiprocessing.process.BaseProcess]:
    """A list that every process is added to as this one starts it.

    multiprocessing.active_children() would miss one that was killed right after its start: it
    forgets those that have ended.
    """
    started, start = [], multiprocessing.process.BaseProcess.start

    def start_and_remember(process) -> None:
        start(process)
        started.append(process)

    multiprocessing.process.BaseProcess.start = start_and_remember
    return started


def _end_with_family(trainer: int, helpers: list) -> None:
    """End this process when the trainer is gone, or when one of the processes that megatron-core
    writes each file with was killed: it would wait for that one for ever."""
    while os.getppid() == trainer:
        if any(helper.exitcode not in (None, 0) for helper in list(helpers)):
            break
        time.sleep(LOOK_SECONDS)
    os._exit(1)
