"""The decoder layer: megatron-core's, with memory in front of it where there is one; and
RMSNorm that works on sequence shards.

megatron-core's block hands only its known arguments on to the layers. One of them, attention_bias,
is closed over in the plain and in the recomputed path alike, so what it carries belongs to its own
microbatch, also when several are in flight in a pipeline. Causal attention has no bias, so the
inputs of memory travel in it, such as Gengram's k-mers (megatron-core 0.16.1).
"""

from dataclasses import dataclass, fields

import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from gengram_megatron.engine.model.initialize import InitialLaw, init_tag, whole_weight


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, on torch's fused kernel.

    megatron-core's own torch norm refuses sequence parallelism; this one marks its weight so
    that megatron-core sums its gradient over the tensor-parallel group.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = whole_weight(hidden_size, config, init_tag(InitialLaw(constant=1.0)))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; returns the same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass
class DecoderLayerSubmodules(TransformerLayerSubmodules):
    """A layer's parts, the memory among them; IdentityOp: a layer without memory."""

    memory: ModuleSpec | type = IdentityOp


class DecoderLayer(TransformerLayer):
    """x + memory(x, k-mers), then attention and experts as in megatron-core."""

    def __init__(self, config, submodules: DecoderLayerSubmodules, **kwargs):
        super().__init__(config=config, submodules=submodules, **kwargs)
        self.has_memory = submodules.memory is not IdentityOp
        if self.has_memory:
            self.memory = build_module(
                submodules.memory, config=config, pg_collection=self.pg_collection
            )

    def forward(self, hidden_states: Tensor, *args, attention_bias: object | None = None, **kwargs):
        """hidden_states: [s_local, b, h]; attention_bias: the inputs of memory (Memory.inputs)."""
        if self.has_memory:
            hidden_states = hidden_states + self.memory(hidden_states, attention_bias)
        return super().forward(hidden_states, *args, **kwargs)


def with_memory(layer: ModuleSpec, memory: ModuleSpec | None) -> ModuleSpec:
    """A spec of megatron-core's layer as one of ours."""
    parts = {f.name: getattr(layer.submodules, f.name) for f in fields(layer.submodules)}
    return ModuleSpec(
        module=DecoderLayer,
        params=layer.params,
        submodules=DecoderLayerSubmodules(**parts, memory=memory or IdentityOp),
    )
