"""What a config.json of transformers says of a model, and our keys for it.

Only what decides the logits is compared: sizes, norms, activation, biases, rotary embedding, router
and memory. Keys that a file leaves out, or has as null, have the defaults of transformers' Llama
and Mixtral. Files of transformers 4 have `rope_theta` and `rope_scaling`, files of 5
`rope_parameters`, and ours both.
"""

from collections.abc import Iterator
from dataclasses import asdict

from gengram_megatron.config.schema import Config, Gengram, Hashing
from gengram_megatron.config.tables import LARGEST_DIRECT, kmer_tables
from gengram_megatron.engine.exchange.huggingface import PAD
from gengram_megatron.engine.exchange.huggingface_files import check_values
from gengram_megatron.engine.exchange.settings import Difference, Wanted, value_of
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import EOD

KINDS = {"llama": False, "mixtral": True, "gengram_llama": False, "gengram_mixtral": True}
"""model_type, and whether it is a mixture of experts."""
_DEFAULTS = {
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
"""Keys there whose value is that of a key below `model.` here."""
_SAME_OF_MEMORY = (
    "layers", "dim", "window", "token_ids", "deduplicate", "signed_sqrt", "output", "conv_kernel",
    "projection_bias",
)  # fmt: skip
_NOT_COMPUTED = {
    "architectures", "auto_map", "transformers_version", "_name_or_path", "torch_dtype", "dtype",
    "use_cache", "initializer_range", "max_position_embeddings", "pretraining_tp",
    "attention_dropout", "router_aux_loss_coef", "router_jitter_noise", "output_router_logits",
    "output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    "unsloth_version", "_attn_implementation_autoset", "_attn_implementation",
}  # fmt: skip
"""Of training, of bookkeeping, or of how transformers runs a model."""
_COMPARED = {
    *_SAME, "model_type", "num_key_value_heads", "num_local_experts", "num_experts_per_tok",
    "head_dim", "hidden_act", "attention_bias", "mlp_bias", "sliding_window", "rope_theta",
    "rope_scaling", "rope_parameters", "partial_rotary_factor", "tie_word_embeddings", "gengram",
    "quantization_config",
}  # fmt: skip
_SPECIAL_IDS = {"bos_token_id": None, "eos_token_id": EOD, "pad_token_id": PAD}
"""And what they are here."""
_LONGEST = 8192
"""Bases a sample in a config that is written for a model of long contexts: what the released
models were pretrained with, where their own lengths of up to a million would need a cluster."""
_SEEDS = 1000
"""As many seeds of hashed tables are tried."""


def differences(found: dict, config: Config) -> list[Difference]:
    """All that a config.json, as parsed, says otherwise than a config of what the model computes.

    UserError: it is no model of a kind that is known here, or contradicts itself.
    """
    model, different = config.model, []
    ours = {
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "gengram.layers": sorted(model.gengram.layers),
    }
    for one in _compared(found):
        of_memory = one.key.startswith("gengram.") and one.key != "gengram.enabled"
        if of_memory and not model.gengram.enabled:
            continue  # that there is a memory says it all
        own = ours.get(one.key, value_of(model, one.key))
        if one.value != own:
            different.append(Difference(one.name, one.theirs, f"model.{one.key}", own))
    if _memory(found) and model.gengram.enabled:
        tables = [asdict(table) for table in kmer_tables(model.gengram)]
        if (theirs := _memory(found).get("tables")) != tables:
            different.append(
                Difference(
                    "gengram.tables", _told(theirs), "model.gengram.kmer_sizes", _told(tables)
                )
            )
    different += [Difference(name, there, None, here) for name, there, here in _without_key(found)]
    return different


def wanted_model(found: dict) -> dict[str, object]:
    """Keys below `model.`, with dots, and their values: the model that a config.json describes.

    UserError: it is no model of a kind that is known here, or contradicts itself.
    """
    get, wanted = _getter(found), {}
    for one in _compared(found):
        wanted[one.key] = one.value
    if wanted["num_query_groups"] == wanted["num_attention_heads"]:
        wanted |= {"attention": "mha", "num_query_groups": None}
    wanted["seq_length"] = min(get("max_position_embeddings"), _LONGEST)
    wanted["init_std"] = get("initializer_range")
    if wanted["num_experts"] is not None:
        wanted["moe_aux_loss_coeff"] = get("router_aux_loss_coef")
    if _memory(found):
        wanted |= {f"gengram.{key}": value for key, value in _wanted_tables(found).items()}
    return wanted


def notes(found: dict) -> Iterator[str]:
    """Sentences on what is told and not compared."""
    ids = {name: found.get(name) for name in _SPECIAL_IDS}
    if other := {n: i for n, i in ids.items() if i is not None and i != _SPECIAL_IDS[n]}:
        there = ", ".join(f"{name} {value}" for name, value in other.items())
        here = ", ".join(f"{name} {_SPECIAL_IDS[name]}" for name in other)
        yield f"config.json has {there}, which is ignored: here the ids are fixed ({here})"
    if tied(found):
        yield (
            "config.json ties the output layer to the embedding (tie_word_embeddings); here it "
            "starts as a copy of it, and the two are trained apart"
        )
    known = {*_NOT_COMPUTED, *_COMPARED, *_SPECIAL_IDS}
    if unknown := sorted(
        name for name, value in found.items() if name not in known and value is not None
    ):
        yield (
            f"config.json has keys that are not known here and are not compared: "
            f"{', '.join(unknown)}"
        )


def tied(found: dict) -> bool:
    """Whether the output layer is the input embedding."""
    return bool(found.get("tie_word_embeddings"))


def _compared(found: dict) -> Iterator[Wanted]:
    """All that has a key here."""
    get, kind = _getter(found), found["model_type"]
    check_values(found)
    for name, key in _SAME.items():
        yield Wanted(name, get(name), key, get(name))
    # An explicit null has another meaning than none: Mixtral's default is 8.
    default = _DEFAULTS[KINDS[kind]]["num_key_value_heads"]
    groups = found.get("num_key_value_heads", default) or get("num_attention_heads")
    yield Wanted("num_key_value_heads", groups, "num_query_groups", groups)
    theta = _rope(found)["rope_theta"]
    yield Wanted("rope_theta", theta, "rotary_base", int(theta) if theta % 1 == 0 else theta)
    if KINDS[kind]:
        yield Wanted("num_local_experts", get("num_local_experts"), "num_experts",
                      get("num_local_experts"))  # fmt: skip
        yield Wanted("num_experts_per_tok", get("num_experts_per_tok"), "moe_router_topk",
                      get("num_experts_per_tok"))  # fmt: skip
    else:
        yield Wanted("model_type", kind, "num_experts", None)
    memory = _memory(found)
    yield Wanted("model_type", kind, "gengram.enabled", memory is not None)
    if memory is not None:
        for name in _SAME_OF_MEMORY:
            value = memory.get(name, getattr(Gengram(), name))
            if name == "layers":
                value = sorted(value)  # their order means nothing
            if name == "conv_kernel" and memory.get("output", "convolution") != "convolution":
                continue  # nothing is convolved
            yield Wanted(f"gengram.{name}", value, f"gengram.{name}", value)
        eod = memory.get("eod")
        yield Wanted("gengram.eod", eod, "gengram.reset_at_document", eod is not None)


def _without_key(found: dict) -> Iterator[tuple[str, object, object]]:
    """What is always so here: a name, the value there and the one here, where they differ."""
    get = _getter(found)
    width = get("hidden_size") // get("num_attention_heads")
    always = {"attention_bias": False, "mlp_bias": False, "head_dim": width}
    for name, here in always.items():
        if (there := found.get(name)) is not None and there != here:
            yield name, there, here
    if (act := found.get("hidden_act") or "silu") not in ("silu", "swish"):
        yield "hidden_act", act, "silu"
    rope = _rope(found)
    if rope["rope_type"] != "default":
        yield "rope_type", rope["rope_type"], "default"
    if rope["partial_rotary_factor"] != 1:
        yield "partial_rotary_factor", rope["partial_rotary_factor"], 1.0
    window = found.get("sliding_window")
    experts = KINDS[found["model_type"]]  # Llama has no such key
    if experts and window is not None and window < get("max_position_embeddings"):
        yield "sliding_window", window, None
    if found.get("quantization_config"):
        yield "quantization_config", "given", None
    memory = _memory(found) or {}
    if memory.get("eod") not in (None, EOD):
        yield "gengram.eod", memory["eod"], EOD
    for name in sorted(memory.keys() - {*_SAME_OF_MEMORY, "eod", "tables"}):
        yield f"gengram.{name}", memory[name], "not known"


def _getter(found: dict):
    """Reads a key with the default of the model's kind."""
    kind = found.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(
            f"config.json has model_type {kind!r}, which is no model that can be imported: it may "
            f"be {', '.join(KINDS)}"
        )
    defaults = _DEFAULTS[KINDS[kind]]

    def get(name: str):
        value = found.get(name)
        return defaults[name] if value is None else value

    return get


def _rope(found: dict) -> dict:
    """Base, type and share of the rotary embedding, by whichever keys say them."""
    given = found.get("rope_parameters") or {}
    scaling = found.get("rope_scaling") or {}
    places = {"": found, " of rope_parameters": given, " of rope_scaling": scaling}

    def only(name: str, default: float) -> float:
        said = {
            place: group[name] for place, group in places.items() if group.get(name) is not None
        }
        if len(set(said.values())) > 1:
            values = ", ".join(f"{name}{place} is {value:g}" for place, value in said.items())
            raise UserError(f"config.json contradicts itself: {values}; remove the wrong ones")
        return next(iter(said.values()), default)

    kinds = [one.get("rope_type") or one.get("type") or "default" for one in (given, scaling)]
    return {
        "rope_theta": only("rope_theta", _getter(found)("rope_theta")),
        "rope_type": next((kind for kind in kinds if kind != "default"), "default"),
        "partial_rotary_factor": only("partial_rotary_factor", 1.0),
    }


def _memory(found: dict) -> dict | None:
    """The group `gengram` of our own exports; None: a model without memory."""
    if not str(found.get("model_type")).startswith("gengram_"):
        return None
    if not isinstance(found.get("gengram"), dict):
        raise UserError(
            f"config.json has model_type {found['model_type']!r} and lacks the group gengram, "
            "which says what its memory computes"
        )
    return found["gengram"]


def _told(tables: object) -> object:
    """Tables as a line of a message shows them."""
    try:
        return ", ".join(f"{one['name']}: {one['rows']} x {one['columns']}" for one in tables)
    except (KeyError, TypeError):
        return tables


def _wanted_tables(found: dict) -> dict[str, object]:
    """The keys below model.gengram that make the tables of an export."""
    tables = _memory(found).get("tables") or []
    wanted: dict[str, object] = {
        "kmer_sizes": sorted({one["k"] for one in tables}),
        "share_reverse_complements": any(one.get("shared") for one in tables),
    }
    hashed = [one for one in tables if one["k"] > LARGEST_DIRECT]
    if not hashed:
        return wanted
    hashing = {
        "rows": max(one["rows"] for one in hashed),  # a prime, and the largest up to itself
        "heads": sum(one["k"] == hashed[0]["k"] for one in hashed),
    }
    wanted |= {f"hashing.{key}": value for key, value in hashing.items()}
    for seed in range(_SEEDS):
        memory = Gengram(
            dim=_memory(found)["dim"],
            kmer_sizes=wanted["kmer_sizes"],
            share_reverse_complements=wanted["share_reverse_complements"],
            hashing=Hashing(**hashing, seed=seed),
        )
        if [asdict(table) for table in kmer_tables(memory)] == tables:
            return wanted | {"hashing.seed": seed}
    return wanted
