"""From samples to the microbatches of one data-parallel rank, and from a microbatch to labels."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader

from gengram_megatron.data.order import Order
from gengram_megatron.signals import ignore_stop_signals
from gengram_megatron.tokenizer import EOD


def microbatches(
    dataset: Sequence[np.ndarray],
    order: Order,
    *,
    consumed: int,
    total: int | None,
    global_batch_size: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    workers: int,
) -> Iterator[torch.Tensor]:
    """The microbatches that one data-parallel rank trains on, step after step.

    A step takes the next `global_batch_size` positions of the run, in every layout; they are dealt
    out in rows of `micro_batch_size`, to the ranks in turn, then to the next microbatch. So a run
    goes on where it was cut, on any layout, by passing the samples it has consumed.

    Args:
        dataset: uint8 arrays of seq_length + 1 tokens.
        order: which sample stands at each position.
        consumed: position of the first sample, counted from the start of the run.
        total: position at which the samples end; None: never. A last step that reaches beyond
            it is filled up with rows of EOD, which the loss mask leaves out, so that every sample
            counts once and all ranks see the same number of microbatches.
        global_batch_size: samples a step, over all ranks.
        micro_batch_size: samples a microbatch of one rank.
        data_rank, data_size: this rank's place among the data-parallel ranks, and their number.
        workers: background processes that read ahead; 0: read here.

    Yields:
        Tokens [micro_batch_size, seq_length + 1], uint8, on the CPU (pinned where there is CUDA).
    """
    if global_batch_size % (micro_batch_size * data_size):
        raise ValueError(
            f"a global batch of {global_batch_size} cannot be dealt out to {data_size} ranks in "
            f"microbatches of {micro_batch_size}"
        )
    offsets = np.arange(global_batch_size).reshape(-1, data_size, micro_batch_size)[:, data_rank]
    loader = DataLoader(
        _Reader(dataset, order, total),
        batch_sampler=_positions(consumed, total, global_batch_size, offsets),
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # Without one of its own the loader draws from torch's global generator, and the random
        # numbers of a resumed run would no longer be those of one that was never cut.
        generator=torch.Generator(),
        worker_init_fn=ignore_stop_signals,
    )
    return iter(loader)


def split_batch(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, labels and loss mask of a microbatch.

    The mask is 0 where the label is EOD. A fragment ends where the assembly was cut, which no
    model can know and which is no property of DNA; the loss is nats a base, and EOD is none.
    N counts: it is a letter of the alphabet. (The code published with the paper counts EOD too,
    one label in 8,192.)

    Args:
        tokens: [b, s + 1], uint8.

    Returns:
        inputs [b, s] int64, labels [b, s] int64 (one place to the right), mask [b, s] float32.
    """
    inputs, labels = tokens[:, :-1].long(), tokens[:, 1:].long()
    return inputs, labels, (labels != EOD).float()


class _Reader:
    """Reads whole microbatches by position; what the loader's processes hold."""

    def __init__(self, dataset: Sequence[np.ndarray], order: Order, total: int | None):
        self._dataset = dataset
        self._order = order
        self._total = total

    def __getitems__(self, positions: np.ndarray) -> torch.Tensor:
        """Tokens [len(positions), seq_length + 1] uint8."""
        there = positions if self._total is None else positions[positions < self._total]
        tokens = np.full((len(positions), len(self._dataset[0])), EOD, dtype=np.uint8)
        for row, sample in enumerate(self._order.take(there)):
            tokens[row] = self._dataset[sample]
        return torch.from_numpy(tokens)


def _positions(
    start: int, total: int | None, global_batch_size: int, offsets: np.ndarray
) -> Iterator[np.ndarray]:
    """The positions [micro_batch_size] of each microbatch; offsets [microbatches, micro]."""
    while total is None or start < total:
        yield from start + offsets
        start += global_batch_size


def _as_is(microbatch: torch.Tensor) -> torch.Tensor:
    return microbatch
