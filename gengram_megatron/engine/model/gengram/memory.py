"""The Gengram memory of one layer, which turns k-mers and hidden states into what the layer adds to
the hidden states: keys and values from the tables, then the gate, then the output.

The gate is one number per position, by which the value is multiplied (paper equation 9):
g = <RMSNorm(x), RMSNorm(z)> / sqrt(h), then the signed square root of the published code (the
paper leaves it out; gengram.signed_sqrt), then the sigmoid.

The output is one of three functions of the gated value o (gengram.output):
convolution: o + SiLU(conv(o)), where conv is a causal depthwise convolution over the sequence with
kernel 4, dilation max(k) = 6 and no bias, as in the published code. It reaches
(kernel - 1) * dilation = 18 tokens to the left; if a rank holds only part of the sequence, the rows
that it lacks come from the ends of other ranks' parts (`sequence.py`).
norm: SiLU(RMSNorm(o)), the paper's equation 13.
plain: o.
"""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from gengram_megatron.engine.model.gengram.ids import KmerIds
from gengram_megatron.engine.model.gengram.pooling import pooled_features
from gengram_megatron.engine.model.gengram.projected import ProjectedTables
from gengram_megatron.engine.model.gengram.projection import KeyValueProjection
from gengram_megatron.engine.model.gengram.shape import GengramShape
from gengram_megatron.engine.model.gengram.tables import Tables
from gengram_megatron.engine.model.gpt import MemoryModule, RMSNorm
from gengram_megatron.engine.model.initialize import whole_weight
from gengram_megatron.engine.model.sequence import Halo, TokenRange, context_ranges, sequence_ranges


class GengramMemory(MemoryModule):
    """Computes algorithm 1 of the paper, for this rank's part of the sequence and of the tables."""

    def __init__(
        self,
        config: TransformerConfig,
        gengram: GengramShape,
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__(config=config)
        self.shape = gengram
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        dp_group = pg_collection.dp_cp
        self.tables = Tables(config, gengram, pg_collection)
        self.projection = KeyValueProjection(config, gengram, self.tp_group, dp_group)
        self.gate = Gate(config, gengram.signed_sqrt)
        self.output = self._output()
        self.projected: ProjectedTables | None = None
        if gengram.project == "tables":
            self.projected = ProjectedTables(self.tables, self.projection, gengram)

    def _output(self) -> nn.Module:
        shape, config = self.shape, self.config
        if shape.output == "plain":
            return PlainOutput()
        if shape.output == "norm":
            return NormOutput(config)
        return ConvolutionOutput(config, shape, self.tp_group, self.cp_group)

    def forward(self, hidden: Tensor, kmers: KmerIds) -> Tensor:
        """Takes hidden [s_local, b, h]. Returns what the layer adds to it, in the same shape."""
        ranges = context_ranges(kmers.seq_length, self.cp_group.size(), self.cp_group.rank())
        local_ranges = ranges
        if self.config.sequence_parallel:
            local_ranges = sequence_ranges(ranges, self.tp_group.size(), self.tp_group.rank())
        added: Tensor
        if self.projected is not None:
            # Look-ups are so cheap that not even keys and values are kept for the backward pass.
            from_tables = partial(self._from_tables, self.projected)
            added = checkpoint(from_tables, hidden, local_ranges, kmers, use_reentrant=False)
        else:
            key_value = self._from_features(kmers, ranges)
            # What follows is cheap to recompute, and would otherwise keep a dozen tensors.
            added = checkpoint(
                self._gate_and_output, hidden, key_value, local_ranges, kmers, use_reentrant=False
            )
        return added

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
        key_value: Tensor = self.projection(pool, rows)
        return key_value

    def _from_tables(
        self,
        projected: ProjectedTables,
        hidden: Tensor,
        local_ranges: list[TokenRange],
        kmers: KmerIds,
    ) -> Tensor:
        key_value = projected.key_value(kmers, local_ranges)
        return self._gate_and_output(hidden, key_value, local_ranges, kmers)

    def _gate_and_output(
        self, hidden: Tensor, key_value: Tensor, local_ranges: list[TokenRange], kmers: KmerIds
    ) -> Tensor:
        key, value = key_value.chunk(2, dim=-1)
        output: Tensor = self.output(self.gate(hidden, key) * value, local_ranges, kmers)
        return output

    def describe(self) -> str:
        """Returns in words whether features or tables are projected."""
        method = "features projected" if self.projected is None else "tables projected once a step"
        return f"Gengram, {method}"

    def finish_gradients(self) -> None:
        """Computes the gradients of tables and projection from those of the projected tables."""
        if self.projected is not None:
            self.projected.finish_gradients()


class Gate(nn.Module):
    """Computes the gate from the hidden state and the key."""

    def __init__(self, config: TransformerConfig, signed_sqrt: bool):
        super().__init__()
        self.signed_sqrt = signed_sqrt
        self.norm_hidden = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.norm_key = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden: Tensor, key: Tensor) -> Tensor:
        """Takes hidden and key, both [s, b, h]. Returns [s, b, 1] in hidden's dtype; sums in
        float32."""
        product = self.norm_hidden(hidden) * self.norm_key(key)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        agreement = product.sum(-1, keepdim=True, dtype=wide) / hidden.shape[-1] ** 0.5
        if self.signed_sqrt:
            agreement = signed_sqrt(agreement)
        return torch.sigmoid(agreement).to(hidden.dtype)


def signed_sqrt(x: Tensor) -> Tensor:
    """Computes sign(x) sqrt(max(|x|, 1e-6))."""
    return x.sign() * x.abs().clamp_min(1e-6).sqrt()


class PlainOutput(nn.Module):
    """Returns o unchanged."""

    def forward(self, gated: Tensor, local_ranges: list[TokenRange], kmers: KmerIds) -> Tensor:
        """Takes gated [s_local, b, h], the rows of `local_ranges`. Returns the same shape."""
        return gated


class NormOutput(nn.Module):
    """Computes SiLU(RMSNorm(o))."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, gated: Tensor, local_ranges: list[TokenRange], kmers: KmerIds) -> Tensor:
        """Takes gated [s_local, b, h], the rows of `local_ranges`. Returns the same shape."""
        return F.silu(self.norm(gated))


class ConvolutionOutput(nn.Module):
    """Computes o + SiLU(conv(o)).

    weight: [kernel, h]; the last tap multiplies the current token.
    """

    def __init__(
        self,
        config: TransformerConfig,
        gengram: GengramShape,
        tp_group: ProcessGroup,
        cp_group: ProcessGroup,
    ):
        super().__init__()
        self.kernel, self.dilation = gengram.conv_kernel, max(gengram.kmer_sizes)
        reach = (self.kernel - 1) * self.dilation
        self.halo = Halo(reach, config.sequence_parallel, tp_group, cp_group)
        # Depthwise: each output has one input channel.
        init_method = gengram.init_method(config, fan_in=self.kernel)
        self.weight = whole_weight((self.kernel, config.hidden_size), config, init_method)

    def forward(self, gated: Tensor, local_ranges: list[TokenRange], kmers: KmerIds) -> Tensor:
        """Takes gated [s_local, b, h], the rows of `local_ranges`. Returns the same shape."""
        halos = self.halo(gated, local_ranges, kmers.seq_length)
        parts = gated.split([len(token_range) for token_range in local_ranges])
        convolved = [
            self._convolve(torch.cat([halo, part]), self._documents(token_range, kmers.documents))
            for halo, part, token_range in zip(halos, parts, local_ranges)
        ]
        return gated + F.silu(torch.cat(convolved))

    def _documents(self, token_range: TokenRange, documents: Tensor | None) -> Tensor | None:
        """Returns the document numbers [reach + s, b, 1] of a token range and the `reach` tokens to
        its left, -1 before the sequence; or None if taps may cross documents."""
        if documents is None:
            return None
        missing = max(self.halo.reach - token_range.start, 0)
        numbers = documents[:, max(token_range.start - self.halo.reach, 0) : token_range.stop].t()
        return F.pad(numbers, (0, 0, missing, 0), value=-1).unsqueeze(-1)

    def _convolve(self, x: Tensor, documents: Tensor | None) -> Tensor:
        """Takes x [reach + s, b, h], and documents [reach + s, b, 1] or None. Returns the
        convolution, [s, b, h]."""
        length = len(x) - self.halo.reach
        out = torch.zeros_like(x[:length])
        for tap in range(self.kernel):
            shifted = slice(tap * self.dilation, tap * self.dilation + length)
            source = x[shifted]
            if documents is not None:
                source = source * (documents[shifted] == documents[-length:])
            out = torch.addcmul(out, source, self.weight[tap])
        return out
