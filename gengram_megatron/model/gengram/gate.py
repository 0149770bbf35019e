"""The gate: one number a position that says how much of the value enters (paper equation 9).

g = <RMSNorm(x), RMSNorm(z)> / sqrt(h), then the signed square root of the published code (the
paper leaves it out; gengram.signed_sqrt), then the sigmoid.
"""

import torch
from torch import Tensor, nn

from gengram_megatron.model.norm import RMSNorm


class Gate(nn.Module):
    """Compares the hidden state with the key."""

    def __init__(self, config, signed_sqrt: bool):
        super().__init__()
        self.signed_sqrt = signed_sqrt
        self.norm_hidden = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.norm_key = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden: Tensor, key: Tensor) -> Tensor:
        """hidden, key: [s, b, h]; returns [s, b, 1] in hidden's dtype. The sum runs in float32."""
        product = self.norm_hidden(hidden) * self.norm_key(key)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        agreement = product.sum(-1, keepdim=True, dtype=wide) / hidden.shape[-1] ** 0.5
        if self.signed_sqrt:
            agreement = signed_sqrt(agreement)
        return torch.sigmoid(agreement).to(hidden.dtype)


def signed_sqrt(x: Tensor) -> Tensor:
    """sign(x) sqrt(max(|x|, 1e-6))."""
    return x.sign() * x.abs().clamp_min(1e-6).sqrt()
