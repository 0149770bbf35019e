"""Gradients of weights, added to their float32 sums by the matrix product that makes them.

Else the product writes a tensor as large as the weight, and another kernel adds it up. apex has
such a product, which megatron-core's linear layers use (gradient accumulation fusion), and
Transformer Engine has one for its own layers.
"""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from torch import nn


def apex_adds_up() -> bool:
    """Whether megatron-core has found apex's extension fused_weight_gradient_mlp_cuda, and there is
    a GPU for it."""
    return layers._grad_accum_fusion_available and torch.cuda.is_available()


def fuse_accumulation(chunk: nn.Module, apex: bool) -> None:
    """Have a model's linear layers add up gradients wherever they can. Their weights must get a
    `main_grad`, as those in megatron-core's DistributedDataParallel have.

    megatron-core's own switch, gradient_accumulation_fusion, is one for both libraries and refuses
    to be on without apex.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.gradient_accumulation_fusion = apex
        elif hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def fused_by(modules: list[nn.Module]) -> str | None:
    """Who adds up gradients in these modules; None: nobody."""
    libraries = {
        "apex": any(getattr(m, "gradient_accumulation_fusion", False) for m in modules),
        "Transformer Engine": any(getattr(m, "fuse_wgrad_accumulation", False) for m in modules),
    }
    return " and ".join(name for name, used in libraries.items() if used) or None
