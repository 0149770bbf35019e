"""Norms."""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.eps = eps
        size = hidden_size if normalized_shape is None else normalized_shape
        self.weight = nn.Parameter(torch.ones(size, dtype=params_dtype or dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, input):
        return F.rms_norm(input, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.Module):
    """A name for megatron-core's import."""
