"""The Gengram memory of one layer, which turns k-mers and hidden states into what the layer adds to
the hidden states."""

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
from gengram_megatron.engine.model.gengram.pooling import pooled_features
from gengram_megatron.engine.model.gengram.projected import ProjectedTables
from gengram_megatron.engine.model.gengram.projection import KeyValueProjection
from gengram_megatron.engine.model.gengram.shape import GengramShape
from gengram_megatron.engine.model.gengram.tables import Tables
from gengram_megatron.engine.model.memory import MemoryModule
from gengram_megatron.engine.model.sequence import TokenRange, context_ranges, sequence_ranges


class GengramMemory(MemoryModule):
    """Computes algorithm 1 of the paper, for this rank's part of the sequence and of the tables."""

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
        """hidden: [s_local, b, h]. Returns what the layer adds to it, in the same shape."""
        kmers = inputs
        ranges = context_ranges(kmers.seq_length, self.cp_group.size(), self.cp_group.rank())
        local_ranges = ranges
        if self.config.sequence_parallel:
            local_ranges = sequence_ranges(ranges, self.tp_group.size(), self.tp_group.rank())
        if self.projected is not None:
            # Look-ups are so cheap that not even keys and values are kept for the backward pass.
            return checkpoint(self._from_tables, hidden, local_ranges, kmers, use_reentrant=False)
        key_value = self._from_features(kmers, ranges)
        # What follows is cheap to recompute, and would otherwise keep a dozen tensors.
        return checkpoint(
            self._gate_and_output, hidden, key_value, local_ranges, kmers, use_reentrant=False
        )

    def _from_features(self, kmers: KmerIds, ranges: list[TokenRange]) -> Tensor:
        """Looks up rows, pools and projects them. Returns key and value, [s_local, b, 2 h]."""
        rows, ids = self.tables(kmers, ranges)
        pool = partial(
            pooled_features,
            ids=ids,
            tables=self.shape.tables,
            pooling=self.shape.pooling,
            ranges=ranges,
            documents=kmers.documents,
        )
        return self.projection(pool, rows)

    def _from_tables(
        self, hidden: Tensor, local_ranges: list[TokenRange], kmers: KmerIds
    ) -> Tensor:
        key_value = self.projected.key_value(kmers, local_ranges)
        return self._gate_and_output(hidden, key_value, local_ranges, kmers)

    def _gate_and_output(
        self, hidden: Tensor, key_value: Tensor, local_ranges: list[TokenRange], kmers: KmerIds
    ) -> Tensor:
        key, value = key_value.chunk(2, dim=-1)
        return self.output(self.gate(hidden, key) * value, local_ranges, kmers)

    def describe(self) -> str:
        """Returns in words whether features or tables are projected."""
        method = "features projected" if self.projected is None else "tables projected once a step"
        return f"Gengram, {method}"

    def finish_gradients(self) -> None:
        """Computes the gradients of tables and projection from those of the projected tables."""
        if self.projected is not None:
            self.projected.finish_gradients()
