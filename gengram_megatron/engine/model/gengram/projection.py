"""Key z and value u: two linear maps of the pooled features (paper section 3.3, equation 11), with
biases if gengram.projection_bias is on.

The features are concatenated in the order of k. A tensor-parallel rank has d / tp columns of each
table and multiplies them with its part of both maps; the sum over the ranks is the result. Under
sequence parallelism that is one reduce-scatter, and features are never gathered.

The features are the widest tensor of the memory (6 d_m per token) and cheap to compute, so they are
not kept for the backward pass, which pools again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gengram_megatron.engine.model.gengram.shape import GengramShape
from gengram_megatron.engine.model.initialize import (
    InitDistribution,
    init_tag,
    split_weight,
    whole_weight,
)


class KeyValueProjection(nn.Module):
    """Projects pooled features to key and value.

    weight: [2, h, number of k, d / tp]; index 0 gives the key, 1 the value.
    bias: [2 h], the key's before the value's, whole on each tensor-parallel rank; or None. It has
        one axis because megatron-core excludes parameters with one axis from weight decay.
    """

    def __init__(
        self,
        config: TransformerConfig,
        gengram: GengramShape,
        tp_group: ProcessGroup,
        dp_group: ProcessGroup,
    ):
        super().__init__()
        self.tp_group, self.dp_group = tp_group, dp_group
        self.sequence_parallel = config.sequence_parallel
        num_sizes, dim = len(gengram.kmer_sizes), gengram.dim
        init_method = gengram.init_method(config, fan_in=num_sizes * dim)
        shape = (2, config.hidden_size, num_sizes, dim // tp_group.size())
        self.weight = split_weight(shape, 3, config, init_method)
        self.bias = None
        if gengram.projection_bias:
            published = gengram.init == "published"
            bias_init = init_method if published else init_tag(InitDistribution(constant=0.0))
            self.bias = whole_weight((2 * config.hidden_size,), config, bias_init)

    def forward(self, pool: Callable[[Sequence[Tensor]], Tensor], rows: list[Tensor]) -> Tensor:
        """Projects the features [s, b, number of k * d / tp], which `pool` computes from the rows.
        Returns key and value concatenated, [s, b, 2 h], or [s / tp, b, 2 h] under sequence
        parallelism."""
        partial = _LinearOfPooled.apply(pool, self.weight.flatten(2).flatten(0, 1), *rows)
        if self.sequence_parallel:
            total = reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
        else:
            total = reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)
        return self.add_bias(total)

    def add_bias(self, key_value: Tensor) -> Tensor:
        """Adds the bias, if there is one. key_value: [s, b, 2 h], already summed over the
        tensor-parallel ranks, so that the bias is added only once. Returns the same shape."""
        return key_value if self.bias is None else key_value + self.bias

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedTensor]:
        """Returns the sharded state: the weight, whose last axis is split over the tensor-parallel
        ranks, and the bias, which each of them holds."""
        before = len(sharded_offsets)
        state = {
            f"{prefix}weight": ShardedTensor.from_rank_offsets(
                f"{prefix}weight",
                self.weight,
                *sharded_offsets,
                (before + 3, self.tp_group.rank(), self.tp_group.size()),
                replica_id=(0, 0, self.dp_group.rank()),
                prepend_axis_num=before,
            )
        }
        if self.bias is not None:
            state[f"{prefix}bias"] = ShardedTensor.from_rank_offsets(
                f"{prefix}bias",
                self.bias,
                *sharded_offsets,
                replica_id=(0, self.tp_group.rank(), self.dp_group.rank()),
                prepend_axis_num=before,
            )
        return state


class _LinearOfPooled(torch.autograd.Function):
    """Computes pool(rows) @ weight^T, and pools again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, pool: Callable[[Sequence[Tensor]], Tensor], weight: Tensor, *rows: Tensor
    ) -> Tensor:
        ctx.pool = pool
        ctx.save_for_backward(weight, *rows)
        return F.linear(pool(rows), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *rows = ctx.saved_tensors
        rows = [x.detach().requires_grad_() for x in rows]
        with torch.enable_grad():
            features = ctx.pool(rows)
        tokens = grad.flatten(0, 1)
        weight_grad = tokens.t() @ features.detach().flatten(0, 1)
        return None, weight_grad, *torch.autograd.grad(features, rows, grad @ weight)
