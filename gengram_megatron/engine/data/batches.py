"""Turns samples into the microbatches of one data-parallel rank, and a microbatch into inputs,
labels and loss mask."""

import math
import mmap
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from gengram_megatron.engine.data.samples import Order, Samples
from gengram_megatron.errors import RankError, UserError
from gengram_megatron.signals import ignore_stop_signals
from gengram_megatron.tokenizer import EOD

STEPS_AHEAD = 2
"""Number of steps that each reading process reads ahead of the training process."""
SIGNAL_SECONDS = 5.0
"""Time for the signal that a reading process has died to arrive."""


class BatchStream:
    """The samples of one data-parallel rank, step by step: an iterator of tokens
    [microbatches, micro_batch_size, seq_length + 1], uint8, on the CPU (pinned if CUDA is
    available).

    A step takes the next `global_batch_size` positions of the run, in every layout. They are
    assigned in rows of `micro_batch_size`, to one rank after the other, then to the next
    microbatch. So a run can resume where it stopped, in any layout, from the number of samples it
    has consumed.

    Each process that reads ahead hands over a rank's whole step at once and stays STEPS_AHEAD steps
    ahead: a hand-over costs the training process about a millisecond, however small it is. The
    processes start with the first step and must be ended with `close`.

    Args:
        dataset: uint8 arrays of seq_length + 1 tokens.
        order: determines which sample is at each position.
        consumed: position of the first sample, counted from the start of the run.
        total: position at which the samples end; None: never. If the last step goes beyond it, it
            is padded with rows of EOD, which the loss mask excludes, so that every sample counts
            once and all ranks get the same number of microbatches.
        global_batch_size: samples per step, over all ranks.
        micro_batch_size: samples per microbatch of one rank.
        data_rank, data_size: this rank's index among the data-parallel ranks, and their number.
        workers: number of processes that read ahead; 0: read in this process.
    """

    def __init__(
        self,
        dataset: Samples,
        order: Order,
        *,
        consumed: int,
        total: int | None,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        workers: int,
    ):
        if global_batch_size % (micro_batch_size * data_size):
            raise ValueError(
                f"a global batch of {global_batch_size} cannot be split over {data_size} ranks "
                f"in microbatches of {micro_batch_size}"
            )
        offsets = np.arange(global_batch_size).reshape(-1, data_size, micro_batch_size)
        self._loader: DataLoader[_StepTokens] = DataLoader(
            _Reader(dataset, order, total),
            batch_size=None,  # the reader returns whole steps
            sampler=_positions(consumed, total, global_batch_size, offsets[:, data_rank]),
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=STEPS_AHEAD if workers else None,
            pin_memory=torch.cuda.is_available(),
            # Without its own generator the loader draws from torch's global one, and the random
            # numbers of a resumed run would differ from those of an uninterrupted run.
            generator=torch.Generator(),
            worker_init_fn=ignore_stop_signals,
        )
        self._steps: Iterator[_StepTokens] | None = None
        self._seconds_waited = 0.0

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> torch.Tensor:
        began = time.perf_counter()
        if self._steps is None:
            self._steps = _started(self._loader)
        step = torch.as_tensor(next(self._steps).tokens)
        self._seconds_waited += time.perf_counter() - began
        return step

    def pop_seconds_waited(self) -> float:
        """Returns the seconds that this rank has waited for samples since the last call."""
        seconds, self._seconds_waited = self._seconds_waited, 0.0
        return seconds

    def close(self) -> None:
        """Ends the processes that read ahead. This process would never exit otherwise after an
        error: the traceback keeps the iterator alive, and with it the reading processes, which
        ignore the signal that Python sends them at exit. There is no public method for this."""
        if isinstance(self._steps, _MultiProcessingDataLoaderIter):
            self._steps._shutdown_workers()


def split_batch(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits a microbatch into inputs, labels and loss mask.

    The mask is 0 where the label is EOD. A fragment ends where the assembly was cut, which no
    model can know and which is not a property of DNA; the loss is in nats per base, and EOD is not
    a base. N counts: it is a letter of the alphabet. (The code published with the paper counts EOD
    too, one label in 8,192.)

    Args:
        tokens: [b, s + 1], uint8.

    Returns:
        inputs [b, s] int64, labels [b, s] int64 (shifted by one), mask [b, s] float32.
    """
    inputs, labels = tokens[:, :-1].long(), tokens[:, 1:].long()
    return inputs, labels, (labels != EOD).float()


def _started(loader: "DataLoader[_StepTokens]") -> "Iterator[_StepTokens]":
    """Starts the loader's processes and returns an iterator over its steps. Raises UserError if
    they cannot be started."""
    workers = loader.num_workers
    try:
        # Try as many queues as the loader creates: if it fails to create one itself, it is left
        # half-initialized and prints a traceback when it is deleted.
        queues: list[object] = (
            [multiprocessing.Queue() for _ in range(workers + 1)] if workers else []
        )
        del queues
        return iter(loader)
    except OSError as error:
        raise UserError(
            f"data.workers is {workers}, but processes that read samples cannot be started "
            f"({error}): make room for them in /dev/shm and TMPDIR, or set data.workers to 0"
        ) from None


@contextmanager
def reporting_dead_workers(rank: int) -> Iterator[None]:
    """Turns the loader's error about a process that was killed or exited into a RankError. The
    loader notices within seconds and raises the error wherever the main thread is."""
    try:
        yield
    except RuntimeError as error:
        reason = _why_worker_died(error)
        if reason is None:
            raise
        raise RankError(
            f"rank {rank}: a process that reads samples (data.workers) died: "
            f"{reason.rstrip('. ')}; the same command resumes from the last checkpoint, and with "
            "data.workers=0 samples are read without such processes"
        ) from error


def _why_worker_died(error: BaseException | None) -> str | None:
    """Returns the first cause among the loader's errors, such as the signal that killed a process;
    None if the loader has not raised this error."""
    reason = None
    while error is not None:
        line = next(iter(str(error).splitlines()), "")
        reason = line if line.startswith("DataLoader worker") else reason
        error = error.__cause__ or error.__context__
    return reason


class _StepTokens:
    """The tokens of a rank's step, handed over by the process that read them.

    They are in an in-memory file (memfd) created by the reading process, and the training process
    maps the same file. torch would hand a tensor over through a file in /dev/shm and a socket in
    TMPDIR. If /dev/shm is full or the socket's path too long, a thread of the reading process
    prints a traceback and continues, and the training process waits for a batch that never comes.

    Args:
        tokens: [microbatches, micro_batch_size, seq_length + 1], uint8.
        file: the file that the tokens are mapped from; None if they are not handed over.
    """

    def __init__(self, tokens: np.ndarray, file: BinaryIO | None = None):
        self.tokens: np.ndarray | torch.Tensor = tokens
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        assert self._file is not None  # it was read by a reading process
        path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        return _open_step, (path, self.tokens.shape)

    def pin_memory(self) -> "_StepTokens":
        """Pins the tokens. The loader calls this, in a thread, if CUDA is available."""
        self.tokens = torch.from_numpy(self.tokens).pin_memory()
        return self


def _open_step(path: str, shape: tuple[int, ...]) -> _StepTokens:
    """Maps the file of a step. Raises RuntimeError, as the loader does, if the process that
    created it has died."""
    try:
        with open(path, "r+b") as file:
            return _StepTokens(_mapped(file, shape))
    except (FileNotFoundError, PermissionError, ProcessLookupError):  # whatever is left in /proc
        # Its process was killed just now. The loader raises the reason from a signal handler as
        # soon as the signal arrives, which interrupts this.
        time.sleep(SIGNAL_SECONDS)
        raise RuntimeError(f"DataLoader worker ended, and with it the samples in {path}") from None


def _mapped(file: BinaryIO, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.uint8).reshape(shape)


class _Reader(Dataset[_StepTokens]):
    """The loader's dataset: reads whole steps of a rank by position."""

    def __init__(self, dataset: Samples, order: Order, total: int | None):
        self._dataset = dataset
        self._order = order
        self._total = total
        # The training process opens a file through this process, which must keep it open until
        # then: it may read this many more steps in the meantime.
        self._handed_over: deque[BinaryIO] = deque(maxlen=STEPS_AHEAD + 1)

    def __getitem__(self, positions: np.ndarray) -> _StepTokens:
        """Returns tokens [microbatches, micro_batch_size, seq_length + 1] for positions
        [microbatches, micro_batch_size]."""
        tokens, file = self._empty((*positions.shape, len(self._dataset[0])))
        real = np.full(positions.shape, True) if self._total is None else positions < self._total
        rows = tokens.reshape(positions.size, -1)
        rows[:] = EOD
        for row, sample in zip(np.flatnonzero(real), self._order.samples_at(positions[real])):
            rows[row] = self._dataset[sample]
        return _StepTokens(tokens, file)

    def _empty(self, shape: tuple[int, ...]) -> tuple[np.ndarray, BinaryIO | None]:
        """Returns an array for a step's tokens, and the file that it is mapped from, or None if the
        step is not handed over."""
        if get_worker_info() is None:
            return np.empty(shape, dtype=np.uint8), None
        file = os.fdopen(os.memfd_create("step"), "r+b")
        file.truncate(math.prod(shape))
        self._handed_over.append(file)
        return _mapped(file, shape), file


def _positions(
    start: int, total: int | None, global_batch_size: int, offsets: np.ndarray
) -> Iterator[np.ndarray]:
    """Yields the positions [microbatches, micro_batch_size] of each step.

    offsets: the positions within a step, in the same shape.
    """
    while total is None or start < total:
        yield start + offsets
        start += global_batch_size


def _as_is(step: object) -> object:
    return step
