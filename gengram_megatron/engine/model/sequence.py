"""Which tokens a rank holds under context and sequence parallelism, and how it gets the rows to the
left of them from other ranks.

Context parallelism cuts a sequence of s tokens into 2 cp chunks; rank r holds chunks r and
2 cp - 1 - r, concatenated (megatron-core's zigzag). Sequence parallelism then cuts what a context
rank holds into tp equal parts, one for each tensor-parallel rank. So a rank holds one or two ranges
of contiguous tokens. To get the rows to the left of its ranges, every rank sends the last rows of
its own ranges to all ranks (an all-gather) and picks what it needs from the result: a few rows per
rank, never the whole sequence.
"""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TokenRange:
    """Contiguous tokens that one rank holds: positions [start, stop) of the sequence."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def context_ranges(seq_length: int, cp_size: int, cp_rank: int) -> list[TokenRange]:
    """Returns the ranges that a context-parallel rank holds, in the order of its local tokens."""
    if cp_size == 1:
        return [TokenRange(0, seq_length)]
    chunk = seq_length // (2 * cp_size)
    return [
        TokenRange(index * chunk, (index + 1) * chunk)
        for index in (cp_rank, 2 * cp_size - 1 - cp_rank)
    ]


def sequence_ranges(ranges: list[TokenRange], tp_size: int, tp_rank: int) -> list[TokenRange]:
    """Returns the part of `ranges` that tensor-parallel rank tp_rank holds under sequence
    parallelism."""
    length = sum(map(len, ranges)) // tp_size
    first, last = tp_rank * length, (tp_rank + 1) * length
    local_ranges, offset = [], 0
    for token_range in ranges:
        low, high = max(first - offset, 0), min(last - offset, len(token_range))
        if low < high:
            local_ranges.append(TokenRange(token_range.start + low, token_range.start + high))
        offset += len(token_range)
    return local_ranges


def select_ranges(sequence: Tensor, ranges: list[TokenRange], dim: int) -> Tensor:
    """Selects `ranges` along axis `dim` of a whole sequence and concatenates them."""
    if len(ranges) == 1:
        return sequence.narrow(dim, ranges[0].start, len(ranges[0]))
    return torch.cat([sequence.narrow(dim, r.start, len(r)) for r in ranges], dim=dim)


def select_local_tokens(sequences: Tensor) -> Tensor:
    """Selects the tokens that this context-parallel rank holds, along axis 1 of whole sequences
    [b, s]. Returns [b, s / cp]."""
    size = parallel_state.get_context_parallel_world_size()
    rank = parallel_state.get_context_parallel_rank()
    return select_ranges(sequences, context_ranges(sequences.shape[1], size, rank), 1)


def chunks_in_sequence_order(gathered: Tensor, cp_size: int) -> Tensor:
    """Reorders [s, ...], gathered from the context-parallel ranks in rank order, to the order of
    the sequence."""
    chunks = gathered.chunk(2 * cp_size)  # rank 0: chunks 0 and 2cp-1, rank 1: 1 and 2cp-2, ...
    order = [2 * i for i in range(cp_size)] + [2 * i + 1 for i in reversed(range(cp_size))]
    return torch.cat([chunks[i] for i in order])


class Halo:
    """Fetches the `reach` rows to the left of each token range that a rank holds."""

    def __init__(
        self, reach: int, sequence_parallel: bool, tp_group: ProcessGroup, cp_group: ProcessGroup
    ):
        self.reach = reach
        self.cp_size = cp_group.size()
        self.tp_size = tp_group.size() if sequence_parallel else 1
        if self.tp_size > 1:
            # In this group the tensor-parallel rank varies fastest, then the context-parallel one.
            self.group = parallel_state.get_tensor_and_context_parallel_group()
        else:
            self.group = cp_group
        self._plans: dict[tuple[tuple[TokenRange, ...], int], tuple[int, Tensor]] = {}

    def __call__(self, x: Tensor, ranges: list[TokenRange], seq_length: int) -> list[Tensor]:
        """Takes x [s_local, b, h], the rows of `ranges`. Returns the halo [reach, b, h] of each
        range, zero where it lies before the sequence. Gradients flow back to the ranks that hold
        the rows."""
        zeros = x.new_zeros((self.reach, *x.shape[1:]))
        if self.reach == 0 or self.tp_size * self.cp_size == 1:
            return [zeros] * len(ranges)
        slots, index = self._plan(tuple(ranges), seq_length, x.device)
        gathered = gather_from_sequence_parallel_region(
            self._tails(x, ranges, slots), group=self.group
        )
        return list(torch.cat([gathered, zeros[:1]])[index].split(self.reach))

    def _plan(
        self, ranges: tuple[TokenRange, ...], seq_length: int, device: torch.device
    ) -> tuple[int, Tensor]:
        """Returns the largest number of ranges on a rank, and for each row of the halos its index
        in the gathered rows. It is cached, because building the index on the host would stall a
        GPU."""
        if (ranges, seq_length) not in self._plans:
            ranges_by_rank = [
                sequence_ranges(context_ranges(seq_length, self.cp_size, cp), self.tp_size, tp)
                for cp in range(self.cp_size)
                for tp in range(self.tp_size)
            ]
            slots = max(map(len, ranges_by_rank))  # a rank with fewer ranges pads with zeros
            row_index = self._row_index(ranges_by_rank, slots)
            zero_row = len(ranges_by_rank) * slots * self.reach
            rows = [
                row_index.get(position, zero_row)
                for token_range in ranges
                for position in range(token_range.start - self.reach, token_range.start)
            ]
            self._plans[ranges, seq_length] = slots, torch.tensor(rows, device=device)
        return self._plans[ranges, seq_length]

    def _tails(self, x: Tensor, ranges: list[TokenRange], slots: int) -> Tensor:
        """Returns the last rows of each range, [slots * reach, b, h]. A range with fewer than
        `reach` rows gets zeros in front of them, and missing ranges are all zeros."""
        tails = []
        for part in x.split([len(token_range) for token_range in ranges]):
            tail = part[-self.reach :]
            tails += [x.new_zeros((self.reach - len(tail), *x.shape[1:])), tail]
        tails.append(x.new_zeros(((slots - len(ranges)) * self.reach, *x.shape[1:])))
        return torch.cat(tails)

    def _row_index(self, ranges_by_rank: list[list[TokenRange]], slots: int) -> dict[int, int]:
        """Returns a map from the position in the sequence to the row of the gathered tails."""
        row_index = {}
        for rank, ranges in enumerate(ranges_by_rank):
            for slot, token_range in enumerate(ranges):
                end = (rank * slots + slot + 1) * self.reach
                for back in range(1, min(self.reach, len(token_range)) + 1):
                    row_index[token_range.stop - back] = end - back
        return row_index
