"""Builds this rank's part of the model from a checked config."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from gengram_megatron.config.layout import Layout
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.model.data_parallel import (
    DataParallel,
    apex_fusion_available,
    fuse_accumulation,
)
from gengram_megatron.engine.model.gengram.ids import GengramInputs
from gengram_megatron.engine.model.gengram.memory import GengramMemory
from gengram_megatron.engine.model.gengram.shape import GengramShape
from gengram_megatron.engine.model.gpt import GengramGPT, Memory
from gengram_megatron.engine.model.initialize import InitDistribution, init_tag, initialize, retag
from gengram_megatron.engine.model.specs import block_spec
from gengram_megatron.tokenizer import EOD

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(config: Config, layout: Layout) -> list[GengramGPT]:
    """Returns this rank's model chunks: one, or one per virtual pipeline stage. Their initial
    weights depend only on the seed. They are not yet wrapped for data parallelism."""
    transformer, memory = transformer_config(config, layout), build_memory(config, layout)
    chunks = []
    for stage in range(layout.virtual_pipeline or 1):
        vp_stage = stage if layout.virtual_pipeline else None
        chunk = GengramGPT(
            memory,
            config=transformer,
            transformer_layer_spec=block_spec(config.model, memory, transformer, vp_stage),
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.model.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=config.model.rotary_base,
            vp_stage=vp_stage,
        )
        if config.model.implementation == "transformer_engine":
            retag(chunk, transformer)
        chunks.append(chunk)
    initialize(chunks, config.run.seed)
    return chunks


def wrap_for_data_parallelism(
    chunks: list[GengramGPT], config: Config, layout: Layout
) -> list[DataParallel]:
    """Wraps chunks so that their gradients are summed in float32 over the data-parallel ranks."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
        overlap_param_gather=config.optimizer.overlap_param_gather,
        use_distributed_optimizer=config.optimizer.distributed,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        fuse_accumulation(chunk, apex_fusion_available())
        module = Float16Module(chunk.config, chunk) if config.train.dtype == "bf16" else chunk
        wrapped.append(
            DataParallel(
                chunk.config,
                ddp,
                module,
                layout.rows_shared_over,
                # With overlap, later chunks must not start their communication out of turn.
                disable_bucketing=index > 0,
            )
        )
    return wrapped


def build_memory(config: Config, layout: Layout) -> Memory | None:
    """Returns the memory that the config asks for, or None for the baseline."""
    gengram, shape = config.model.gengram, gengram_shape(config, layout)
    if shape is None:
        return None
    eod = EOD if gengram.reset_at_document else None
    inputs = GengramInputs(shape.tables, gengram.token_ids, eod)
    module = ModuleSpec(module=GengramMemory, params={"gengram": shape})
    return Memory(tuple(gengram.layers), module, inputs, inputs.metrics)


def gengram_shape(config: Config, layout: Layout) -> GengramShape | None:
    """Returns the settings of Gengram memory, or None if the config has it off."""
    gengram = config.model.gengram
    if not gengram.enabled:
        return None
    projection = layout.projection(torch.cuda.is_available())
    assert projection is not None, "the layout is that of a config without Gengram"
    return GengramShape(
        placements=layout.placements,
        dim=gengram.dim,
        window=gengram.window,
        conv_kernel=gengram.conv_kernel,
        init=gengram.init,
        init_std=gengram.init_std
        or (1.0 if gengram.init == "published" else config.model.init_std),
        deduplicate=gengram.deduplicate,
        signed_sqrt=gengram.signed_sqrt,
        output=gengram.output,
        project=projection.input,
        projection_bias=gengram.projection_bias,
    )


def transformer_config(config: Config, layout: Layout) -> TransformerConfig:
    """Returns megatron-core's config of the decoder."""
    model, bf16 = config.model, config.train.dtype == "bf16"
    dtype = DTYPES[config.train.dtype]
    output_std = model.init_std / (2 * model.num_layers) ** 0.5  # megatron-core's scaled init
    settings = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method": init_tag(InitDistribution(std=model.init_std)),
        "output_layer_init_method": init_tag(InitDistribution(std=output_std)),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": bf16,
        # megatron-core sets torch's switch, which affects all matrix products of the process.
        "disable_bf16_reduced_precision_matmul": (
            config.train.disable_bf16_reduced_precision_matmul
        ),
        "bias_activation_fusion": torch.cuda.is_available(),
        "deallocate_pipeline_outputs": True,
        "cuda_graph_scope": [],
        "batch_p2p_comm": torch.cuda.is_available(),
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline,
        "num_layers_in_first_pipeline_stage": config.parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": config.parallel.last_stage_layers,
        "context_parallel_size": layout.context,
        "sequence_parallel": layout.sequence,
        **_fp8(config),
        **_experts(config, layout),
        **_recompute(config),
    }
    if model.attention != "mla":
        return TransformerConfig(**settings)
    return MLATransformerConfig(
        **settings,
        kv_lora_rank=model.mla.kv_lora_rank,
        q_lora_rank=model.mla.q_lora_rank,
        qk_head_dim=model.mla.qk_head_dim,
        qk_pos_emb_head_dim=model.mla.qk_pos_emb_head_dim,
        v_head_dim=model.mla.v_head_dim,
        rope_type="rope",
        rotary_base=model.rotary_base,
        # The norms of the compressed keys and queries, which are part of MLA's definition.
        qk_layernorm=True,
    )


def _fp8(config: Config) -> dict[str, Any]:
    """Returns the fp8 settings. Weights stay in bf16; matrix products round to fp8."""
    if config.train.precision != "fp8":
        return {}
    recipe = config.train.fp8.recipe
    default = "hybrid" if recipe == "tensorwise" else "e4m3"
    return {"fp8": config.train.fp8.format or default, "fp8_recipe": recipe}


def _experts(config: Config, layout: Layout) -> dict[str, Any]:
    model = config.model
    if model.num_experts is None:
        return {}
    return {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.ffn_hidden_size,
        "moe_router_topk": model.moe_router_topk,
        # The softmax runs over the chosen experts. If only one is chosen it runs over all experts,
        # as the weight would otherwise always be 1 and give the router no gradient.
        "moe_router_pre_softmax": model.moe_router_topk == 1,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff or None,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
    }


def _recompute(config: Config) -> dict[str, Any]:
    """Returns the recomputation settings: for full, every layer; for selective, what is large and
    cheap to compute, which is norms and feed-forward activations. Attention is left out, because
    flash kernels keep no scores."""
    if config.train.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    if config.train.recompute == "selective":
        feed_forward = "mlp" if config.model.num_experts is None else "moe_act"
        return {
            "recompute_granularity": "selective",
            "recompute_modules": ["layernorm", feed_forward],
        }
    return {}
