"""The output: o + SiLU(conv(o)), conv a causal depthwise convolution over the sequence.

Kernel 4, dilation max(k) = 6, no bias, as in the published code. The convolution reaches
(kernel - 1) * dilation = 18 tokens to the left; where a rank holds only part of the sequence, the
rows it lacks come from the ends of other ranks' pieces (`halo.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gengram_megatron.model.gengram.halo import Halo
from gengram_megatron.model.zigzag import Piece


class ConvolutionOutput(nn.Module):
    """weight: [kernel, h]; the last tap multiplies the current token."""

    def __init__(self, config, kernel: int, dilation: int, tp_group, cp_group):
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        self.halo = Halo((kernel - 1) * dilation, config.sequence_parallel, tp_group, cp_group)
        self.weight = nn.Parameter(
            torch.empty(
                (kernel, config.hidden_size),
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, gated: Tensor, pieces: list[Piece], seq_length: int) -> Tensor:
        """gated: [s_local, b, h], the rows of this rank's `pieces`; returns the same shape."""
        halos = self.halo(gated, pieces, seq_length)
        parts = gated.split([len(piece) for piece in pieces])
        convolved = torch.cat([self._convolve(torch.cat(pair)) for pair in zip(halos, parts)])
        return gated + F.silu(convolved)

    def _convolve(self, x: Tensor) -> Tensor:
        """x: [reach + s, b, h]; returns [s, b, h]."""
        length = len(x) - self.halo.reach
        out = x[:length] * self.weight[0]
        for tap in range(1, self.kernel):
            start = tap * self.dilation
            out = torch.addcmul(out, x[start : start + length], self.weight[tap])
        return out
