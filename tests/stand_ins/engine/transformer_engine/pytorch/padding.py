"""Rows of experts, filled up to what fp8 needs."""

import torch
import torch.nn.functional as F
from torch import nn


class Fp8Padding(nn.Module):
    """Zeros behind the rows of each product."""

    def __init__(self, num_gemms, align_size=None):
        super().__init__()
        self.align_size = align_size or 16

    def forward(self, inp, m_splits):
        filled = [-(-rows // self.align_size) * self.align_size for rows in m_splits]
        parts = [
            F.pad(part, (0, 0, 0, size - len(part)))
            for part, size in zip(inp.split(m_splits), filled)
        ]
        return torch.cat(parts), filled


class Fp8Unpadding(nn.Module):
    """The rows without them."""

    def __init__(self, num_gemms, align_size=None):
        super().__init__()
        self.align_size = align_size or 16

    def forward(self, inp, m_splits):
        filled = [-(-rows // self.align_size) * self.align_size for rows in m_splits]
        return torch.cat([part[:rows] for part, rows in zip(inp.split(filled), m_splits)])
