"""Which tokens a rank holds under context and sequence parallelism.

Context parallelism cuts a sequence of s tokens into 2 cp chunks; rank r holds chunks r and
2 cp - 1 - r, one behind the other. Sequence parallelism then cuts what a context rank holds into
tp equal parts, one a tensor-parallel rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A run of neighbouring tokens that one rank holds: positions [start, stop) of the sequence."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def context_pieces(seq_length: int, cp_size: int, cp_rank: int) -> list[Piece]:
    """The runs that a context-parallel rank holds, in the order in which it holds them."""
    if cp_size == 1:
        return [Piece(0, seq_length)]
    chunk = seq_length // (2 * cp_size)
    return [
        Piece(index * chunk, (index + 1) * chunk) for index in (cp_rank, 2 * cp_size - 1 - cp_rank)
    ]


def sequence_pieces(pieces: list[Piece], tp_size: int, tp_rank: int) -> list[Piece]:
    """The part of `pieces` that tensor-parallel rank tp_rank holds under sequence parallelism."""
    length = sum(map(len, pieces)) // tp_size
    first, last = tp_rank * length, (tp_rank + 1) * length
    own, offset = [], 0
    for piece in pieces:
        low, high = max(first - offset, 0), min(last - offset, len(piece))
        if low < high:
            own.append(Piece(piece.start + low, piece.start + high))
        offset += len(piece)
    return own


def take(sequence: Tensor, pieces: list[Piece], dim: int) -> Tensor:
    """The tokens of `pieces`, one behind the other along axis `dim` of a whole sequence."""
    if len(pieces) == 1:
        return sequence.narrow(dim, pieces[0].start, len(pieces[0]))
    return torch.cat([sequence.narrow(dim, p.start, len(p)) for p in pieces], dim=dim)


def chunks_in_sequence_order(gathered: Tensor, cp_size: int) -> Tensor:
    """[s, ...] as gathered from the context ranks in their order, to the sequence's order."""
    chunks = gathered.chunk(2 * cp_size)  # rank 0: chunks 0 and 2cp-1, rank 1: 1 and 2cp-2, ...
    order = [2 * i for i in range(cp_size)] + [2 * i + 1 for i in reversed(range(cp_size))]
    return torch.cat([chunks[i] for i in order])
