"""One layer's Gengram memory: from k-mers and hidden state to what is added to the hidden state."""

from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gengram_megatron.engine.model.gengram.ids import KmerIds
from gengram_megatron.engine.model.gengram.output import (
    ConvolutionOutput,
    Gate,
    NormOutput,
    PlainOutput,
)
from gengram_megatron.engine.model.gengram.pooling import pooled
from gengram_megatron.engine.model.gengram.projected import ProjectedTables
from gengram_megatron.engine.model.gengram.projection import KeyValueProjection
from gengram_megatron.engine.model.gengram.shape import GengramShape
from gengram_megatron.engine.model.gengram.tables import Tables
from gengram_megatron.engine.model.memory import MemoryModule
from gengram_megatron.engine.model.sequence import TokenRange, context_ranges, sequence_ranges


class GengramMemory(MemoryModule):
    """Algorithm 1 of the paper, on this rank's part of the sequence and of the tables."""

    def __init__(self, config, gengram: GengramShape, pg_collection):
        super().__init__(config=config)
        self.shape = gengram
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        dp_group = pg_collection.dp_cp
        self.tables = Tables(config, gengram, pg_collection)
        self.projection = KeyValueProjection(config, gengram, self.tp_group, dp_group)
        self.gate = Gate(config, gengram.signed_sqrt)
        self.output = self._output()
        self.projected = None
        if gengram.project == "tables":
            self.projected = ProjectedTables(self.tables, self.projection, gengram)

    def _output(self) -> nn.Module:
        shape, config = self.shape, self.config
        if shape.output == "plain":
            return PlainOutput()
        if shape.output == "norm":
            return NormOutput(config)
        return ConvolutionOutput(config, shape, self.tp_group, self.cp_group)

    def forward(self, hidden: Tensor, inputs: KmerIds) -> Tensor:
        """hidden: [s_local, b, h]; returns what the layer adds to it, in the same shape."""
        kmers = inputs
        pieces = context_ranges(kmers.seq_length, self.cp_group.size(), self.cp_group.rank())
        own = pieces
        if self.config.sequence_parallel:
            own = sequence_ranges(pieces, self.tp_group.size(), self.tp_group.rank())
        if self.projected is not None:
            # So cheap to look up that not even keys and values are kept for the backward pass.
            return checkpoint(self._from_tables, hidden, own, kmers, use_reentrant=False)
        key_value = self._from_features(kmers, pieces)
        # From here on all is cheap to compute again, and would keep a dozen tensors.
        return checkpoint(self._gate_and_output, hidden, key_value, own, kmers, use_reentrant=False)

    def _from_features(self, kmers: KmerIds, pieces: list[TokenRange]) -> Tensor:
        """[s_local, b, 2 h]: rows looked up, pooled, and projected."""
        rows, ids = self.tables(kmers, pieces)
        pool = partial(
            pooled,
            ids=ids,
            tables=self.shape.tables,
            pooling=self.shape.pooling,
            pieces=pieces,
            documents=kmers.documents,
        )
        return self.projection(pool, rows)

    def _from_tables(self, hidden: Tensor, pieces: list[TokenRange], kmers: KmerIds) -> Tensor:
        key_value = self.projected.key_value(kmers, pieces)
        return self._gate_and_output(hidden, key_value, pieces, kmers)

    def _gate_and_output(
        self, hidden: Tensor, key_value: Tensor, pieces: list[TokenRange], kmers: KmerIds
    ) -> Tensor:
        key, value = key_value.chunk(2, dim=-1)
        return self.output(self.gate(hidden, key) * value, pieces, kmers)

    def describe(self) -> str:
        """Whether features or tables are projected."""
        way = "features projected" if self.projected is None else "tables projected once a step"
        return f"Gengram, {way}"

    def finish_gradients(self) -> None:
        """Gradients of tables and projection from those of the projected tables."""
        if self.projected is not None:
            self.projected.finish_gradients()
