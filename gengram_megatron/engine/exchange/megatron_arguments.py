"""Maps the arguments of Megatron-LM that decide what a model computes to our keys.

A Megatron-LM checkpoint holds the arguments of its run by name. Those that affect the logits are in
the tables below, with the names of Megatron-LM 0.16 and of the Gengram code published for it. An
argument that is absent from a checkpoint is not compared, because its value is not known. The
exception is `gengram_window_size`: if a run with Gengram lacks it, its code had no window.
"""

from collections.abc import Iterator
from typing import Any

from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import LARGEST_DIRECT
from gengram_megatron.engine.exchange.settings import (
    Difference,
    MappedSetting,
    format_value,
    value_of,
)

Arguments = dict[str, Any]
"""The arguments of a run by name: numbers, strings, booleans, None, and lists and tuples of
them."""


_SAME = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "padded_vocab_size": "vocab_size",
    "norm_epsilon": "norm_epsilon",
    "layernorm_epsilon": "norm_epsilon",  # later versions' name for norm_epsilon
    "rotary_base": "rotary_base",
}
"""Arguments whose value is that of one of our keys below `model.`."""
_SAME_OF_LATENT_ATTENTION = {
    name: f"mla.{name}"
    for name in (
        "kv_lora_rank", "q_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim",
    )
}  # fmt: skip
_SAME_OF_GENGRAM = {
    "gengram_ngram_sizes": "gengram.kmer_sizes",
    "gengram_embed_dim_per_ngram": "gengram.dim",
    "gengram_token_ids": "gengram.token_ids",
}
_TRAINING_ONLY = {
    "seq_length": "seq_length",
    "init_method_std": "init_std",
    "moe_aux_loss_coeff": "moe_aux_loss_coeff",
    "moe_z_loss_coeff": "moe_z_loss_coeff",
}
"""Arguments that are used for a new config only, because they do not change the logits."""
_PUBLISHED_GENGRAM = {
    "deduplicate": False,
    "reset_at_document": False,
    "share_reverse_complements": False,
    "signed_sqrt": True,
    "projection_bias": False,
}
"""Keys below model.gengram for which the published code has no argument, and its fixed values."""
_PUBLISHED_EPSILON = 1e-5
"""The epsilon of the norms in the published Gengram, whatever norm_epsilon is; ours use
model.norm_epsilon."""

_FIXED = {
    # Position embeddings.
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "no_rope_freq": None,
    "mrope_section": None,
    # Norms, biases and activations.
    "normalization": "RMSNorm",
    "apply_layernorm_1p": False,
    "layernorm_zero_centered_gamma": False,  # later versions' name for apply_layernorm_1p
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "swiglu": True,
    "squared_relu": False,
    "openai_gelu": False,
    "onnx_safe": False,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "untie_embeddings_and_output_weights": True,
    # Attention.
    "attention_output_gate": False,
    "qk_l2_norm": False,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "window_size": None,
    "experimental_attention_variant": None,
    "linear_attention_type": None,
    "linear_attention_freq": None,
    # Other types of layers.
    "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
    "is_hybrid_model": False,
    "hybrid_attention_ratio": 0.0,
    "hybrid_mlp_ratio": 0.0,
    "hybrid_override_pattern": None,
    "retro_add_retriever": False,
}
"""Arguments for which there is no key, and the value that this program always uses."""
_FIXED_OF_EXPERTS = {
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_limited_devices": None,
    "moe_router_force_load_balancing": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_layer_freq": 1,
    "moe_expert_capacity_factor": None,
    "moe_input_jitter_eps": None,
    "moe_latent_size": None,
    "moe_apply_probs_on_input": False,
}
_EQUIVALENT_VALUES = {
    "rotary_seq_len_interpolation_factor": (1,),
    "moe_router_topk_scaling_factor": (1,),
}
"""Other values of these arguments that compute the same."""


def model_keys(arguments: Arguments) -> dict[str, object]:
    """Returns the keys below `model.`, with values, for all arguments that have a key."""
    settings = (*_mapped_settings(arguments), *_training_settings(arguments))
    keys = {setting.key: setting.value for setting in settings}
    if keys.get("gengram.enabled"):
        keys |= {f"gengram.{key}": value for key, value in _PUBLISHED_GENGRAM.items()}
    return keys


def train_keys(arguments: Arguments) -> dict[str, object]:
    """Returns the keys below `train.` for the batch sizes and the length of the run."""
    keys = {
        name: arguments[name]
        for name in ("global_batch_size", "micro_batch_size")
        if arguments.get(name)
    }
    for name, key in (("train_samples", "samples"), ("train_iters", "steps")):
        if arguments.get(name) and not keys.keys() & {"samples", "steps"}:
            keys[key] = arguments[name]
    return keys


def differences(arguments: Arguments, config: Config) -> list[Difference]:
    """Returns all differences between the arguments and the config that affect the logits.

    Settings without a key come last.
    """
    result = []
    for setting in _mapped_settings(arguments):
        if not _agrees(setting, config, arguments):
            our_value = value_of(config.model, setting.key)
            result.append(
                Difference(
                    setting.name, _format_foreign(setting), f"model.{setting.key}", our_value
                )
            )
    if arguments.get("gengram_enabled") and config.model.gengram.enabled:
        for key, value in _PUBLISHED_GENGRAM.items():
            if (our_value := getattr(config.model.gengram, key)) != value:
                result.append(Difference("(always)", value, f"model.gengram.{key}", our_value))
        if config.model.norm_epsilon != _PUBLISHED_EPSILON:
            name = "(always) epsilon of Gengram's norms"
            result.append(Difference(name, _PUBLISHED_EPSILON, None, config.model.norm_epsilon))
    return result + list(_without_key(arguments))


def _mapped_settings(arguments: Arguments) -> Iterator[MappedSetting]:
    """Yields all settings of the model for which there is a key."""
    yield from _same_values(arguments, _SAME)
    yield from _attention(arguments)
    yield from _feed_forward(arguments)
    yield from _gengram(arguments)


def _same_values(arguments: Arguments, names: dict[str, str]) -> Iterator[MappedSetting]:
    """Yields settings whose value is that of our key; names: argument -> key."""
    for name, key in names.items():
        if name in arguments:
            value = arguments[name]
            # Megatron-LM stores some whole numbers as floats, and some lists as tuples.
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            yield MappedSetting(
                name, value, key, list(value) if isinstance(value, tuple) else value
            )


def _attention(arguments: Arguments) -> Iterator[MappedSetting]:
    if arguments.get("multi_latent_attention"):
        yield MappedSetting("multi_latent_attention", True, "attention", "mla")
        yield from _same_values(arguments, _SAME_OF_LATENT_ATTENTION)
    elif "group_query_attention" in arguments:
        grouped = arguments["group_query_attention"]
        name = "group_query_attention"
        yield MappedSetting(name, grouped, "attention", "gqa" if grouped else "mha")
        if grouped and (groups := arguments.get("num_query_groups")):
            yield MappedSetting("num_query_groups", groups, "num_query_groups", groups)


def num_experts(arguments: Arguments) -> object:
    """Returns the number of experts; None or 0 for a dense model or if not stated."""
    return arguments.get("num_experts") or arguments.get("num_moe_experts")


def _feed_forward(arguments: Arguments) -> Iterator[MappedSetting]:
    name = next((name for name in ("num_experts", "num_moe_experts") if name in arguments), None)
    if name is None:
        return
    number, width = num_experts(arguments), "ffn_hidden_size"
    yield MappedSetting(name, number, "num_experts", number)
    if number:
        yield from _same_values(arguments, {"moe_router_topk": "moe_router_topk"})
        width = "moe_ffn_hidden_size" if arguments.get("moe_ffn_hidden_size") else width
    if arguments.get(width):
        yield MappedSetting(width, arguments[width], "ffn_hidden_size", arguments[width])


def _gengram(arguments: Arguments) -> Iterator[MappedSetting]:
    """Yields the settings of the published Gengram code.

    Flags that were not given are None, false or absent.
    """
    if "gengram_enabled" not in arguments:
        return
    enabled = bool(arguments["gengram_enabled"])
    yield MappedSetting("gengram_enabled", enabled, "gengram.enabled", enabled)
    if not enabled:
        return
    if "gengram_layer_ids" in arguments:
        layers = arguments["gengram_layer_ids"]  # from 1, like ours
        count = arguments.get("num_layers")
        all_layers = range(1, count + 1) if isinstance(count, int) else None
        if (used := layers or all_layers) is not None:  # without ids, all layers have Gengram
            yield MappedSetting("gengram_layer_ids", layers, "gengram.layers", sorted(set(used)))
    yield from _same_values(arguments, _SAME_OF_GENGRAM)
    window = arguments.get("gengram_window_size") or None
    yield MappedSetting("gengram_window_size", window, "gengram.window", window)
    if "gengram_use_short_conv" in arguments:
        convolution = bool(arguments["gengram_use_short_conv"])
        output = "convolution" if convolution else "plain"
        yield MappedSetting("gengram_use_short_conv", convolution, "gengram.output", output)
        if convolution:
            kernel = {"gengram_short_conv_kernel_size": "gengram.conv_kernel"}
            yield from _same_values(arguments, kernel)


def _training_settings(arguments: Arguments) -> Iterator[MappedSetting]:
    """Yields the settings that only a new config needs."""
    for setting in _same_values(arguments, _TRAINING_ONLY):
        if setting.key == "moe_z_loss_coeff" and setting.value is None:
            yield MappedSetting(setting.name, setting.foreign_value, setting.key, 0)
        elif isinstance(setting.value, int | float):
            yield setting


def _agrees(setting: MappedSetting, config: Config, arguments: Arguments) -> bool:
    """Returns whether the config computes the same; more than one value of a key may do so."""
    model, our_value = config.model, value_of(config.model, setting.key)
    groups = model.num_query_groups or model.num_attention_heads
    if setting.key == "num_query_groups":
        return groups == setting.value
    if setting.key == "attention":
        if our_value == setting.value:
            return True
        if "mla" in (our_value, setting.value):
            return False
        heads = arguments.get("num_attention_heads", model.num_attention_heads)
        foreign_groups: object = arguments.get("num_query_groups", groups)
        return groups == (heads if setting.value == "mha" else foreign_groups)
    if setting.key == "gengram.layers":
        return sorted(model.gengram.layers) == setting.value
    return our_value == setting.value


def _format_foreign(setting: MappedSetting) -> object:
    """Returns the foreign value, followed by the value of our key if that is different."""
    if setting.foreign_value == setting.value:
        return setting.foreign_value
    return f"{format_value(setting.foreign_value)}, which is {format_value(setting.value)}"


def is_equivalent(foreign_value: object, our_value: object) -> bool:
    """Returns whether two values mean the same: an absent flag may be None, false, 0 or empty."""
    return foreign_value == our_value or (not foreign_value and not our_value)


def _without_key(arguments: Arguments) -> Iterator[Difference]:
    """Yields the settings with which this program cannot compute."""
    fixed = dict(_FIXED)
    has_mla = bool(arguments.get("multi_latent_attention"))
    fixed["qk_layernorm"] = has_mla
    if num_experts(arguments):
        fixed |= _FIXED_OF_EXPERTS
        # Here the softmax is over all experts for top-1 routing, else over the chosen experts.
        fixed["moe_router_pre_softmax"] = arguments.get("moe_router_topk") == 1
    for name, our_value in fixed.items():
        if name not in arguments:
            continue
        foreign_value = arguments[name]
        is_list = isinstance(foreign_value, list | tuple)
        if name == "moe_layer_freq" and is_list and all(foreign_value):
            continue
        if name == "no_rope_freq" and is_list and not any(foreign_value):
            continue
        if is_equivalent(foreign_value, our_value):
            continue
        if foreign_value not in _EQUIVALENT_VALUES.get(name, ()):
            yield Difference(name, foreign_value, None, our_value)
    if has_mla and "rope_type" in arguments:
        foreign_value = arguments["rope_type"] or "yarn"  # megatron-core's default for MLA
        if foreign_value != "rope":
            yield Difference("rope_type", foreign_value, None, "rope")
    yield from _router_without_key(arguments)
    yield from _heads_without_key(arguments, has_mla)
    if arguments.get("gengram_enabled"):
        yield from _gengram_without_key(arguments)


def _router_without_key(arguments: Arguments) -> Iterator[Difference]:
    balancing = arguments.get("moe_router_load_balancing_type")
    if num_experts(arguments) and "sinkhorn" in (balancing or ()):
        yield Difference("moe_router_load_balancing_type", balancing, None, "aux_loss")


def _heads_without_key(arguments: Arguments, has_mla: bool) -> Iterator[Difference]:
    names = ("kv_channels", "hidden_size", "num_attention_heads")
    width, hidden, heads = (arguments.get(name) for name in names)
    if width and hidden and heads and not has_mla and width * heads != hidden:
        yield Difference("kv_channels", width, None, hidden // heads)


def _gengram_without_key(arguments: Arguments) -> Iterator[Difference]:
    sizes, layers = arguments.get("gengram_ngram_sizes"), arguments.get("gengram_layer_ids")
    if sizes and list(sizes) != sorted(set(sizes)):
        yield Difference("gengram_ngram_sizes", sizes, None, sorted(set(sizes)))
    if sizes and max(sizes) > LARGEST_DIRECT:
        largest = f"hashed tables above {LARGEST_DIRECT}"
        yield Difference("gengram_ngram_sizes", sizes, None, largest)
    count = arguments.get("num_layers") or max(layers or [0])
    if layers and not all(1 <= layer <= count for layer in layers):
        yield Difference("gengram_layer_ids", layers, None, f"layers from 1 to {count}")
    dilation = arguments.get("gengram_short_conv_dilation")
    taps = arguments.get("gengram_short_conv_kernel_size")
    convolution = arguments.get("gengram_use_short_conv") and taps != 1
    if convolution and dilation and sizes and dilation != max(sizes):
        yield Difference("gengram_short_conv_dilation", dilation, None, max(sizes))


KNOWN = {
    *_SAME, *_SAME_OF_LATENT_ATTENTION, *_SAME_OF_GENGRAM, *_TRAINING_ONLY,
    *_FIXED, *_FIXED_OF_EXPERTS,
    "multi_latent_attention", "group_query_attention", "num_query_groups", "kv_channels",
    "num_experts", "num_moe_experts", "ffn_hidden_size", "moe_ffn_hidden_size", "moe_router_topk",
    "moe_router_pre_softmax", "moe_router_load_balancing_type", "qk_layernorm", "rope_type",
    "gengram_enabled", "gengram_layer_ids", "gengram_window_size", "gengram_use_short_conv",
    "gengram_short_conv_kernel_size", "gengram_short_conv_dilation",
}  # fmt: skip
"""All arguments that are compared, or needed to compare others."""
