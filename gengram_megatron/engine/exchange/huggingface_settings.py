"""Maps the settings in a config.json of transformers to our config keys, and compares them.

Only settings that affect the logits are compared: sizes, norms, activation, biases, rotary
embedding, router and Gengram. Keys that are absent or null have the defaults of transformers' Llama
and Mixtral. Files of transformers 4 have `rope_theta` and `rope_scaling`, files of transformers 5
`rope_parameters`, and our exports both.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from gengram_megatron.config.schema import Config, Gengram, Hashing
from gengram_megatron.config.tables import LARGEST_DIRECT, kmer_tables
from gengram_megatron.engine.exchange.huggingface import PAD
from gengram_megatron.engine.exchange.huggingface_files import check_values
from gengram_megatron.engine.exchange.settings import Difference, MappedSetting, value_of
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import EOD

MODEL_TYPES = {"llama": False, "mixtral": True, "gengram_llama": False, "gengram_mixtral": True}
"""Each model_type that can be imported, and whether it is a mixture of experts."""
_DEFAULTS: dict[bool, dict[str, Any]] = {
    False: {  # LlamaConfig
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048,
        "initializer_range": 0.02,
    },
    True: {  # MixtralConfig
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072,
        "initializer_range": 0.02, "num_local_experts": 8, "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
}  # fmt: skip
_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "rms_norm_eps": "norm_epsilon",
}
"""Keys of config.json whose value is that of one of our keys below `model.`."""
_SAME_OF_GENGRAM = (
    "layers", "dim", "window", "token_ids", "deduplicate", "signed_sqrt", "output", "conv_kernel",
    "projection_bias",
)  # fmt: skip
_IGNORED = {
    "architectures", "auto_map", "transformers_version", "_name_or_path", "torch_dtype", "dtype",
    "use_cache", "initializer_range", "max_position_embeddings", "pretraining_tp",
    "attention_dropout", "router_aux_loss_coef", "router_jitter_noise", "output_router_logits",
    "output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    "unsloth_version", "_attn_implementation_autoset", "_attn_implementation",
}  # fmt: skip
"""Keys for training, for bookkeeping, or for how transformers runs a model."""
_COMPARED = {
    *_SAME, "model_type", "num_key_value_heads", "num_local_experts", "num_experts_per_tok",
    "head_dim", "hidden_act", "attention_bias", "mlp_bias", "sliding_window", "rope_theta",
    "rope_scaling", "rope_parameters", "partial_rotary_factor", "tie_word_embeddings", "gengram",
    "quantization_config",
}  # fmt: skip
_SPECIAL_IDS = {"bos_token_id": None, "eos_token_id": EOD, "pad_token_id": PAD}
"""Keys for the ids of special tokens, and the ids here."""
_MAX_SEQ_LENGTH = 8192
"""The most bases per sample in a new config for a long-context model. The released models were
pretrained at this length; training at their full length of up to a million would need a cluster."""
_MAX_SEEDS = 1000
"""The number of seeds that are tried to find the one of the hashed tables."""


def differences(hf_config: dict[str, Any], config: Config) -> list[Difference]:
    """Returns all differences between a parsed config.json and our config that affect the logits.

    Raises UserError if the model is of an unknown type or contradicts itself.
    """
    model, result = config.model, []
    normalized = {
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "gengram.layers": sorted(model.gengram.layers),
    }
    for setting in _mapped_settings(hf_config):
        is_gengram_detail = setting.key.startswith("gengram.") and setting.key != "gengram.enabled"
        if is_gengram_detail and not model.gengram.enabled:
            continue  # the difference in gengram.enabled is enough
        our_value = normalized.get(setting.key, value_of(model, setting.key))
        if setting.value != our_value:
            result.append(
                Difference(setting.name, setting.foreign_value, f"model.{setting.key}", our_value)
            )
    if (gengram := _gengram(hf_config)) and model.gengram.enabled:
        tables = [asdict(table) for table in kmer_tables(model.gengram)]
        if (foreign_tables := gengram.get("tables")) != tables:
            result.append(
                Difference(
                    "gengram.tables",
                    _format_tables(foreign_tables),
                    "model.gengram.kmer_sizes",
                    _format_tables(tables),
                )
            )
    result += [
        Difference(name, foreign_value, None, our_value)
        for name, foreign_value, our_value in _without_key(hf_config)
    ]
    return result


def model_keys(hf_config: dict[str, Any]) -> dict[str, object]:
    """Returns the dotted keys below `model.`, with values, for the model in a config.json.

    Raises UserError if the model is of an unknown type or contradicts itself.
    """
    get = _getter(hf_config)
    keys = {setting.key: setting.value for setting in _mapped_settings(hf_config)}
    if keys["num_query_groups"] == keys["num_attention_heads"]:
        keys |= {"attention": "mha", "num_query_groups": None}
    keys["seq_length"] = min(get("max_position_embeddings"), _MAX_SEQ_LENGTH)
    keys["init_std"] = get("initializer_range")
    if keys["num_experts"] is not None:
        keys["moe_aux_loss_coeff"] = get("router_aux_loss_coef")
    if gengram := _gengram(hf_config):
        keys |= {f"gengram.{key}": value for key, value in _table_keys(gengram).items()}
    return keys


def notes(hf_config: dict[str, Any]) -> Iterator[str]:
    """Yields a warning for each setting that is reported but not compared."""
    ids = {name: hf_config.get(name) for name in _SPECIAL_IDS}
    if other := {n: i for n, i in ids.items() if i is not None and i != _SPECIAL_IDS[n]}:
        foreign = ", ".join(f"{name} {value}" for name, value in other.items())
        ours = ", ".join(f"{name} {_SPECIAL_IDS[name]}" for name in other)
        yield f"config.json has {foreign}, which is ignored: here the ids are fixed ({ours})"
    if has_tied_embeddings(hf_config):
        yield (
            "config.json ties the output layer to the embedding (tie_word_embeddings); here the "
            "output layer starts as a copy, and the two are trained apart"
        )
    known = {*_IGNORED, *_COMPARED, *_SPECIAL_IDS}
    if unknown := sorted(
        name for name, value in hf_config.items() if name not in known and value is not None
    ):
        yield (f"config.json has unknown keys, which are not compared: {', '.join(unknown)}")


def has_tied_embeddings(hf_config: dict[str, Any]) -> bool:
    """Returns whether the output layer shares its weight with the input embedding."""
    return bool(hf_config.get("tie_word_embeddings"))


def _mapped_settings(hf_config: dict[str, Any]) -> Iterator[MappedSetting]:
    """Yields all settings for which there is a key."""
    get, model_type = _getter(hf_config), hf_config["model_type"]
    check_values(hf_config)
    for name, key in _SAME.items():
        yield MappedSetting(name, get(name), key, get(name))
    # An explicit null means the number of heads; an absent key means the default, 8 for Mixtral.
    default = _DEFAULTS[MODEL_TYPES[model_type]]["num_key_value_heads"]
    groups = hf_config.get("num_key_value_heads", default) or get("num_attention_heads")
    yield MappedSetting("num_key_value_heads", groups, "num_query_groups", groups)
    theta = _rope(hf_config)["rope_theta"]
    yield MappedSetting("rope_theta", theta, "rotary_base", int(theta) if theta % 1 == 0 else theta)
    if MODEL_TYPES[model_type]:
        yield MappedSetting("num_local_experts", get("num_local_experts"), "num_experts",
                      get("num_local_experts"))  # fmt: skip
        yield MappedSetting("num_experts_per_tok", get("num_experts_per_tok"), "moe_router_topk",
                      get("num_experts_per_tok"))  # fmt: skip
    else:
        yield MappedSetting("model_type", model_type, "num_experts", None)
    gengram = _gengram(hf_config)
    yield MappedSetting("model_type", model_type, "gengram.enabled", gengram is not None)
    if gengram is not None:
        for name in _SAME_OF_GENGRAM:
            value = gengram.get(name, getattr(Gengram(), name))
            if name == "layers":
                value = sorted(value)  # the order has no meaning
            if name == "conv_kernel" and gengram.get("output", "convolution") != "convolution":
                continue  # there is no convolution
            yield MappedSetting(f"gengram.{name}", value, f"gengram.{name}", value)
        eod = gengram.get("eod")
        yield MappedSetting("gengram.eod", eod, "gengram.reset_at_document", eod is not None)


def _without_key(hf_config: dict[str, Any]) -> Iterator[tuple[str, object, object]]:
    """Yields (name, foreign value, our value) of settings that differ and are fixed here."""
    get = _getter(hf_config)
    width = get("hidden_size") // get("num_attention_heads")
    fixed = {"attention_bias": False, "mlp_bias": False, "head_dim": width}
    for name, our_value in fixed.items():
        if (foreign_value := hf_config.get(name)) is not None and foreign_value != our_value:
            yield name, foreign_value, our_value
    if (activation := hf_config.get("hidden_act") or "silu") not in ("silu", "swish"):
        yield "hidden_act", activation, "silu"
    rope = _rope(hf_config)
    if rope["rope_type"] != "default":
        yield "rope_type", rope["rope_type"], "default"
    if rope["partial_rotary_factor"] != 1:
        yield "partial_rotary_factor", rope["partial_rotary_factor"], 1.0
    window = hf_config.get("sliding_window")
    is_mixtral = MODEL_TYPES[hf_config["model_type"]]  # Llama has no sliding_window
    if is_mixtral and window is not None and window < get("max_position_embeddings"):
        yield "sliding_window", window, None
    if hf_config.get("quantization_config"):
        yield "quantization_config", "given", None
    gengram = _gengram(hf_config) or {}
    if gengram.get("eod") not in (None, EOD):
        yield "gengram.eod", gengram["eod"], EOD
    for name in sorted(gengram.keys() - {*_SAME_OF_GENGRAM, "eod", "tables"}):
        yield f"gengram.{name}", gengram[name], "not known"


def _getter(hf_config: dict[str, Any]) -> Callable[[str], Any]:
    """Returns a function that reads a key, with the default of the model's type."""
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise UserError(
            f"config.json has model_type {model_type!r}, which cannot be imported: it must be one "
            f"of {', '.join(MODEL_TYPES)}"
        )
    defaults = _DEFAULTS[MODEL_TYPES[model_type]]

    def get(name: str) -> Any:
        value = hf_config.get(name)
        return defaults[name] if value is None else value

    return get


def _rope(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Returns rope_theta, rope_type and partial_rotary_factor, from whichever keys hold them.

    Raises UserError if two keys hold different values.
    """
    parameters = hf_config.get("rope_parameters") or {}
    scaling = hf_config.get("rope_scaling") or {}
    groups = {"": hf_config, " of rope_parameters": parameters, " of rope_scaling": scaling}

    def only_value(name: str, default: float) -> float:
        values = {
            suffix: group[name] for suffix, group in groups.items() if group.get(name) is not None
        }
        if len(set(values.values())) > 1:
            text = ", ".join(f"{name}{suffix} is {value:g}" for suffix, value in values.items())
            raise UserError(f"config.json contradicts itself: {text}; remove the wrong ones")
        return next(iter(values.values()), default)

    types = [
        group.get("rope_type") or group.get("type") or "default" for group in (parameters, scaling)
    ]
    return {
        "rope_theta": only_value("rope_theta", _getter(hf_config)("rope_theta")),
        "rope_type": next((name for name in types if name != "default"), "default"),
        "partial_rotary_factor": only_value("partial_rotary_factor", 1.0),
    }


def _gengram(hf_config: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the group `gengram` of one of our exports; None for a model without Gengram."""
    if not str(hf_config.get("model_type")).startswith("gengram_"):
        return None
    gengram = hf_config.get("gengram")
    if not isinstance(gengram, dict):
        raise UserError(
            f"config.json has model_type {hf_config['model_type']!r} and lacks the group gengram, "
            "which defines what Gengram computes"
        )
    return gengram


def _format_tables(tables: Any) -> object:
    """Returns tables as text for a message, or as they are if they are malformed."""
    try:
        return ", ".join(
            f"{table['name']}: {table['rows']} x {table['columns']}" for table in tables
        )
    except (KeyError, TypeError):
        return tables


def _table_keys(gengram: dict[str, Any]) -> dict[str, object]:
    """Returns the keys below model.gengram that lead to the tables in the group of an export.

    hashing.seed is absent if none of the seeds tried gives the hashes of the tables.
    """
    tables = gengram.get("tables") or []
    keys: dict[str, object] = {
        "kmer_sizes": sorted({table["k"] for table in tables}),
        "share_reverse_complements": any(table.get("shared") for table in tables),
    }
    hashed = [table for table in tables if table["k"] > LARGEST_DIRECT]
    if not hashed:
        return keys
    hashing = {
        "rows": max(table["rows"] for table in hashed),  # prime; the search for primes starts at it
        "heads": sum(table["k"] == hashed[0]["k"] for table in hashed),
    }
    keys |= {f"hashing.{key}": value for key, value in hashing.items()}
    for seed in range(_MAX_SEEDS):
        candidate = Gengram(
            dim=gengram["dim"],
            kmer_sizes=keys["kmer_sizes"],
            share_reverse_complements=keys["share_reverse_complements"],
            hashing=Hashing(**hashing, seed=seed),
        )
        if [asdict(table) for table in kmer_tables(candidate)] == tables:
            return keys | {"hashing.seed": seed}
    return keys
