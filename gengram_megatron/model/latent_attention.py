"""Multi-latent attention without Transformer Engine.

megatron-core's MLASelfAttention (0.16.1) splits the down-projection by columns over the
tensor-parallel ranks when it is built from torch layers, gathers the result and sends back each
rank's own share of the gradient. The shared rotary key lies in that result, and each rank knows
only what its own heads make of it, so its gradient is wrong for more than one rank. Here every
rank holds the whole down-projection, as with Transformer Engine: applied to sequence shards, its
gradient is summed over the ranks like a norm's.
"""

import torch.nn.functional as F
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from gengram_megatron.model.initialize import whole_weight


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
