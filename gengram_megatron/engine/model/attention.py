"""Attention built from torch: scaled_dot_product_attention with context parallelism, and the
projections of multi-latent attention.

On a GPU no rank ever builds the s x s matrix of scores: flash or memory-efficient kernels are used.
Under context parallelism rank r holds chunks r and 2 cp - 1 - r of the 2 cp chunks of a sequence
(megatron-core's zigzag, which balances the causal work). It gathers keys and values from all ranks,
and each of its chunks attends to everything up to the end of that chunk.

Built from torch layers, megatron-core's MLASelfAttention (0.16.1) splits the down-projection by
columns over the tensor-parallel ranks, gathers the result and, in the backward pass, gives each
rank only its own columns of the gradient. The result contains the rotary key that all heads share,
whose gradient each rank has only from its own heads, so with more than one rank the gradient is
wrong. In `LatentAttention` every rank holds the whole down-projection, as with Transformer Engine.
It is applied to sequence shards, and its gradient is summed over the ranks like that of a norm.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right

from gengram_megatron.engine.model.initialize import whole_weight
from gengram_megatron.engine.model.sequence import chunks_in_sequence_order


class CoreAttention(MegatronModule):
    """Computes softmax(q k^T / sqrt(d)) v, causal, for the heads of one tensor-parallel rank."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        *,
        pg_collection: ProcessGroupCollection,
    ):
        """Takes the arguments that megatron-core's attention layers pass. The mask is always causal
        here, and context-parallel ranks always all-gather keys and values."""
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)
        self.cp_group = pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """Takes query [s, b, heads, d], key and value [s, b, groups, d]; returns [s, b, heads * d].

        Under context parallelism s is the length of this rank's part of the sequence.
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
        """Attends causally, aligned at the end: the last query sees all keys, the query before it
        all but the last key, and so on. Takes the shapes that `forward` takes, and returns
        [s, b, heads, d]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        square, grouped = q.shape[2] == k.shape[2], q.shape[1] != k.shape[1]
        # On a GPU, the only kernel that takes fewer key groups than heads without building the
        # s x s scores is the one for a square causal mask in bf16.
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


def _lower_right_mask(q: Tensor, k: Tensor) -> Tensor | CausalBias:
    """Returns the causal mask, aligned at the end: on GPUs, whose kernels need no matrix, only a
    description of it; on the CPU the matrix."""
    bias = causal_lower_right(q.shape[2], k.shape[2])
    return bias if q.is_cuda else bias._materialize(q.device)


class LatentAttention(MLASelfAttention):
    """MLASelfAttention in which every tensor-parallel rank holds the whole down-projections."""

    def __init__(
        self, config: MLATransformerConfig, submodules: MLASelfAttentionSubmodules, **kwargs: Any
    ):
        super().__init__(config, submodules, **kwargs)
        self.linear_kv_down_proj = WholeLinear(
            config, config.kv_lora_rank + config.qk_pos_emb_head_dim
        )
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(config, config.q_lora_rank)


class WholeLinear(nn.Module):
    """Computes y = x W^T for sequence shards x, with the whole W [out, h] on every rank."""

    def __init__(self, config: TransformerConfig, out_features: int):
        super().__init__()
        shape = (out_features, config.hidden_size)
        self.weight = whole_weight(shape, config, config.init_method)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Takes x [s_local, b, h]. Returns [s_local, b, out], and None for the bias, as
        megatron-core expects."""
        return F.linear(x, self.weight), None
