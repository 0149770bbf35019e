"""Warns of arguments of Megatron-LM that an import does not compare, unless they are harmless."""

import re
from collections.abc import Iterator

from gengram_megatron.engine.exchange.megatron_arguments import (
    KNOWN,
    Arguments,
    is_equivalent,
    num_experts,
)
from gengram_megatron.engine.exchange.settings import format_value

_ROUNDING = {
    "fp32_residual_connection": False,
    "apply_query_key_layer_scaling": False,
    "fp16": False,
    "fp8": None,
    "fp4": None,
    "moe_router_dtype": "fp32",
}
"""Arguments that change the logits only by rounding, and the values that this program uses."""


_HARMLESS = re.compile(
    # Training: optimizer, schedule, dropout, losses, initial weights, recomputation.
    r"adam_|(main_|exp_avg_)|sgd_|muon_|optimizer|lr$|lr_|min_lr|decoupled_|weight_decay|head_lr"
    r"|no_weight_decay|(start|end)_weight_decay|clip_grad|loss_scale|(initial|min)_loss|hysteresis"
    r"|(hidden|attention)_dropout|init_method|embedding_init|perform_init|use_cpu_init|data_parallel"
    r"|calculate_per_token|cross_entropy|fp16_lm|mtp_|qk_clip|recompute|distribute_saved|checkpoint_"
    r"|grpo_|rl_|langrl|perform_rl|warmup|use_precision_aware|override_opt|use_checkpoint|seed$"
    r"|moe_(aux|z_loss|per_layer|router_bias_update|token|use_upcycling|upcycling|layer_recompute)"
    # Data.
    r"|data(_|loader)|train_|valid_|test_|eval_|split|per_split|num_workers|num_dataset|mmap|mock|mask_|short_seq"
    r"|sample_rate|create_attention_mask|mid_level|fim_|eod_mask|(encoder|decoder)_seq|vocab_"
    r"|make_vocab|merge_file|tokenizer|tiktoken|legacy_tok|trust_remote|use_tokenizer|sft|consumed"
    r"|skipped|(global|micro)_batch|batch_size|rampup|full_validation|iteration|curr_iter|max_pos"
    r"|object_storage|reuse_grad|allow_ambiguous|do_(train|valid|test)|phase_|decrease_batch"
    # Machines and parallelism.
    r"|(tensor|pipeline|context|expert|virtual|model|encoder|transformer|sequence)_(\w+_)?parallel"
    r"|num_(layers_per_)?virtual|(decoder|encoder)_(first|last|tensor|pipeline|num)|(hier|hybrid_con)"
    r"|rank$|local_rank|world_size|distributed|num_distributed|distrib_optim|use_dist|ddp_|fsdp|nccl"
    r"|use_(nccl|sharp|megatron_fsdp|torch|tp_pp|ring|gloo|mp_args|mcore|flash|fused|te_|pytorch)"
    r"|overlap|align_|defer|delay_|wgrad|gradient_|grad_reduce|accumulate|tp_comm|cp_comm|scatter_"
    r"|account_for|microbatch_group|high_priority|sharp_|replication|async|torch_fsdp|pin_cpu|cpu_"
    r"|batch_p2p|use_mamba|use_persistent|suggested|keep_fp8|enable_(full|gloo|ft|one|msc|cuda|experimental)|symmetric"
    r"|moe_(deepep|enable_deepep|flex|hybridep|permute|pad|router_fusion|router_padding)|ep_overlap"
    r"|moe_(extended_tp|grouped_gemm|use_legacy_grouped|shared_expert_(overlap|gate))|offload|min_off"
    r"|fine_grained_act|max_seqlen|params_dtype|bf16$|lazy_mpu|local$|variable_seq"
    # Kernels.
    r"|transformer_impl|attention_backend|attention_softmax_in_fp32|(\w+_)?fusion$|bias_\w+_fusion"
    r"|clone_scatter|persist|no_persist|memory_(snap|eff)|cuda_graph|external_cuda|fp8_|fp4_|num_layers_at_"
    r"|deterministic|disable_(bf16|jit|mamba|straggler|symm|chunked|gloo)|inference|decode_only|mlp_ch"
    r"|kitchen_attention|flash_decode|manual_gc|empty_unused|dist_ckpt|ckpt|auto_detect|strict_fsdp"
    # Files, logs, and settings of model parts that this model does not have.
    r"|save(_|$)|load(_|$)|no_save|no_load|non_persistent|finetune|pretrained|exit_|log(_|ging)|timing|barrier|wandb"
    r"|tensorboard|one_logger|app_tag|profile|record_mem|straggler|rerun|error_inj|result_rej|check_"
    r"|inprocess|adlr|calc_ft|run_workload|dump_|yaml_cfg|deprecated|max_tokens_to_oom|output_bert"
    r"|num_floating|bert_|biencoder|ict_|retriever|retro|indexer|query_in|block_data|evidence|titles"
    r"|embedding_path|num_classes|img_|num_channels|patch_dim|classes|vision|swin|dino|iter_per"
    r"|relative_attention|use_rotary|add_position|rope_scaling_factor|rotary_scaling|mscale|mamba_"
    r"|linear_(conv|key|value|num)|dsa_|window_attn|cache_mla|original_max|beta_(fast|slow)"
)
"""Matches the start of the names of arguments that do not change what the model computes."""


def argument_warnings(arguments: Arguments) -> Iterator[str]:
    """Yields a warning for arguments that only change the rounding, and one for unknown ones."""
    has_experts = num_experts(arguments)
    rounding = {
        name: arguments[name]
        for name, our_value in _ROUNDING.items()
        if name in arguments
        and not is_equivalent(arguments[name], our_value)
        and (has_experts or name != "moe_router_dtype")
    }
    if rounding:
        yield (
            f"the checkpoint's run computed with {_format_arguments(rounding)}, and this program "
            "does not: the same weights give logits that differ by rounding"
        )
    unknown = {
        name: value
        for name, value in sorted(arguments.items())
        if value and name not in KNOWN | _ROUNDING.keys() and not _HARMLESS.match(name)
    }
    if unknown:
        yield (
            "the checkpoint has unknown arguments, which were not compared: "
            f"{_format_arguments(unknown)}; check that none of them changes what the model computes"
        )


def _format_arguments(arguments: Arguments) -> str:
    """Returns names and values of arguments as text on one line."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in arguments.items())
