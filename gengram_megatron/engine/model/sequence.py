"""Which tokens a rank holds under context and sequence parallelism, and the rows left of them,
fetched from the ranks that hold those.

Context parallelism cuts a sequence of s tokens into 2 cp chunks; rank r holds chunks r and
2 cp - 1 - r, one behind the other (megatron-core's zigzag). Sequence parallelism then cuts what a
context rank holds into tp equal parts, one a tensor-parallel rank. So a rank holds one or two runs
of neighbouring tokens. To know what lies left of them, every rank offers the last rows of its runs
and picks what it needs from all that is offered: a few rows a rank, never the sequence.
"""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


@dataclass(frozen=True)
class TokenRange:
    """A run of neighbouring tokens that one rank holds: positions [start, stop) of the sequence."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def context_ranges(seq_length: int, cp_size: int, cp_rank: int) -> list[TokenRange]:
    """The runs that a context-parallel rank holds, in the order in which it holds them."""
    if cp_size == 1:
        return [TokenRange(0, seq_length)]
    chunk = seq_length // (2 * cp_size)
    return [
        TokenRange(index * chunk, (index + 1) * chunk)
        for index in (cp_rank, 2 * cp_size - 1 - cp_rank)
    ]


def sequence_ranges(pieces: list[TokenRange], tp_size: int, tp_rank: int) -> list[TokenRange]:
    """The part of `pieces` that tensor-parallel rank tp_rank holds under sequence parallelism."""
    length = sum(map(len, pieces)) // tp_size
    first, last = tp_rank * length, (tp_rank + 1) * length
    own, offset = [], 0
    for piece in pieces:
        low, high = max(first - offset, 0), min(last - offset, len(piece))
        if low < high:
            own.append(TokenRange(piece.start + low, piece.start + high))
        offset += len(piece)
    return own


def select_ranges(sequence: Tensor, pieces: list[TokenRange], dim: int) -> Tensor:
    """The tokens of `pieces`, one behind the other along axis `dim` of a whole sequence."""
    if len(pieces) == 1:
        return sequence.narrow(dim, pieces[0].start, len(pieces[0]))
    return torch.cat([sequence.narrow(dim, p.start, len(p)) for p in pieces], dim=dim)


def of_this_rank(sequences: Tensor) -> Tensor:
    """The tokens that this context-parallel rank holds, along axis 1 of whole sequences [b, s]."""
    size = parallel_state.get_context_parallel_world_size()
    rank = parallel_state.get_context_parallel_rank()
    return select_ranges(sequences, context_ranges(sequences.shape[1], size, rank), 1)


def chunks_in_sequence_order(gathered: Tensor, cp_size: int) -> Tensor:
    """[s, ...] as gathered from the context ranks in their order, to the sequence's order."""
    chunks = gathered.chunk(2 * cp_size)  # rank 0: chunks 0 and 2cp-1, rank 1: 1 and 2cp-2, ...
    order = [2 * i for i in range(cp_size)] + [2 * i + 1 for i in reversed(range(cp_size))]
    return torch.cat([chunks[i] for i in order])


class Halo:
    """Left context of `reach` rows for the pieces of one rank."""

    def __init__(self, reach: int, sequence_parallel: bool, tp_group, cp_group):
        self.reach = reach
        self.cp_size = cp_group.size()
        self.tp_size = tp_group.size() if sequence_parallel else 1
        if self.tp_size > 1:
            # Ranks of this group count tensor-parallel ranks first, then context-parallel ones.
            self.group = parallel_state.get_tensor_and_context_parallel_group()
        else:
            self.group = cp_group
        self._index: dict = {}

    def __call__(self, x: Tensor, pieces: list[TokenRange], seq_length: int) -> list[Tensor]:
        """x: [s_local, b, h], the rows of `pieces`; returns a [reach, b, h] for each piece,
        zero where it lies before the sequence. Gradients flow back to the rows' owners."""
        nothing = x.new_zeros((self.reach, *x.shape[1:]))
        if self.reach == 0 or self.tp_size * self.cp_size == 1:
            return [nothing] * len(pieces)
        slots, index = self._plan(tuple(pieces), seq_length, x.device)
        offered = gather_from_sequence_parallel_region(
            self._tails(x, pieces, slots), group=self.group
        )
        return list(torch.cat([offered, nothing[:1]])[index].split(self.reach))

    def _plan(self, pieces: tuple[TokenRange, ...], seq_length: int, device) -> tuple[int, Tensor]:
        """Pieces a rank at most, and for each row of the halos its row in what is offered; made
        once, as building it on the host would stall a GPU."""
        if (pieces, seq_length) not in self._index:
            owners = [
                sequence_ranges(context_ranges(seq_length, self.cp_size, cp), self.tp_size, tp)
                for cp in range(self.cp_size)
                for tp in range(self.tp_size)
            ]
            slots = max(map(len, owners))  # a rank with fewer pieces than others offers zeros
            places, zero = self._places(owners, slots), len(owners) * slots * self.reach
            rows = [
                places.get(position, zero)
                for piece in pieces
                for position in range(piece.start - self.reach, piece.start)
            ]
            self._index[pieces, seq_length] = slots, torch.tensor(rows, device=device)
        return self._index[pieces, seq_length]

    def _tails(self, x: Tensor, pieces: list[TokenRange], slots: int) -> Tensor:
        """[slots * reach, b, h]: the last rows of each piece, zeros above short ones."""
        tails = []
        for part in x.split([len(piece) for piece in pieces]):
            tail = part[-self.reach :]
            tails += [x.new_zeros((self.reach - len(tail), *x.shape[1:])), tail]
        tails.append(x.new_zeros(((slots - len(pieces)) * self.reach, *x.shape[1:])))
        return torch.cat(tails)

    def _places(self, owners: list[list[TokenRange]], slots: int) -> dict[int, int]:
        """Position in the sequence -> row of what all ranks offer together."""
        places = {}
        for rank, pieces in enumerate(owners):
            for slot, piece in enumerate(pieces):
                end = (rank * slots + slot + 1) * self.reach
                for back in range(1, min(self.reach, len(piece)) + 1):
                    places[piece.stop - back] = end - back
        return places
