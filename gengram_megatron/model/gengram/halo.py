"""The rows left of a rank's part of the sequence, fetched from the ranks that hold them.

Under sequence parallelism a rank holds a run of neighbouring tokens, under context parallelism two
(see zigzag.py). Every rank offers the last rows of its pieces, and picks from all that is offered
the rows that lie left of its own: a few rows a rank, never the sequence.
"""

import torch
from megatron.core.parallel_state import get_tensor_and_context_parallel_group
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from gengram_megatron.model.zigzag import Piece, context_pieces, sequence_pieces


class Halo:
    """Left context of `reach` rows for the pieces of one rank."""

    def __init__(self, reach: int, sequence_parallel: bool, tp_group, cp_group):
        self.reach = reach
        self.cp_size = cp_group.size()
        self.tp_size = tp_group.size() if sequence_parallel else 1
        if self.tp_size > 1:
            # Ranks of this group count tensor-parallel ranks first, then context-parallel ones.
            self.group = get_tensor_and_context_parallel_group()
        else:
            self.group = cp_group
        self._index: dict = {}

    def __call__(self, x: Tensor, pieces: list[Piece], seq_length: int) -> list[Tensor]:
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

    def _plan(self, pieces: tuple[Piece, ...], seq_length: int, device) -> tuple[int, Tensor]:
        """Pieces a rank at most, and for each row of the halos its row in what is offered; made
        once, as building it on the host would stall a GPU."""
        if (pieces, seq_length) not in self._index:
            owners = [
                sequence_pieces(context_pieces(seq_length, self.cp_size, cp), self.tp_size, tp)
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

    def _tails(self, x: Tensor, pieces: list[Piece], slots: int) -> Tensor:
        """[slots * reach, b, h]: the last rows of each piece, zeros above short ones."""
        tails = []
        for part in x.split([len(piece) for piece in pieces]):
            tail = part[-self.reach :]
            tails += [x.new_zeros((self.reach - len(tail), *x.shape[1:])), tail]
        tails.append(x.new_zeros(((slots - len(pieces)) * self.reach, *x.shape[1:])))
        return torch.cat(tails)

    def _places(self, owners: list[list[Piece]], slots: int) -> dict[int, int]:
        """Position in the sequence -> row of what all ranks offer together."""
        places = {}
        for rank, pieces in enumerate(owners):
            for slot, piece in enumerate(pieces):
                end = (rank * slots + slot + 1) * self.reach
                for back in range(1, min(self.reach, len(piece)) + 1):
                    places[piece.stop - back] = end - back
        return places
