"""One layer's Gengram memory: from k-mers and hidden state to what is added to the hidden state."""

from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from gengram_megatron.model.gengram.gate import Gate
from gengram_megatron.model.gengram.ids import KmerIds, rows_of
from gengram_megatron.model.gengram.output import ConvolutionOutput, NormOutput, PlainOutput
from gengram_megatron.model.gengram.pooling import window_mean
from gengram_megatron.model.gengram.projection import KeyValueProjection
from gengram_megatron.model.initialize import mark
from gengram_megatron.model.zigzag import Piece, context_pieces, sequence_pieces


@dataclass(frozen=True)
class GengramShape:
    """The settings of `model.gengram` that decide the module."""

    kmer_sizes: tuple[int, ...]
    dim: int
    window: int | None
    conv_kernel: int
    init_std: float
    deduplicate: bool = False
    signed_sqrt: bool = True
    output: Literal["convolution", "norm", "plain"] = "convolution"


class GengramMemory(MegatronModule):
    """Algorithm 1 of the paper, its tables split by columns over the tensor-parallel ranks."""

    def __init__(self, config, gengram: GengramShape, pg_collection):
        super().__init__(config=config)
        self.shape = gengram
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        dp_group = pg_collection.dp_cp
        self.tables = Tables(config, gengram, self.tp_group, dp_group)
        self.projection = KeyValueProjection(
            config, len(gengram.kmer_sizes), gengram.dim, self.tp_group, dp_group
        )
        self.gate = Gate(config, gengram.signed_sqrt)
        self.output = self._output()

    def _output(self) -> nn.Module:
        shape, config = self.shape, self.config
        if shape.output == "plain":
            return PlainOutput()
        if shape.output == "norm":
            return NormOutput(config)
        return ConvolutionOutput(
            config, shape.conv_kernel, max(shape.kmer_sizes), self.tp_group, self.cp_group
        )

    def forward(self, hidden: Tensor, kmers: KmerIds) -> Tensor:
        """hidden: [s_local, b, h]; returns what the layer adds to it, in the same shape."""
        seq_length = kmers.ids[0].shape[1]
        pieces = context_pieces(seq_length, self.cp_group.size(), self.cp_group.rank())
        features = self.tables(kmers, self.shape, pieces)
        key, value = self.projection(features)
        if self.config.sequence_parallel:
            pieces = sequence_pieces(pieces, self.tp_group.size(), self.tp_group.rank())
        gated = self.gate(hidden, key) * value
        return self.output(gated, pieces, kmers)


class Tables(nn.Module):
    """One table a k. A rank holds d / tp columns of each: weights[i] is [5^k, d / tp]."""

    def __init__(self, config, gengram: GengramShape, tp_group, dp_group):
        super().__init__()
        self.kmer_sizes = gengram.kmer_sizes
        self.tp_group, self.dp_group = tp_group, dp_group
        self.weights = nn.ParameterDict(
            {f"k{k}": self._table(config, gengram, k) for k in gengram.kmer_sizes}
        )

    def _table(self, config, gengram: GengramShape, k: int) -> nn.Parameter:
        columns = gengram.dim // self.tp_group.size()
        table = nn.Parameter(
            torch.empty(
                (rows_of(k), columns),
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        mark(table, std=gengram.init_std)
        set_tensor_model_parallel_attributes(table, True, 1, 1)
        table.is_gengram_table = True  # may have its own learning rate and weight decay
        return table

    def forward(self, kmers: KmerIds, shape: GengramShape, pieces: list[Piece]) -> Tensor:
        """The pooled features, k after k: [s, b, number of k * d / tp]."""
        means = [
            window_mean(
                self.weights[f"k{k}"],
                ids,
                k,
                shape.window,
                pieces,
                documents=kmers.documents,
                deduplicate=shape.deduplicate,
            )
            for k, ids in zip(kmers.kmer_sizes, kmers.ids)
        ]
        return torch.cat(means, dim=-1)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None) -> dict:
        before = len(sharded_offsets)
        return {
            f"{prefix}weights.{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}weights.{name}",
                table,
                *sharded_offsets,
                (before + 1, self.tp_group.rank(), self.tp_group.size()),
                replica_id=(0, 0, self.dp_group.rank()),
                prepend_axis_num=before,
            )
            for name, table in self.weights.items()
        }
