"""One layer's Gengram memory: from k-mers and hidden state to what is added to the hidden state."""

from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from gengram_megatron.model.gengram.gate import Gate
from gengram_megatron.model.gengram.ids import KmerIds
from gengram_megatron.model.gengram.output import ConvolutionOutput, NormOutput, PlainOutput
from gengram_megatron.model.gengram.projection import KeyValueProjection
from gengram_megatron.model.gengram.shape import GengramShape
from gengram_megatron.model.gengram.tables import TablesByColumns, TablesByRows
from gengram_megatron.model.zigzag import context_pieces, sequence_pieces


class GengramMemory(MegatronModule):
    """Algorithm 1 of the paper, its tables split over the tensor-parallel ranks."""

    def __init__(self, config, gengram: GengramShape, pg_collection):
        super().__init__(config=config)
        self.shape = gengram
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        dp_group = pg_collection.dp_cp
        split = TablesByRows if gengram.split == "rows" else TablesByColumns
        self.tables = split(config, gengram, self.tp_group, dp_group)
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
        features = self.tables(kmers, pieces)
        key, value = self.projection(features)
        if self.config.sequence_parallel:
            pieces = sequence_pieces(pieces, self.tp_group.size(), self.tp_group.rank())
        gated = self.gate(hidden, key) * value
        return self.output(gated, pieces, kmers)
