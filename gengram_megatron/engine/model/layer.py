"""megatron-core's decoder layer with an optional memory before it, and an RMSNorm that works on
sequence shards.

megatron-core's block passes only the arguments that it knows on to the layers. Causal attention
needs no bias, so the inputs of the memory, such as Gengram's k-mers, are passed as the argument
attention_bias. The block captures that argument in a closure with and without recomputation alike,
so each microbatch keeps its own inputs, even with several microbatches in flight in a pipeline
(megatron-core 0.16.1).
"""

from dataclasses import dataclass, fields

import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from gengram_megatron.engine.model.initialize import InitialLaw, init_tag, whole_weight


class RMSNorm(nn.Module):
    """Computes x / rms(x) * weight over the last axis with torch's fused kernel.

    megatron-core's own torch norm does not support sequence parallelism. The weight of this one is
    marked so that megatron-core sums its gradient over the tensor-parallel group.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = whole_weight(hidden_size, config, init_tag(InitialLaw(constant=1.0)))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]. Returns the same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass
class DecoderLayerSubmodules(TransformerLayerSubmodules):
    """The submodules of a layer. memory is IdentityOp for a layer without memory."""

    memory: ModuleSpec | type = IdentityOp


class DecoderLayer(TransformerLayer):
    """Computes x + memory(x, inputs), then attention and the MLP or experts as in megatron-core."""

    def __init__(self, config, submodules: DecoderLayerSubmodules, **kwargs):
        super().__init__(config=config, submodules=submodules, **kwargs)
        self.has_memory = submodules.memory is not IdentityOp
        if self.has_memory:
            self.memory = build_module(
                submodules.memory, config=config, pg_collection=self.pg_collection
            )

    def forward(self, hidden_states: Tensor, *args, attention_bias: object | None = None, **kwargs):
        """hidden_states: [s_local, b, h]; attention_bias: the inputs of the memory, as returned by
        Memory.inputs."""
        if self.has_memory:
            hidden_states = hidden_states + self.memory(hidden_states, attention_bias)
        return super().forward(hidden_states, *args, **kwargs)


def with_memory(layer: ModuleSpec, memory: ModuleSpec | None) -> ModuleSpec:
    """Turns the spec of megatron-core's layer into the spec of a DecoderLayer with `memory`. With
    None the layer has no memory."""
    submodules = {f.name: getattr(layer.submodules, f.name) for f in fields(layer.submodules)}
    return ModuleSpec(
        module=DecoderLayer,
        params=layer.params,
        submodules=DecoderLayerSubmodules(**submodules, memory=memory or IdentityOp),
    )
