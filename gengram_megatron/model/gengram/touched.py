"""How many rows of the tables the tokens of a step look up."""

import torch
import torch.distributed as dist

from gengram_megatron.config.tables import KmerTable
from gengram_megatron.model.gengram.ids import KmerIds


class RowsTouched:
    """Marks the rows that a step's microbatches look up, over all data-parallel ranks.

    Ids depend on tokens only, so the count is the same in every layer with memory.
    """

    def __init__(self, tables: tuple[KmerTable, ...]):
        device = torch.cuda.current_device()
        # One place more than rows: k-mers that are not valid have the id one past the last row.
        self._marks = [
            torch.zeros(table.rows + 1, dtype=torch.uint8, device=device) for table in tables
        ]

    def mark(self, kmers: KmerIds) -> None:
        """Count a microbatch in."""
        for marks, ids in zip(self._marks, kmers.ids):
            marks[ids.flatten()] = 1

    def take(self, data_group) -> int:
        """Rows of all tables that were marked on any rank of the group, and begin anew."""
        together = torch.cat([marks[:-1] for marks in self._marks])
        dist.all_reduce(together, op=dist.ReduceOp.MAX, group=data_group)
        for marks in self._marks:
            marks.zero_()
        return int(together.sum(dtype=torch.int64))
