"""Tensors in fp8."""


class QuantizedTensor:
    """No tensor here is one."""
