"""RMSNorm that works on sequence shards."""

import torch.nn.functional as F
from torch import Tensor, nn

from gengram_megatron.model.initialize import InitialLaw, marker, whole_weight


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, on torch's fused kernel.

    megatron-core's own torch norm refuses sequence parallelism; this one marks its weight so
    that megatron-core sums its gradient over the tensor-parallel group.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = whole_weight(hidden_size, config, marker(InitialLaw(constant=1.0)))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; returns the same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
