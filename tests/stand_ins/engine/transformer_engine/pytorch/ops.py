"""Names that megatron-core needs to be imported; it builds none of them for our models."""

from torch import nn


class FusibleOperation(nn.Module):
    """Base class."""


class Sequential(nn.Module):
    """Operations that may be fused."""


class SwiGLU(FusibleOperation):
    """An activation."""
