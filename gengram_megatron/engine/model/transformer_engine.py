"""Decoder layers built from Transformer Engine: megatron-core's spec, changed so that checkpoints
have the same names and shapes as with torch layers."""

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

NORM = TENorm
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Prefixes of norms that are fused with the next linear layer, and their names in checkpoints."""


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Returns the spec of a layer without memory."""
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    layer.submodules.sharded_state_dict_keys_map = FUSED_NORMS
    if config.num_moe_experts is not None:
        experts = layer.submodules.mlp.submodules
        experts.experts = replace(experts.experts, module=TransformerEngineExperts)
    return layer


class TransformerEngineExperts(TEGroupedMLP):
    """Transformer Engine's grouped linear layers, which hold one weight per expert. Checkpoints
    have the names and shapes of GroupedExperts."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedObject | ShardedTensorFactory]:
        """Returns the sharded state. Transformer Engine's extra state, which is not a tensor, is
        taken from megatron-core's; the weights are described as in GroupedExperts."""
        megatron_state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state = {
            key: value for key, value in megatron_state.items() if isinstance(value, ShardedObject)
        }
        for expert in range(self.num_local_experts):
            for name, module in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
                state[f"{prefix}{name}.weight{expert}"] = ShardedTensorFactory(
                    f"{prefix}{name}.weight",
                    getattr(module, f"weight{expert}"),
                    partial(self._to_checkpoint, expert, name == "linear_fc1", sharded_offsets),
                    _from_checkpoint,
                    (0, 0, module._pg_collection.expt_dp.rank()),
                )
        return state

    def _to_checkpoint(
        self,
        expert: int,
        gated: bool,
        sharded_offsets: tuple[tuple[int, int, int], ...],
        key: str,
        weight: Tensor,
        replica: tuple[int, int, int],
        _: slice | None,
    ) -> list[ShardedTensor]:
        """Describes one expert's weight as a slice of the tensor of all experts: [1, 2, f, h] for
        linear_fc1 (gate and up), [1, h, f] for linear_fc2."""
        before, experts = len(sharded_offsets), self.num_local_experts
        if gated:
            weight = weight.unflatten(0, (2, -1))
        return [
            ShardedTensor.from_rank_offsets(
                key,
                weight.unsqueeze(0),
                *sharded_offsets,
                (before, self.ep_group.rank() * experts + expert, self.ep_group.size() * experts),
                (before + 2, self.tp_group.rank(), self.tp_group.size()),
                replica_id=replica,
                prepend_axis_num=before,
            )
        ]


def _from_checkpoint(stored: list[Tensor]) -> Tensor:
    """Reshapes the stored [1, 2, f, h] to [2 f, h], or [1, h, f] to [h, f]."""
    return stored[0].flatten(0, -2)
