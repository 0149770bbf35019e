"""Layer specs: which module implements each part of a decoder layer."""

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from gengram_megatron.config.schema import Model
from gengram_megatron.engine.model import transformer_engine
from gengram_megatron.engine.model.attention import CoreAttention, LatentAttention
from gengram_megatron.engine.model.experts import GroupedExperts
from gengram_megatron.engine.model.gpt import Memory, RMSNorm, with_memory


class TorchBackend(LocalSpecProvider):
    """megatron-core's torch modules, with ours where they do not cover all cases."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type[RMSNorm]:
        """Returns the norm that supports sequence parallelism."""
        return RMSNorm

    def core_attention(self) -> type[CoreAttention]:
        """Returns the attention that supports context parallelism."""
        return CoreAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type[GroupedExperts], None]:
        """Returns the experts, and None for their submodules, of which they have none."""
        return GroupedExperts, None


def block_spec(
    model: Model, memory: Memory | None, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Returns the specs of the layers that this pipeline stage builds, with `memory` in the layers
    that have it."""
    if model.implementation == "transformer_engine":
        layer, norm = transformer_engine.layer_spec(config), transformer_engine.NORM
    else:
        layer, norm = _torch_layer(config), RMSNorm
    first = get_transformer_layer_offset(config, vp_stage=vp_stage) + 1  # layers are counted from 1
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[
            with_memory(layer, memory.module if memory and number in memory.layers else None)
            for number in range(first, first + count)
        ],
        layer_norm=norm,
    )


def _torch_layer(config: TransformerConfig) -> ModuleSpec:
    backend = TorchBackend()
    attention = _latent_attention if config.multi_latent_attention else _grouped_query_attention
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.layer_norm(),
            self_attention=attention(backend),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.layer_norm(),
            mlp=get_mlp_module_spec_for_backend(
                backend, num_experts=config.num_moe_experts, moe_grouped_gemm=True
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _grouped_query_attention(backend: LocalSpecProvider) -> ModuleSpec:
    """Returns the spec of grouped-query attention, and of mha: it has as many groups as heads."""
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )


def _latent_attention(backend: LocalSpecProvider) -> ModuleSpec:
    column = backend.column_parallel_linear()
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=column,
            linear_q_up_proj=column,
            linear_kv_down_proj=column,
            linear_kv_up_proj=column,
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=backend.layer_norm(for_qk=True),
            kv_layernorm=backend.layer_norm(for_qk=True),
        ),
    )
