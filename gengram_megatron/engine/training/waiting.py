"""How long a run waits for its samples."""

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


class Waiting:
    """Passes microbatches on and measures how long each was waited for."""

    def __init__(self, batches: Iterator[Tensor]):
        self._batches = batches
        self._seconds = 0.0

    def __iter__(self) -> "Waiting":
        return self

    def __next__(self) -> Tensor:
        began = time.perf_counter()
        batch = next(self._batches)
        self._seconds += time.perf_counter() - began
        return batch

    def take(self) -> float:
        """Seconds waited since the last call on the rank that waited longest, for which all
        others wait in turn. Called by all ranks."""
        slowest = torch.tensor(
            self._seconds, dtype=torch.float64, device=torch.cuda.current_device()
        )
        self._seconds = 0.0
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest.item()
