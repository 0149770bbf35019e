"""Megatron-LM's arguments that decide what a model computes, and our keys for them.

A checkpoint of Megatron-LM holds the arguments of its run by name. Those that decide the logits
are in the tables below, with the names of Megatron-LM 0.16 and of the Gengram code published for
it. An argument that a checkpoint does not have is not compared, because nobody knows what it was;
only `gengram_window_size` may be absent from a run with memory, whose code then had no window.
"""

from collections.abc import Iterator

from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import LARGEST_DIRECT
from gengram_megatron.engine.exchange.settings import Difference, Wanted, shown, value_of

Arguments = dict[str, object]


_SAME = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "padded_vocab_size": "vocab_size",
    "norm_epsilon": "norm_epsilon",
    "layernorm_epsilon": "norm_epsilon",  # later versions' names of this and layernorm_1p
    "rotary_base": "rotary_base",
}
"""Arguments whose value is that of a key."""
_SAME_OF_LATENT_ATTENTION = {
    name: f"mla.{name}"
    for name in (
        "kv_lora_rank", "q_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim",
    )
}  # fmt: skip
_SAME_OF_MEMORY = {
    "gengram_ngram_sizes": "gengram.kmer_sizes",
    "gengram_embed_dim_per_ngram": "gengram.dim",
    "gengram_token_ids": "gengram.token_ids",
}
_OF_TRAINING = {
    "seq_length": "seq_length",
    "init_method_std": "init_std",
    "moe_aux_loss_coeff": "moe_aux_loss_coeff",
    "moe_z_loss_coeff": "moe_z_loss_coeff",
}
"""For a new config only: these do not change the logits."""
_PUBLISHED_MEMORY = {
    "deduplicate": False,
    "reset_at_document": False,
    "share_reverse_complements": False,
    "signed_sqrt": True,
    "projection_bias": False,
}
"""Keys below model.gengram for which the published code has no argument, and what it always does."""
_PUBLISHED_EPSILON = 1e-5
"""Of the norms in the published memory, whatever norm_epsilon is; ours have the model's."""

_ALWAYS = {
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
    "layernorm_zero_centered_gamma": False,
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
    # Layers of other kinds.
    "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
    "is_hybrid_model": False,
    "hybrid_attention_ratio": 0.0,
    "hybrid_mlp_ratio": 0.0,
    "hybrid_override_pattern": None,
    "retro_add_retriever": False,
}
"""Arguments for which there is no key, and the value with which this program computes."""
_ALWAYS_OF_EXPERTS = {
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
_ALIKE = {
    "rotary_seq_len_interpolation_factor": (1,),
    "moe_router_topk_scaling_factor": (1,),
}
"""Other values that compute the same."""


def wanted_model(arguments: Arguments) -> dict[str, object]:
    """The keys below `model.` that say what these arguments say, as far as there are keys."""
    found = {one.key: one.value for one in (*_wanted(arguments), *_training(arguments))}
    if found.get("gengram.enabled"):
        found |= {f"gengram.{key}": value for key, value in _PUBLISHED_MEMORY.items()}
    return found


def wanted_batch(arguments: Arguments) -> dict[str, object]:
    """The keys below `train.` of a run that goes on as this one did."""
    found = {
        name: arguments[name]
        for name in ("global_batch_size", "micro_batch_size")
        if arguments.get(name)
    }
    for name, key in (("train_samples", "samples"), ("train_iters", "steps")):
        if arguments.get(name) and not found.keys() & {"samples", "steps"}:
            found[key] = arguments[name]
    return found


def differences(arguments: Arguments, config: Config) -> list[Difference]:
    """All that the arguments and the config say differently of what the model computes.

    What has no key here comes last.
    """
    found = []
    for one in _wanted(arguments):
        if not _agrees(one, config, arguments):
            ours = value_of(config.model, one.key)
            found.append(Difference(one.name, _told(one), f"model.{one.key}", ours))
    if arguments.get("gengram_enabled") and config.model.gengram.enabled:
        for key, value in _PUBLISHED_MEMORY.items():
            if (ours := getattr(config.model.gengram, key)) != value:
                found.append(Difference("(always)", value, f"model.gengram.{key}", ours))
        if config.model.norm_epsilon != _PUBLISHED_EPSILON:
            name, ours = "(always) epsilon of the memory's norms", config.model.norm_epsilon
            found.append(Difference(name, _PUBLISHED_EPSILON, None, ours))
    return found + list(_without_key(arguments))


def _wanted(arguments: Arguments) -> Iterator[Wanted]:
    """What the model's keys must be; what has no key is left out."""
    yield from _alike(arguments, _SAME)
    yield from _attention(arguments)
    yield from _feed_forward(arguments)
    yield from _memory(arguments)


def _alike(arguments: Arguments, names: dict[str, str]) -> Iterator[Wanted]:
    for name, key in names.items():
        if name in arguments:
            value = arguments[name]
            # Megatron-LM takes some whole numbers as floats, and lists as tuples.
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            yield Wanted(name, value, key, list(value) if isinstance(value, tuple) else value)


def _attention(arguments: Arguments) -> Iterator[Wanted]:
    if arguments.get("multi_latent_attention"):
        yield Wanted("multi_latent_attention", True, "attention", "mla")
        yield from _alike(arguments, _SAME_OF_LATENT_ATTENTION)
    elif "group_query_attention" in arguments:
        grouped = arguments["group_query_attention"]
        name = "group_query_attention"
        yield Wanted(name, grouped, "attention", "gqa" if grouped else "mha")
        if grouped and (groups := arguments.get("num_query_groups")):
            yield Wanted("num_query_groups", groups, "num_query_groups", groups)


def experts(arguments: Arguments) -> object:
    """Their number; None: a dense model, or one of which it is not said."""
    return arguments.get("num_experts") or arguments.get("num_moe_experts")


def _feed_forward(arguments: Arguments) -> Iterator[Wanted]:
    name = next((name for name in ("num_experts", "num_moe_experts") if name in arguments), None)
    if name is None:
        return
    number, width = experts(arguments), "ffn_hidden_size"
    yield Wanted(name, number, "num_experts", number)
    if number:
        yield from _alike(arguments, {"moe_router_topk": "moe_router_topk"})
        width = "moe_ffn_hidden_size" if arguments.get("moe_ffn_hidden_size") else width
    if arguments.get(width):
        yield Wanted(width, arguments[width], "ffn_hidden_size", arguments[width])


def _memory(arguments: Arguments) -> Iterator[Wanted]:
    """Of the published code, whose flags that were not given are None, false or not there."""
    if "gengram_enabled" not in arguments:
        return
    enabled = bool(arguments["gengram_enabled"])
    yield Wanted("gengram_enabled", enabled, "gengram.enabled", enabled)
    if not enabled:
        return
    if "gengram_layer_ids" in arguments:
        layers = arguments["gengram_layer_ids"]  # from 1, as ours
        count = arguments.get("num_layers")
        if layers or isinstance(count, int):  # without ids all layers have memory
            value = sorted(set(layers or range(1, count + 1)))
            yield Wanted("gengram_layer_ids", layers, "gengram.layers", value)
    yield from _alike(arguments, _SAME_OF_MEMORY)
    window = arguments.get("gengram_window_size") or None
    yield Wanted("gengram_window_size", window, "gengram.window", window)
    if "gengram_use_short_conv" in arguments:
        convolution = bool(arguments["gengram_use_short_conv"])
        output = "convolution" if convolution else "plain"
        yield Wanted("gengram_use_short_conv", convolution, "gengram.output", output)
        if convolution:
            yield from _alike(arguments, {"gengram_short_conv_kernel_size": "gengram.conv_kernel"})


def _training(arguments: Arguments) -> Iterator[Wanted]:
    for one in _alike(arguments, _OF_TRAINING):
        if one.key == "moe_z_loss_coeff" and one.value is None:
            yield Wanted(one.name, one.theirs, one.key, 0)
        elif isinstance(one.value, int | float):
            yield one


def _agrees(one: Wanted, config: Config, arguments: Arguments) -> bool:
    """Whether the config computes the same, which several values of a key may do."""
    model, ours = config.model, value_of(config.model, one.key)
    groups = model.num_query_groups or model.num_attention_heads
    if one.key == "num_query_groups":
        return groups == one.value
    if one.key == "attention":
        heads = arguments.get("num_attention_heads", model.num_attention_heads)
        wanted = {"mha": heads, "gqa": arguments.get("num_query_groups", groups)}
        return ours == one.value or ("mla" not in (ours, one.value) and groups == wanted[one.value])
    if one.key == "gengram.layers":
        return sorted(model.gengram.layers) == one.value
    return ours == one.value


def _told(one: Wanted) -> object:
    """The value there, with what the key must be where that is something else."""
    if one.theirs == one.value:
        return one.theirs
    return f"{shown(one.theirs)}, which is {shown(one.value)}"


def same(theirs: object, ours: object) -> bool:
    """Flags that were not given, or not, are None, false, 0 or empty."""
    return theirs == ours or (not theirs and not ours)


def _without_key(arguments: Arguments) -> Iterator[Difference]:
    """What this program cannot compute."""
    always = dict(_ALWAYS)
    latent = bool(arguments.get("multi_latent_attention"))
    always["qk_layernorm"] = latent
    if experts(arguments):
        always |= _ALWAYS_OF_EXPERTS
        # As with one chosen expert here; else the softmax runs over the chosen ones.
        always["moe_router_pre_softmax"] = arguments.get("moe_router_topk") == 1
    for name, ours in always.items():
        if name not in arguments:
            continue
        theirs = arguments[name]
        if name == "moe_layer_freq" and isinstance(theirs, list | tuple) and all(theirs):
            continue
        if name == "no_rope_freq" and isinstance(theirs, list | tuple) and not any(theirs):
            continue
        if not same(theirs, ours) and theirs not in _ALIKE.get(name, ()):
            yield Difference(name, theirs, None, ours)
    if latent and "rope_type" in arguments:
        theirs = arguments["rope_type"] or "yarn"  # megatron-core's default with latent attention
        if theirs != "rope":
            yield Difference("rope_type", theirs, None, "rope")
    yield from _router_without_key(arguments)
    yield from _heads_without_key(arguments, latent)
    if arguments.get("gengram_enabled"):
        yield from _memory_without_key(arguments)


def _router_without_key(arguments: Arguments) -> Iterator[Difference]:
    balancing = arguments.get("moe_router_load_balancing_type")
    if experts(arguments) and "sinkhorn" in (balancing or ()):
        yield Difference("moe_router_load_balancing_type", balancing, None, "aux_loss")


def _heads_without_key(arguments: Arguments, latent: bool) -> Iterator[Difference]:
    names = ("kv_channels", "hidden_size", "num_attention_heads")
    width, hidden, heads = (arguments.get(name) for name in names)
    if width and hidden and heads and not latent and width * heads != hidden:
        yield Difference("kv_channels", width, None, hidden // heads)


def _memory_without_key(arguments: Arguments) -> Iterator[Difference]:
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
    *_SAME, *_SAME_OF_LATENT_ATTENTION, *_SAME_OF_MEMORY, *_OF_TRAINING,
    *_ALWAYS, *_ALWAYS_OF_EXPERTS,
    "multi_latent_attention", "group_query_attention", "num_query_groups", "kv_channels",
    "num_experts", "num_moe_experts", "ffn_hidden_size", "moe_ffn_hidden_size", "moe_router_topk",
    "moe_router_pre_softmax", "moe_router_load_balancing_type", "qk_layernorm", "rope_type",
    "gengram_enabled", "gengram_layer_ids", "gengram_window_size", "gengram_use_short_conv",
    "gengram_short_conv_kernel_size", "gengram_short_conv_dilation",
}  # fmt: skip
"""All that are compared, or needed to compare others."""
