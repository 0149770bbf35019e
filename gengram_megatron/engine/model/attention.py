"""Attention of torch's own parts: scaled_dot_product_attention with context parallelism, and the
projections of multi-latent attention.

On a GPU no rank ever builds the s x s matrix of scores: the kernels are flash or
memory-efficient ones. Under context parallelism a rank holds two chunks of the sequence, numbers
r and 2 cp - 1 - r of 2 cp (megatron-core's zigzag, which balances the causal work). It gathers
keys and values, and each of its chunks attends to everything up to its own end.

megatron-core's MLASelfAttention (0.16.1) splits the down-projection by columns over the
tensor-parallel ranks when it is built from torch layers, gathers the result and sends back each
rank's own share of the gradient. The shared rotary key lies in that result, and each rank knows
only what its own heads make of it, so its gradient is wrong for more than one rank. In
`LatentAttention` every rank holds the whole down-projection, as with Transformer Engine: applied to
sequence shards, its gradient is summed over the ranks like a norm's.
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from gengram_megatron.engine.model.initialize import whole_weight
from gengram_megatron.engine.model.sequence import chunks_in_sequence_order


class CoreAttention(MegatronModule):
    """softmax(q k^T / sqrt(d)) v, causal, for the heads of one tensor-parallel rank."""

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
    ):
        """The arguments are those that megatron-core's attention layers pass; masks other than
        causal, and ways to communicate other than all-gather, do not occur here."""
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)
        self.cp_group = pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_
    ) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d]; returns [s, b, heads * d].

        s is the rank's own part of the sequence under context parallelism.
        """
        if self.cp_group.size() == 1:
            context = self._attend(query, key, value)
        else:
            context = self._attend_across_ranks(query, key, value)
        return context.flatten(2)

    def _attend_across_ranks(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        size, rank = self.cp_group.size(), self.cp_group.rank()
        key, value = (
            chunks_in_sequence_order(
                gather_from_sequence_parallel_region(x, group=self.cp_group), size
            )
            for x in (key, value)
        )
        chunk = query.shape[0] // 2
        ends = (rank + 1) * chunk, (2 * size - rank) * chunk
        return torch.cat(
            [self._attend(q, key[:end], value[:end]) for q, end in zip(query.chunk(2), ends)]
        )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The last query sees every key, each query before it one key less."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        square, grouped = q.shape[2] == k.shape[2], q.shape[1] != k.shape[1]
        # Of the kernels that build no s x s scores on a GPU only the one for a whole causal square
        # in bf16 takes groups.
        if grouped and not (square and (q.dtype == torch.bfloat16 or not q.is_cuda)):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            grouped = False
        if square:
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped
            )
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=_lower_right_mask(q, k), scale=self.scale
            )
        return out.permute(2, 0, 1, 3)  # [s, b, heads, d]


def _lower_right_mask(q: Tensor, k: Tensor):
    """A description of the mask on GPUs, whose kernels need no matrix; the matrix on the CPU."""
    bias = causal_lower_right(q.shape[2], k.shape[2])
    return bias if q.is_cuda else bias._materialize(q.device)


class LatentAttention(MLASelfAttention):
    """MLASelfAttention whose down-projections are whole on every tensor-parallel rank."""

    def __init__(self, config, submodules, **kwargs):
        super().__init__(config, submodules, **kwargs)
        self.linear_kv_down_proj = WholeLinear(
            config, config.kv_lora_rank + config.qk_pos_emb_head_dim
        )
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(config, config.q_lora_rank)


class WholeLinear(nn.Module):
    """y = x W^T with the whole W [out, h] on every rank, for x in sequence shards."""

    def __init__(self, config, out_features: int):
        super().__init__()
        shape = (out_features, config.hidden_size)
        self.weight = whole_weight(shape, config, config.init_method)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x: [s_local, b, h]; returns [s_local, b, out] and, as megatron-core expects, no bias."""
        return F.linear(x, self.weight), None
