"""The k-mer tables of a layer, one [5^k, d] a k, split over the tensor-parallel ranks in one of two
ways that give the same features and the same checkpoint.

By columns: a rank holds d / tp columns of every row, and pools them for the whole sequence; nothing
is communicated. By rows: a rank holds a run of whole rows, for tables so tall that it matters;
each rank pools the rows it has, and a reduce-scatter adds the parts up, leaving each rank the
columns that it would have had.
"""

from abc import ABC, abstractmethod

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import reduce_scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from gengram_megatron.model.gengram.ids import KmerIds, rows_of
from gengram_megatron.model.gengram.pooling import window_mean
from gengram_megatron.model.gengram.shape import GengramShape
from gengram_megatron.model.initialize import mark
from gengram_megatron.model.zigzag import Piece


class _Weights(nn.Module):
    """The tables by name, k1 and so on. What is looked up is asked for by a call: where updated
    weights are gathered while the forward pass goes on, megatron-core waits for those of a module
    when the module is called, and a table that is only read might still be the old one."""

    def __init__(self, tables: dict[str, nn.Parameter]):
        super().__init__()
        for name, table in tables.items():
            self.register_parameter(name, table)

    def forward(self, k: int) -> nn.Parameter:
        return self[f"k{k}"]

    def __getitem__(self, name: str) -> nn.Parameter:
        return getattr(self, name)


class _Tables(nn.Module, ABC):
    """What both ways share. weights["k6"] is this rank's part of the table of 6-mers."""

    split_axis: int

    def __init__(self, config, gengram: GengramShape, tp_group, dp_group):
        super().__init__()
        self.shape, self.tp_group, self.dp_group = gengram, tp_group, dp_group
        self.weights = _Weights({f"k{k}": self._table(config, k) for k in gengram.kmer_sizes})

    @abstractmethod
    def _local(self, k: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shape of this rank's part of table k, and its first row and column."""

    def _table(self, config, k: int) -> nn.Parameter:
        table = nn.Parameter(
            torch.empty(
                self._local(k)[0], dtype=config.params_dtype, device=torch.cuda.current_device()
            )
        )
        mark(table, std=self.shape.init_std)
        set_tensor_model_parallel_attributes(table, True, self.split_axis, 1)
        table.is_gengram_table = True  # may have its own learning rate and weight decay
        return table

    def _means(self, kmers: KmerIds, pieces: list[Piece]) -> list[Tensor]:
        """The means over this rank's part of each table: [s, b, columns] each."""
        return [
            window_mean(
                self.weights(k),
                ids,
                k,
                self.shape.pooling,
                pieces,
                documents=kmers.documents,
                first_row=self._local(k)[1][0],
            )
            for k, ids in zip(kmers.kmer_sizes, kmers.ids)
        ]

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None) -> dict:
        state = {}
        for k in self.shape.kmer_sizes:
            key, table = f"{prefix}weights.k{k}", self.weights[f"k{k}"]
            state[key] = ShardedTensor(
                key=key,
                data=table,
                dtype=table.dtype,
                local_shape=tuple(table.shape),
                global_shape=(rows_of(k), self.shape.dim),
                global_offset=self._local(k)[1],
                axis_fragmentations=None,
                replica_id=(0, 0, self.dp_group.rank()),
            )
        return state


class TablesByColumns(_Tables):
    """A rank holds d / tp columns of each table."""

    split_axis = 1

    def _local(self, k: int) -> tuple[tuple[int, int], tuple[int, int]]:
        columns = self.shape.dim // self.tp_group.size()
        return (rows_of(k), columns), (0, self.tp_group.rank() * columns)

    def forward(self, kmers: KmerIds, pieces: list[Piece]) -> Tensor:
        """The pooled features of this rank's columns, k after k: [s, b, number of k * d / tp]."""
        return torch.cat(self._means(kmers, pieces), dim=-1)


class TablesByRows(_Tables):
    """A rank holds whole rows of each table, as many as the others or one less."""

    split_axis = 0

    def _local(self, k: int) -> tuple[tuple[int, int], tuple[int, int]]:
        size, rank = self.tp_group.size(), self.tp_group.rank()
        first, last = (rows_of(k) * r // size for r in (rank, rank + 1))
        return (last - first, self.shape.dim), (first, 0)

    def forward(self, kmers: KmerIds, pieces: list[Piece]) -> Tensor:
        """As by columns. The parts are added up in float32."""
        size = self.tp_group.size()
        parts = torch.stack(self._means(kmers, pieces), dim=2)  # [s, b, number of k, d]
        if size > 1:
            by_rank = parts.unflatten(-1, (size, -1)).movedim(
                -2, 0
            )  # [tp, s, b, number of k, d/tp]
            parts = reduce_scatter_to_sequence_parallel_region(
                by_rank.flatten(0, 1), group=self.tp_group
            )
        return parts.flatten(2).to(self.weights[f"k{self.shape.kmer_sizes[0]}"].dtype)
